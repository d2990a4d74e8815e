"""Lower gradients evaluated once and pulled back as often as asked.

A *residual* is a map F(lower, upper) -> vector over flat lower parameters; for a loss it is the lower gradient. A
`Tape` evaluates it once and then pulls cotangents back through it as often as asked, either to `lower` (a Hessian
product, when F is a gradient) or to `upper` (the mixed product). Two tapes share that interface:

- `AutogradTape` keeps the graph of `autograd.grad(create_graph=True)`; it takes whatever eager autograd takes, and
  serves inside one `vmap` too;
- `TransformTape` holds `torch.func.vjp`; it works inside all `torch.func` transforms and `torch.compile`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad._autograd import as_leaves, by_autograd, grads, is_connected, leaf, underlying
from hypergrad._common_factor import CommonFactor, Traffic
from hypergrad._convolutions import replace_second_derivative
from hypergrad._eager import eagerly, is_eager
from hypergrad._flat import Params
from hypergrad._functional import Residual, in_transform

replace_second_derivative()

TapeKind = Literal["auto", "autograd", "transform"]


def second_order() -> contextlib.AbstractContextManager[Any]:
    """Return a context for what will be differentiated twice: what lacks a second derivative is not chosen there.

    Attention uses its math kernel, and what `torch.compile` has compiled runs eagerly: autograd may leave a compiled
    function's second derivative out of a sum without a word.
    """
    if torch.compiler.is_compiling():
        return sdpa_kernel(SDPBackend.MATH)
    if is_eager() and not any(enabled() for enabled in _KERNELS):
        return contextlib.nullcontext()  # inside another such context, which costs something to enter
    return _second_order()


@contextlib.contextmanager
def _second_order() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), eagerly():
        yield


_KERNELS: tuple[Callable[[], bool], ...] = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)
"""Whether each of the kernels without a second derivative may be chosen."""


def gradient(loss: Callable[[Tensor], Tensor], flat: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of `loss` at `flat`, by autograd where it serves and `torch.func.grad` elsewhere."""
    if not by_autograd():
        grad: Tensor = torch.func.grad(loss)(flat)
        return grad
    with torch.enable_grad():
        point = flat if create_graph and is_connected(flat) else leaf(flat)
        with explained_transform() if in_transform() else contextlib.nullcontext():
            value = loss(point)
        if not is_connected(value):
            raise ValueError(
                "the lower loss does not depend on the lower parameters: its value carries no gradient. "
                "Compute it from the `lower` dict it receives, without .detach(), .item() or torch.no_grad()."
            )
        # A cotangent that asks for its own derivative: without it, a function that can be differentiated once gives a
        # constant wherever the loss is linear behind it, and nothing tells of its second derivative.
        cotangents = [leaf(torch.ones_like(value))] if create_graph else None
        (slope,) = grads([value], [point], cotangents, create_graph=create_graph)
    return torch.zeros_like(point) if slope is None else slope


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """Return `torch.func.vjp`: the value of `function` at `primals`, and its pullback (a tuple, one entry a primal)."""
    value, pullback, *_ = torch.func.vjp(function, *primals)
    return value, pullback


class Tape(ABC):
    """A residual F, evaluated once at (lower, upper) and pulled back as often as asked."""

    value: Tensor
    """F(lower, upper), detached."""

    @abstractmethod
    def pull_lower(self, cotangent: Tensor) -> Tensor:
        """Return (dF/d lower)^T cotangent, a flat vector."""

    def pull_lower_each(self, cotangents: Tensor) -> Tensor:
        """Return (dF/d lower)^T c for each row c of `cotangents`, as rows."""
        return torch.stack([self.pull_lower(cotangent) for cotangent in cotangents.unbind(0)])

    @abstractmethod
    def push_lower(self, tangent: Tensor) -> Tensor:
        """Return (dF/d lower) tangent, by differentiating `pull_lower`, which is linear, in its cotangent."""

    @abstractmethod
    def pull_upper(self, cotangent: Tensor) -> Params:
        """Return (dF/d upper)^T cotangent by name; names that F does not read are left out where that is known."""


