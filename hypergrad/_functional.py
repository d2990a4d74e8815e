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
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
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
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        return default
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return default
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required, most = sum(p.default is p.empty for p in positional), len(positional)
    if most <= default:
        return most
    return default if required == default else required  # F.mse_loss takes two, and options after them


def second_name(function: Callable[..., Any]) -> str | None:
    """Return the name of the second parameter of `function`, None where there is none or it cannot be told."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names[1] if len(names) > 1 else None


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
    """The states of torch's CPU generator, of the device's, of `random` and of NumPy; taken by `random_state`."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    python: tuple[Any, ...] | None = None
    numpy: Any = None


def random_state(device: torch.device) -> RandomState | None:
    """Return the generators' present state; None in a compiled region or under fake tensors, which cannot hold one."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return None
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), device, accelerator, random.getstate(), np.random.get_state())


def restore_random_state(state: RandomState | None) -> None:
    """Put the generators back to `state`."""
    if state is None:
        return
    torch.set_rng_state(state.cpu)
    if state.accelerator is not None:
        torch.cuda.set_rng_state(state.accelerator, state.device)
    if state.python is not None:
        random.setstate(state.python)
    if state.numpy is not None:
        np.random.set_state(state.numpy)


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
    """Leave the generators, and the buffers and modes of every module that the body calls, as they were found."""
    if torch.compiler.is_compiling():
        yield
        return
    state = random_state(device)
    try:
        with _StandIns(), _modes_restored():
            yield
    finally:
        restore_random_state(state)


class _StandIns:
    """While open, modules run on copies of their buffers; what one call writes there, the next one finds.

    A copy that a call has written to is copied again for the next call: the graph of the first may have saved it.
    """

    def __init__(self) -> None:
        self._latest: dict[int, tuple[Tensor, Tensor, int]] = {}  # by the buffer's id: it, its copy, the copy's version
        self._copies: dict[int, Tensor] = {}  # by id, so that a copy is known as one
        self._frames: list[list[tuple[nn.Module, str, Tensor]]] = []
        self._inside: set[int] = set()

    def __enter__(self) -> _StandIns:
        self.watch()
        _open.append(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        _open.remove(self)
        self.look_away()
        while self._frames:
            self._restore(self._frames.pop())

    def watch(self) -> None:
        """Be called around every module's forward."""
        hooks = nn.modules.module
        self._handles = (
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        )

    def look_away(self) -> None:
        """Undo `watch`."""
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        swapped: list[tuple[nn.Module, str, Tensor]] = []
        self._frames.append(swapped)
        if id(module) in self._inside:
            return
        for inner in module.modules():
            if id(inner) in self._inside:
                continue
            for name, buffer in inner._buffers.items():
                if buffer is not None and id(buffer) not in self._copies:
                    swapped.append((inner, name, buffer))
                    inner._buffers[name] = self._stand_in(buffer)
        self._inside.update(id(inner) for inner, _, _ in swapped)

    def _leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self._frames:
            self._restore(self._frames.pop())

    def _stand_in(self, buffer: Tensor) -> Tensor:
        known = self._latest.get(id(buffer))
        if known is not None and known[1]._version == known[2]:
            return known[1]
        with torch.no_grad():
            copy = (buffer if known is None else known[1]).detach().clone()
        self._latest[id(buffer)] = (buffer, copy, copy._version)
        self._copies[id(copy)] = copy
        return copy

    def _restore(self, frame: list[tuple[nn.Module, str, Tensor]]) -> None:
        for module, name, buffer in frame:
            self._inside.discard(id(module))
            written = module._buffers.get(name)
            if written is not None and id(written) not in self._copies:  # assigned anew, not written in place
                with torch.no_grad():
                    copy = written.detach().clone()
                self._latest[id(buffer)] = (buffer, copy, copy._version)
                self._copies[id(copy)] = copy
            module._buffers[name] = buffer


class RunsOnClones(nn.Module):
    """A module that is only called with clones in the place of its buffers, and needs no copies of them.

    A compiled call finds the same buffers each time then, and is not compiled again.
    """


_open: list[_StandIns] = []
"""Those whose context has been entered and not left, outermost first."""


def called_modules(function: Callable[[], Any]) -> set[nn.Module]:
    """Return the modules that `function` calls directly, not through others; it runs on copies of their buffers."""
    called: set[nn.Module] = set()
    depth = 0

    def enter(module: nn.Module, _args: Any) -> None:
        nonlocal depth
        if depth == 0:
            called.add(module)
        depth += 1

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal depth
        depth -= 1

    hooks = nn.modules.module
    with _StandIns(), _modes_restored():
        handles = (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        )
        try:
            function()
        finally:
            for handle in handles:
                handle.remove()
    return called


@contextlib.contextmanager
def on_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the body with `modules` on copies of their buffers, without our hooks, which would be compiled too."""
    stand_ins, modules = _StandIns(), [module for module in modules if not isinstance(module, RunsOnClones)]
    found = {inner: inner.training for module in modules for inner in module.modules()}
    patched, nn.Module.train = nn.Module.train, _train  # type: ignore[method-assign]
    for other in _open:
        other.look_away()
    for module in modules:
        stand_ins._enter_module(module, ())
    try:
        yield
    finally:
        for module in reversed(modules):
            stand_ins._leave_module(module, (), None)
        for other in _open:
            other.watch()
        nn.Module.train = patched  # type: ignore[method-assign]
        for inner, training in found.items():
            inner.training = training


_train = nn.Module.train


@contextlib.contextmanager
def _modes_restored() -> Iterator[None]:
    """Undo what `.train()` and `.eval()` do in the body."""
    found: dict[nn.Module, bool] = {}
    original = nn.Module.train

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        found.setdefault(module, module.training)
        return original(module, mode)

    nn.Module.train = train  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.train = original  # type: ignore[method-assign]
        for module, training in found.items():
            module.training = training


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
        refuse_once_differentiable(self._residual)
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


def refuse_once_differentiable(output: Tensor) -> None:
    """Raise a ValueError if the graph of `output` passes a function that can be differentiated once only.

    Autograd prunes the node that would complain wherever no leaf lies behind it, and returns what is left of the sum.
    """
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                "an operation of the lower loss has no second derivative: an autograd.Function marked "
                "@once_differentiable. Write its backward with differentiable operations, or use a method without a "
                "second derivative: hg.FiniteDifference, hg.SAMA or hg.Penalty."
            )
        pending.extend(next_node for next_node, _ in node.next_functions)


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
