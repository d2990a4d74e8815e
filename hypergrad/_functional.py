"""Pure evaluation of user code: tapes, replayed random draws, and modules left as they were found.

A *residual* is a map F(lower, upper) -> vector over flat lower parameters; for a loss it is the lower gradient. A
`Tape` evaluates it once and then pulls cotangents back through it as often as asked, either to `lower` (a Hessian
product, when F is a gradient) or to `upper` (the mixed product). Two tapes share that interface:

- `AutogradTape` keeps the graph of `autograd.grad(create_graph=True)`; it takes whatever eager autograd takes;
- `TransformTape` holds `torch.func.vjp`; it is the one that works inside `torch.func` transforms and `torch.compile`.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypergrad._flat import Params

Residual = Callable[[Tensor, Params], Tensor]
Loss = Callable[[Params, Params, Any], Tensor]
TapeKind = Literal["auto", "autograd", "transform"]


def in_transform() -> bool:
    """Return whether this runs inside `torch.func` transforms or a compiled region, where nothing may be read back."""
    return torch.compiler.is_compiling() or _functorch.maybe_current_level() is not None


def arity(function: Callable[..., Any], default: int) -> int:
    """Return how many positional arguments `function` takes, `default` where that cannot be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return default
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return default
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return default if len(required) <= default <= len(positional) else len(required)


def scalar(value: Any, what: str) -> Tensor:
    """Return `value` if it is a scalar floating-point tensor, else raise a ValueError that names `what`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must return a scalar Tensor, got {type(value).__name__}.")
    if value.dim() != 0:
        raise ValueError(
            f"{what} must return a scalar (0-dim) Tensor, got shape {tuple(value.shape)}. Reduce it with .mean() or "
            f".sum()."
        )
    if not value.is_floating_point():
        raise ValueError(f"{what} must return a floating-point scalar, got dtype {value.dtype}.")
    return value


# --- random draws ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomState:
    """The state of the CPU generator and of the device's, taken by `random_state`."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None


def random_state(device: torch.device) -> RandomState | None:
    """Return the generators' present state; None in a compiled region or under fake tensors, which cannot hold one."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return None
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), device, accelerator)


def restore_random_state(state: RandomState | None) -> None:
    """Put the generators back to `state`."""
    if state is not None:
        torch.set_rng_state(state.cpu)
        if state.accelerator is not None:
            torch.cuda.set_rng_state(state.accelerator, state.device)


@contextlib.contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    """Run the body on the draws that follow `state`, then continue the generators where they were."""
    if state is None:
        yield
        return
    present = random_state(state.device)
    restore_random_state(state)
    try:
        yield
    finally:
        restore_random_state(present)


@contextlib.contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Leave the generators, and the buffers and mode of every module that the body calls, as they were found."""
    if in_transform():
        yield
        return
    found: dict[nn.Module, tuple[bool, list[tuple[Tensor, Tensor]]]] = {}

    def remember(module: nn.Module, _args: Any) -> None:
        if module not in found:
            buffers = [(b, b.detach().clone()) for b in module.buffers(recurse=False)]
            found[module] = (module.training, buffers)

    state = random_state(device)
    handle = nn.modules.module.register_module_forward_pre_hook(remember)
    try:
        yield
    finally:
        handle.remove()
        restore_random_state(state)
        with torch.no_grad():
            for module, (training, buffers) in found.items():
                module.training = training
                for buffer, value in buffers:
                    buffer.copy_(value)


# --- gradients and tapes ---------------------------------------------------------------------------------------------


