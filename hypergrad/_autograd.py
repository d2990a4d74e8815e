"""Derivatives by autograd, outside transforms and directly inside one `vmap`.

A tensor inside `vmap` stands for one example and wraps a tensor that holds them all. Autograd knows the latter alone.
So inside a single `vmap` the graph is recorded there and pulled back there, whole batches at a time and without the
transforms' dispatch at every operation; examples do not depend on one another, so that the pullback of one example is
that example's part of the pullback of all. The functions here do the same in both places; deeper inside transforms, and
in compiled regions, derivatives are those of `torch.func`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack


def by_autograd() -> bool:
    """Return whether derivatives are taken by autograd here: outside transforms, or inside one `vmap` and no other."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.maybe_current_level() is None or _single_vmap() is not None


def in_one_vmap() -> bool:
    """Return whether this runs inside one `vmap` and no other transform."""
    return not torch.compiler.is_compiling() and _single_vmap() is not None


def leaf(tensor: Tensor) -> Tensor:
    """Return a detached alias of `tensor` that requires grad; inside `vmap`, one for each example."""
    vmap = _single_vmap()
    if vmap is None:
        return tensor.detach().requires_grad_()
    with temporarily_pop_interpreter_stack():
        many = vmap.unwrap(tensor).detach().requires_grad_()
    return vmap.wrap(many)


def as_leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the `leaf` of each tensor."""
    vmap = _single_vmap()
    if vmap is None:
        return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with temporarily_pop_interpreter_stack():
        many = {name: vmap.unwrap(tensor).detach().requires_grad_() for name, tensor in tensors.items()}
    return {name: vmap.wrap(tensor) for name, tensor in many.items()}


def is_connected(tensor: Tensor) -> bool:
    """Return whether autograd knows how `tensor` came about: its `requires_grad`, inside `vmap` that of the batch."""
    return underlying(tensor).requires_grad


def underlying(tensor: Tensor) -> Tensor:
    """Return the tensor whose graph autograd records: inside `vmap` the one that holds all examples."""
    return _functorch.get_unwrapped(tensor) if _functorch.is_batchedtensor(tensor) else tensor


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether all entries are finite, a scalar; inside `vmap`, for each example."""
    rest = [tensor for tensor in tensors if tensor.numel()]  # an empty one has no largest entry
    vmap = None if torch.compiler.is_compiling() else _single_vmap()
    if vmap is None:
        return _finite_rows(rest, 1).squeeze(0)
    with temporarily_pop_interpreter_stack():
        of_each = _finite_rows([vmap.unwrap(tensor) for tensor in rest], vmap.size)
    return vmap.wrap(of_each)


def _finite_rows(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """Return for each of `rows` parts along the first dimension whether all is finite, by the largest magnitude."""
    return torch.stack([x.reshape(rows, -1).abs().amax(1) for x in tensors]).isfinite().all(0)


def grads(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Return `torch.autograd.grad` of `outputs` in `inputs`, None where they do not depend on one.

    Args:
        outputs: connected tensors.
        inputs: what `leaf` returned, or tensors computed from that.
        cotangents: one an output; None for scalar outputs.
        create_graph: keep the result connected.
        retain_graph: keep the graph of `outputs`.
    """
    vmap = _single_vmap()
    if vmap is None:
        return list(_grad(outputs, inputs, cotangents, create_graph, retain_graph))
    with temporarily_pop_interpreter_stack():
        whole = [vmap.unwrap(out) for out in outputs]
        bars = [torch.ones_like(out) for out in whole] if cotangents is None else [vmap.unwrap(c) for c in cotangents]
        found = _grad(whole, [_functorch.get_unwrapped(x) for x in inputs], bars, create_graph, retain_graph)
    return [None if g is None else vmap.wrap(g) for g in found]


def slopes(value: Tensor, at: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the derivatives of a scalar in what `leaf` returned, by name; None where it does not depend on one."""
    if not is_connected(value):
        return dict.fromkeys(at)
    return dict(zip(at, grads([value], list(at.values())), strict=True))


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    create_graph: bool,
    retain_graph: bool | None,
) -> Sequence[Tensor | None]:
    return torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )


class _Vmap:
    """The `vmap` that this runs in."""

    def __init__(self, level: int, size: int) -> None:
        self.level, self.size = level, size

    def unwrap(self, tensor: Tensor) -> Tensor:
        """Return the tensor that holds all examples, the first dimension theirs; called below the `vmap`."""
        if not _functorch.is_batchedtensor(tensor):
            return tensor.expand(self.size, *tensor.shape)
        dim = _functorch.maybe_get_bdim(tensor)
        many: Tensor = _functorch.get_unwrapped(tensor)
        return many if dim == 0 else many.movedim(dim, 0)

    def wrap(self, many: Tensor) -> Tensor:
        """Return one example's view of a tensor that holds all of them."""
        one: Tensor = _functorch._add_batch_dim(many, 0, self.level)
        return one


def _single_vmap() -> _Vmap | None:
    if _functorch.maybe_current_level() is None:
        return None
    stack = _functorch.get_interpreter_stack()
    if len(stack) != 1 or stack[0].key() != _functorch.TransformType.Vmap:
        return None
    return _Vmap(stack[0].level(), _functorch.CVmapInterpreterPtr(stack[0]).batchSize())