class AutogradTape(Tape):
    """The tape of autograd: one retained graph serves both pullbacks."""

    def __init__(self, residual: Residual, lower: Tensor, upper: Params, *, differentiable: bool) -> None:
        """Evaluate `residual`; with `differentiable`, results stay connected to `lower` and `upper`."""
        self._create_graph = differentiable
        with torch.enable_grad(), second_order():
            if differentiable:  # an alias each, so that derivatives are partial even where lower depends on upper
                self._lower = _alias(lower)
                self._upper = {name: _alias(u) for name, u in upper.items()}
            else:
                self._lower = leaf(lower)
                self._upper = as_leaves(upper)
            self._residual = residual(self._lower, self._upper)
        refuse_once_differentiable(self._residual)
        self.value = self._residual.detach()

        self._pushed: tuple[Tensor, Tensor] | None = None

    def pull_lower(self, cotangent: Tensor) -> Tensor:
        """Return (dF/d lower)^T cotangent."""
        (pulled,) = self._pull([self._lower], cotangent)
        return torch.zeros_like(self._lower) if pulled is None else pulled

    def pull_lower_each(self, cotangents: Tensor) -> Tensor:
        """Return (dF/d lower)^T c for each row c, in batched passes where the operations can be batched."""
        first, rest = cotangents[:1], cotangents[1:]
        if len(rest) == 0 or self._create_graph or in_transform() or not is_connected(self._residual):
            return super().pull_lower_each(cotangents)
        try:
            with Traffic() as traffic:
                pulled = self.pull_lower(first[0]).unsqueeze(0)
            together = 1 if _convolves(self._residual) else traffic.together()
            if together == 1:
                return torch.cat([pulled, super().pull_lower_each(rest)])
            with CommonFactor():  # type: ignore[no-untyped-call]
                return torch.cat([pulled, *map(self._pull_batch, torch.split(rest, together))])
        except (RuntimeError, ValueError):  # it cannot be batched; what is wrong otherwise is raised again here
            return super().pull_lower_each(cotangents)

    def _pull_batch(self, cotangents: Tensor) -> Tensor:
        (pulled,) = torch.autograd.grad(
            self._residual, self._lower, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        return cotangents.new_zeros(len(cotangents), self._lower.numel()) if pulled is None else pulled

    def push_lower(self, tangent: Tensor) -> Tensor:
        """Return (dF/d lower) tangent."""
        if self._pushed is None:
            cotangent = leaf(torch.zeros_like(self._residual))
            (pulled,) = explained_grad([self._residual], [self._lower], [cotangent], create_graph=True)
            if pulled is None:
                return torch.zeros_like(self._residual)
            self._pushed = pulled, cotangent
        pulled, cotangent = self._pushed
        (pushed,) = explained_grad([pulled], [cotangent], [tangent], create_graph=self._create_graph)
        assert pushed is not None
        return pushed

    def pull_upper(self, cotangent: Tensor) -> Params:
        """Return (dF/d upper)^T cotangent for the names that F reads."""
        return named(self._upper, self._pull(list(self._upper.values()), cotangent))

    def pull_both(self, cotangent: Tensor) -> tuple[Tensor, Params]:
        """Return (dF/d lower)^T cotangent and (dF/d upper)^T cotangent, by one backward pass."""
        lower, *upper = self._pull([self._lower, *self._upper.values()], cotangent)
        return torch.zeros_like(self._lower) if lower is None else lower, named(self._upper, upper)

    def _pull(self, inputs: list[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
        if not is_connected(self._residual):  # the gradient of a linear loss is constant
            return [None for _ in inputs]
        return explained_grad([self._residual], inputs, [cotangent], create_graph=self._create_graph)


class TransformTape(Tape):
    """The tape of `torch.func.vjp`: one for `lower`, and one for `upper` made when it is first asked for."""

    def __init__(self, residual: Residual, lower: Tensor, upper: Params) -> None:
        """Evaluate `residual` once."""
        self._residual, self._lower, self._upper = residual, lower, upper
        self._push: Callable[[Tensor], tuple[Tensor]] | None = None
        with second_order(), explained_transform():
            self.value, self._pullback = vjp(lambda w: residual(w, upper), lower)

    def pull_lower(self, cotangent: Tensor) -> Tensor:
        """Return (dF/d lower)^T cotangent."""
        pulled: Tensor = self._pullback(cotangent)[0]
        return pulled

    def push_lower(self, tangent: Tensor) -> Tensor:
        """Return (dF/d lower) tangent."""
        if self._push is None:
            _, self._push = vjp(self.pull_lower, torch.zeros_like(self.value))
        pushed: Tensor = self._push(tangent)[0]
        return pushed

    def pull_upper(self, cotangent: Tensor) -> Params:
        """Return (dF/d upper)^T cotangent."""
        with second_order():
            _, pullback = vjp(lambda u: self._residual(self._lower, u), self._upper)
        pulled: Params = pullback(cotangent)[0]
        return pulled


def tape(residual: Residual, lower: Tensor, upper: Params, *, kind: TapeKind, differentiable: bool = False) -> Tape:
    """Return the tape of `residual` at (lower, upper).

    `kind="auto"` takes autograd outside transforms and inside one `vmap`, `torch.func` elsewhere. `differentiable`
    keeps the results connected to `lower` and `upper`, for derivatives of derivatives.
    """
    by_transform = in_transform() if differentiable else not by_autograd()
    if kind == "transform" or (kind == "auto" and by_transform):
        return TransformTape(residual, lower, upper)
    if by_transform:
        raise ValueError(
            "tape='autograd' was asked for inside a torch.func transform or torch.compile, which only "
            "tape='transform' can serve. Leave tape='auto'."
        )
    return AutogradTape(residual, lower, upper, differentiable=differentiable)


def explained_grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> Sequence[Tensor | None]:
    """Return `torch.autograd.grad` of the outputs, None for each input that they do not depend on.

    Raises:
        ValueError: if an operation in the user's code has no second derivative; the message names it.
    """
    try:
        with torch.enable_grad() if create_graph else torch.no_grad():
            return grads(outputs, inputs, cotangents, create_graph=create_graph, retain_graph=retain_graph)
    except RuntimeError as error:
        text = str(error)
        if "not implemented" in text or "once_differentiable" in text:
            raise ValueError(
                f"an operation of the lower loss has no second derivative: {text} Replace that kernel (for attention, "
                "the math backend), or use a method that needs none: hg.FiniteDifference, hg.SAMA or hg.Penalty."
            ) from error
        raise


def _kinds(output: Tensor) -> set[type]:
    """Return the classes of the functions in the graph of `output`; to ask each for its name takes twice as long."""
    seen: set[Any] = set()
    found: set[Any] = {underlying(output).grad_fn} - {None}
    while found:
        seen |= found
        found = {link[0] for node in found for link in node.next_functions} - seen
        found.discard(None)
    return set(map(type, seen))


def _convolves(output: Tensor) -> bool:
    """Return whether the graph holds a convolution, which is slower in a batch of weights than one by one."""
    return any("Convolution" in kind.__name__ for kind in _kinds(output))


def refuse_once_differentiable(output: Tensor) -> None:
    """Raise a ValueError if the graph of `output` passes a function that can be differentiated once only.

    Autograd prunes the node that would complain wherever no leaf lies behind it, and returns what is left of the sum.
    """
    if any(kind.__name__ == "Error" for kind in _kinds(output)):  # a user's function is called ...Backward
        raise ValueError(
            "an operation of the lower loss has no second derivative: an autograd.Function marked "
            "@once_differentiable. Write its backward with differentiable operations, or use a method without a "
            "second derivative: hg.FiniteDifference, hg.SAMA or hg.Penalty."
        )


@contextlib.contextmanager
def explained_transform() -> Iterator[None]:
    """Turn the errors with which `torch.func` refuses code into a ValueError that names the remedy."""
    if torch.compiler.is_compiling():
        yield
        return
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(mark in text for mark in ("functorch transform", "torch.func", "saved tensor hooks", "vmap")):
            raise
        raise ValueError(
            f"the lower loss cannot run inside torch.func transforms: {text} Outside transforms (a plain call of "
            "hg.hypergradient, and .backward() through hg.best_response) it is taped by autograd, which takes it."
        ) from error


def named(template: Params, tensors: Sequence[Tensor | None]) -> Params:
    """Return `tensors` under the names of `template`, leaving out those that are None."""
    return {name: tensor for name, tensor in zip(template, tensors, strict=True) if tensor is not None}


def upper_gradient(loss: Callable[[Params], Tensor], upper: Params) -> Params:
    """Return the gradient of `loss` at `upper` by name; where autograd takes it, without the names it does not read."""
    if not by_autograd():
        whole: Params = torch.func.grad(loss)(upper)
        return whole
    with torch.enable_grad():
        leaves = as_leaves(upper)
        value = loss(leaves)
        if not is_connected(value):
            return {}
        return named(leaves, grads([value], list(leaves.values())))


def add(total: Params, more: Params) -> Params:
    """Return the sum of two dicts by name; a name that one of them lacks counts as zero there."""
    return {**total, **{name: total[name] + value if name in total else value for name, value in more.items()}}


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