def second_order() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which attention uses its math kernel, the only one that has a second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def gradient(loss: Callable[[Tensor], Tensor], flat: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of `loss` at `flat`, by autograd outside transforms and `torch.func.grad` inside."""
    if in_transform():
        grad: Tensor = torch.func.grad(loss)(flat)
        return grad
    with torch.enable_grad():
        point = flat if create_graph and flat.requires_grad else flat.detach().requires_grad_()
        value = loss(point)
        if not value.requires_grad:
            raise ValueError(
                "the lower loss does not depend on the lower parameters: its value carries no gradient. "
                "Compute it from the `lower` dict it receives, without .detach(), .item() or torch.no_grad()."
            )
        (grad,) = torch.autograd.grad(value, point, create_graph=create_graph, materialize_grads=True)
    return grad


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

    @abstractmethod
    def push_lower(self, tangent: Tensor) -> Tensor:
        """Return (dF/d lower) tangent, by differentiating `pull_lower`, which is linear, in its cotangent."""

    @abstractmethod
    def pull_upper(self, cotangent: Tensor) -> Params:
        """Return (dF/d upper)^T cotangent by name; names that F does not read are left out where that is known."""


class AutogradTape(Tape):
    """The tape of eager autograd: one retained graph serves both pullbacks."""

    def __init__(self, residual: Residual, lower: Tensor, upper: Params, *, differentiable: bool) -> None:
        """Evaluate `residual`; with `differentiable`, results stay connected to `lower` and `upper`."""
        self._create_graph = differentiable
        with torch.enable_grad(), second_order():
            if differentiable:  # an alias each, so that derivatives are partial even where lower depends on upper
                self._lower = _alias(lower)
                self._upper = {name: _alias(u) for name, u in upper.items()}
            else:
                self._lower = lower.detach().requires_grad_()
                self._upper = {name: u.detach().requires_grad_() for name, u in upper.items()}
            self._residual = residual(self._lower, self._upper)
        self.value = self._residual.detach()

        self._pushed: tuple[Tensor, Tensor] | None = None

    def pull_lower(self, cotangent: Tensor) -> Tensor:
        """Return (dF/d lower)^T cotangent."""
        (pulled,) = self._pull([self._lower], cotangent)
        return torch.zeros_like(self._lower) if pulled is None else pulled

    def push_lower(self, tangent: Tensor) -> Tensor:
        """Return (dF/d lower) tangent."""
        if self._pushed is None:
            cotangent = torch.zeros_like(self._residual).requires_grad_()
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

    def _pull(self, inputs: list[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
        if not self._residual.requires_grad:  # the gradient of a linear loss is constant
            return [None for _ in inputs]
        return explained_grad([self._residual], inputs, [cotangent], create_graph=self._create_graph)


class TransformTape(Tape):
    """The tape of `torch.func.vjp`: one for `lower`, and one for `upper` made when it is first asked for."""

    def __init__(self, residual: Residual, lower: Tensor, upper: Params) -> None:
        """Evaluate `residual` once."""
        self._residual, self._lower, self._upper = residual, lower, upper
        self._push: Callable[[Tensor], tuple[Tensor]] | None = None
        with second_order():
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

    `kind="auto"` takes eager autograd outside transforms and `torch.func` inside. `differentiable` keeps the results
    connected to `lower` and `upper`, for derivatives of derivatives.
    """
    if kind == "transform" or (kind == "auto" and in_transform()):
        return TransformTape(residual, lower, upper)
    if in_transform():
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
            return torch.autograd.grad(
                outputs, inputs, cotangents, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
            )
    except RuntimeError as error:
        text = str(error)
        if "not implemented" in text or "once_differentiable" in text:
            raise ValueError(
                f"an operation of the lower loss has no second derivative: {text} Replace that kernel (for attention, "
                "the math backend), or use a method that needs none: hg.FiniteDifference, hg.SAMA or hg.Penalty."
            ) from error
        raise


def named(template: Params, tensors: Sequence[Tensor | None]) -> Params:
    """Return `tensors` under the names of `template`, leaving out those that are None."""
    return {name: tensor for name, tensor in zip(template, tensors, strict=True) if tensor is not None}


def upper_gradient(loss: Callable[[Params], Tensor], upper: Params) -> Params:
    """Return the gradient of `loss` at `upper` by name; outside transforms, names it does not read are left out."""
    if in_transform():
        grads: Params = torch.func.grad(loss)(upper)
        return grads
    with torch.enable_grad():
        leaves = {name: u.detach().requires_grad_() for name, u in upper.items()}
        value = loss(leaves)
        if not value.requires_grad:
            return {}
        return named(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True))


def add(total: Params, more: Params) -> Params:
    """Return the sum of two dicts by name; a name that one of them lacks counts as zero there."""
    return {**total, **{name: total[name] + value if name in total else value for name, value in more.items()}}


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
