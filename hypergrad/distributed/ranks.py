"""The processes that hold parts of one batch, and the two maps between what each of them has and what all share.

A tensor is *shared* when every rank holds the same one (parameters, solver vectors), and *local* otherwise (whatever
was computed from a rank's own part of the batch). With cotangents of local tensors counted `size` times, the two maps

    share: shared -> local, the identity              average: local -> shared, the mean over ranks

are each other's transpose. So whatever is built from them has the right derivatives, of any order, and pulling a
cotangent back through one of them costs one all-reduce and through the other none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hypergrad._flat import Params


@dataclass(frozen=True)
class Ranks:
    """The processes of a `torch.distributed` group over which losses are averaged.

    Args:
        group: a process group; None for the default one, of all processes.

    Raises:
        ValueError: where `torch.distributed` is not initialised.
    """

    group: Any = None

    def __post_init__(self) -> None:
        """Check that there are processes to speak of."""
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "Ranks: torch.distributed is not initialised. Start the script with torchrun and call "
                "torch.distributed.init_process_group() first."
            )

    @property
    def size(self) -> int:
        """Return how many processes there are."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Return which of them this one is."""
        return dist.get_rank(self.group)

    def share(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return shared tensors for local use: themselves; their cotangents are averaged in one all-reduce."""
        return list(_Share.apply(self, *tensors)) if tensors else []  # type: ignore[no-untyped-call]

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the means of local tensors over the ranks, by one all-reduce of all of them; differentiable."""
        return list(_Average.apply(self, *tensors)) if tensors else []  # type: ignore[no-untyped-call]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of local tensors over the ranks, by one all-reduce; a constant."""
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def share_params(self, params: Params) -> Params:
        """Return `share` of tensors by name."""
        return dict(zip(params, self.share(list(params.values())), strict=True))

    def average_params(
        self, params: Params, like: Mapping[str, Tensor], also: Sequence[Tensor] = ()
    ) -> tuple[Params, list[Tensor]]:
        """Return the means of `params` by name and of the tensors `also`, in one all-reduce.

        A name of `like` that `params` lacks counts as zero here, and is left out only if no rank has it. That is read
        back only by a rank that lacks one.
        """
        names = list(like)
        local = [params[name] if name in params else torch.zeros_like(like[name]) for name in names]
        if not names:
            return {}, self.average(list(also))
        device = local[0].device
        present = torch.tensor([float(name in params) for name in names], device=device)
        *means, count = self.average([*local, *also, present])
        averaged = dict(zip(names, means, strict=False))
        if len(params) < len(names):
            known = count.tolist()
            averaged = {n: g for (n, g), k in zip(averaged.items(), known, strict=True) if n in params or k > 0}
        return averaged, means[len(names) :]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let `all_gather` in the body gather over these ranks."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE: ContextVar[Ranks | None] = ContextVar("ranks", default=None)


def active_ranks() -> Ranks | None:
    """Return the ranks that share the loss being evaluated; None where it is this process's alone."""
    return _ACTIVE.get()


def world() -> Ranks:
    """Return all processes of `torch.distributed`'s default group, for `hg.Averaged(loss, ranks=...)`.

    Raises:
        ValueError: where `torch.distributed` is not initialised.
    """
    return Ranks()


def _mean(ranks: Ranks, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the means over the ranks: one flat vector in the widest dtype, one all-reduce."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    if len(tensors) == 1:
        flat = tensors[0].detach().reshape(-1).to(dtype, copy=True)
    else:
        flat = torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])
    dist.all_reduce(flat, group=ranks.group)
    flat.div_(ranks.size)
    pieces = torch.split(flat, [t.numel() for t in tensors])
    return tuple(piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, tensors, strict=True))


class _Share(torch.autograd.Function):
    """The identity; its transpose is the mean."""

    @staticmethod
    def forward(_ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Average.apply(ctx.ranks, *cotangents))  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:  # noqa: ARG004
        ranks, *tensors = args
        return _Share.apply(ranks, *tensors), in_dims[1:]  # type: ignore[no-untyped-call]


class _Average(torch.autograd.Function):
    """The mean over ranks; its transpose is the identity."""

    @staticmethod
    def forward(ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _mean(ranks, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_Share.apply(ctx.ranks, *cotangents))  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:  # noqa: ARG004
        ranks, *tensors = args
        return _Average.apply(ranks, *tensors), in_dims[1:]  # type: ignore[no-untyped-call]
