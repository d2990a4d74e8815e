"""What losses that compare samples need: the samples of all ranks, differentiably, to any order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypergrad.distributed.ranks import Ranks, active_ranks


def all_gather(tensor: Tensor) -> Tensor:
    r"""Return the tensors of all ranks concatenated along their first dimension; `tensor` itself in a single process.

    For losses that compare samples: contrastive ones, statistics of a batch. With rank r's part z_r of the samples,

    .. math:: z = (z_1, \dots, z_N), \qquad \bar z_r = \sum_s (\bar z^{(s)})_r

    where the cotangents of all ranks' copies are summed, so that the mean of all ranks' losses has the gradient of that
    loss on the union of the parts, whether each rank evaluates all of it or its own samples' share. It gathers while an
    engine is data parallel, and inside an `hg.Averaged` loss with ranks; elsewhere it changes nothing, so that the same
    loss runs in one process.

    Cost: one all-gather; one all-reduce of the gathered tensor for each derivative.

    Args:
        tensor: of the same shape on every rank, at least one dimension.

    Raises:
        ValueError: for a scalar.

    Example:
        >>> import torch, hypergrad as hg
        >>> hg.all_gather(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """
    if tensor.dim() == 0:
        raise ValueError("all_gather concatenates along the first dimension, got a scalar. Pass tensor.unsqueeze(0).")
    ranks = active_ranks()
    if ranks is None or ranks.size == 1:
        return tensor
    gathered: Tensor = _Gather.apply(ranks, tensor)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """All ranks' tensors along dimension 0."""

    @staticmethod
    def forward(ranks: Ranks, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(ranks.size)]
        dist.all_gather(parts, tensor, group=ranks.group)
        return torch.cat(parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        return None, _SumScatter.apply(ctx.ranks, cotangents[0])  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: ARG004
        ranks, tensor = args
        return _Gather.apply(ranks, tensor.movedim(in_dims[1], 1)), 1  # type: ignore[no-untyped-call]


class _SumScatter(torch.autograd.Function):
    """This rank's part of the sum over ranks; the transpose of `_Gather`."""

    @staticmethod
    def forward(ranks: Ranks, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ranks.group)
        return total.chunk(ranks.size)[ranks.rank].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor]:
        return None, _Gather.apply(ctx.ranks, cotangents[0])  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:  # noqa: ARG004
        ranks, tensor = args
        return _SumScatter.apply(ranks, tensor.movedim(in_dims[1], 1)), 1  # type: ignore[no-untyped-call]
