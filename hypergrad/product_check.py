"""One Hessian product against a finite difference of the gradient: wrong second derivatives show up."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hypergrad._flat import Layout, Params, as_params, check_params
from hypergrad._functional import Loss, scalar
from hypergrad._random import RandomState, random_state, replaying
from hypergrad._tape import gradient, tape
from hypergrad._untouched import untouched
from hypergrad.solvers._probes import gaussian

_MEANT = (
    "a stop-gradient (.detach(), torch.no_grad()) or a running average of the network's own output or parameters, as "
    "in VAT, MoCo, DINO's centre, or BatchNorm in train and in eval mode"
)
_CULPRITS = (
    "torch.utils.checkpoint inside functional_call (it recomputes with other parameters), "
    "once_differentiable functions, autograd.Functions that keep tensors on ctx instead of "
    "save_for_backward, weight_norm on CPU, spectral_norm in train mode, Embedding(padding_idx=...)"
)
_STEPS = {torch.float64: (1e-4, 1e-6), torch.float32: (3e-2, 3e-3)}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-2}


def check_product(
    lower_loss: Loss,
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    batch: Any = None,
    *,
    name: str = "the lower loss",
) -> None:
    """Return nothing if the second derivatives of `lower_loss` are right, and raise if they are not.

        d/dw <grad_w L, x>  against  (grad L(w + eps x, u) - grad L(w - eps x, u)) / (2 eps)

    and likewise d/du, for one random direction x, in the lower parameters w and the upper ones u. It runs in float64
    where the loss does (parameters, buffers and floating-point data are cast as they are read), else in the dtype
    given. Random draws are replayed; parameters, buffers, modes and generators are left as they were found.

    Where the two differ and the difference quotient has settled (two lengths epsilon agree better with one
    another than with the product), the product is wrong. Kinks, as those of ReLU and max-pooling, and bends far
    sharper than epsilon unsettle a quotient and raise no alarm; in float32 the test is only good for errors of
    several per cent.

    A loss that holds back a part of its own gradient by `.detach()` or `torch.no_grad()` is no error: derivatives take
    that part as a constant, as autograd does. If the products are right once these stop nothing, a warning says so.

    Cost: one product and four gradients; twice that where they differ.

    Args:
        lower_loss: pure function (lower, upper, batch) -> scalar.
        lower: name -> tensor.
        upper: name -> tensor; may be empty.
        batch: passed to `lower_loss`.
        name: what to call the loss in the error.

    Raises:
        ValueError: if a product is wrong, or an operation has no second derivative.

    Example:
        >>> import torch, hypergrad as hg
        >>> def loss(lower, upper, batch):
        ...     return (lower["w"] ** 4 * upper["c"]).sum()
        >>> hg.check_product(loss, {"w": torch.ones(2)}, {"c": torch.ones(2)})
    """
    check_params(lower, "lower")
    check(lower_loss, lower, upper, batch, name, {})


def check(
    lower_loss: Loss,
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    batch: Any,
    name: str,
    resting: Mapping[str, Tensor],
) -> None:
    """Do what `check_product` does, in a direction that leaves entries alone which have no gradient.

    Only those are left alone that `resting` marks, by name: they stay where they are as long as they have none.
    """

    def found_by(loss: Loss) -> tuple[tuple[str, float] | None, torch.dtype]:
        return _find(loss, lower, upper, batch, resting)

    found, dtype = found_by(lower_loss)
    if found is None:
        return
    where, error = found
    difference = f"a Hessian product differs from a finite difference of the gradient by {100 * error:.2g}%"
    if _only_stopped(lower_loss, found_by):
        warnings.warn(
            f"{name}: a .detach() or torch.no_grad() holds back a part of its gradient, so that at {where} "
            f"{difference}. What is held back is taken as a constant, as autograd takes it; for the derivative of the "
            "run as a whole leave the stop-gradient out. Engine(product_check=False) leaves out this check.",
            UserWarning,
            stacklevel=2,
        )
        return
    raise ValueError(
        f"{name}: its second derivative is wrong at {where}: {difference} (in {dtype}), and torch does not notice. "
        f"If the loss holds back a part of its own gradient, by {_MEANT}, then the difference is meant: turn "
        f"this check off, Engine(product_check=False). Other culprits: {_CULPRITS}. Replace the module or "
        "operation, or use a method without second derivatives (hg.FiniteDifference, hg.SAMA, hg.Penalty)."
    )


def _find(
    lower_loss: Loss,
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    batch: Any,
    resting: Mapping[str, Tensor],
) -> tuple[tuple[str, float] | None, torch.dtype]:
    """Return where the product is wrong and by how much, or None; and the dtype of the comparison."""
    constants, known = as_params(lower), as_params(upper)
    drawn = random_state(next(iter(constants.values())).device)
    wide = torch.float64
    try:
        double_batch = pytree.tree_map(_double, batch)
        double_lower = {n: w.to(wide) for n, w in constants.items()}
        double_upper = {n: u.to(wide) for n, u in known.items()}

        def double_loss(w: Params, u: Params, b: Any) -> Tensor:
            with _Double():
                return lower_loss(w, u, b).double()

        return _compare(double_loss, double_lower, double_upper, double_batch, drawn, resting), wide
    except Exception:  # what cannot run in float64 is checked as it is, which raises what there is to raise
        found = _compare(lower_loss, constants, known, batch, drawn, resting)
        if any(torch.finfo(w.dtype).eps > 1e-5 for w in constants.values()):
            found = None  # differences of half-precision gradients are rounding: only the raising was of use
        return found, Layout.of(constants).dtype


def _only_stopped(lower_loss: Loss, found_by: Callable[[Loss], tuple[tuple[str, float] | None, torch.dtype]]) -> bool:
    """Return whether the loss stops gradients, and its products are right where these go through."""
    through = _LetThrough()

    def whole(w: Params, u: Params, b: Any) -> Tensor:
        with through:
            return lower_loss(w, u, b)

    try:
        found, _ = found_by(whole)
    except Exception:  # not made for it: in-place changes of buffers, for one
        return False
    finally:
        through.close()
    return bool(through.passed) and found is None


def _compare(
    lower_loss: Loss,
    lower: Params,
    upper: Params,
    batch: Any,
    drawn: RandomState | None,
    resting: Mapping[str, Tensor],
) -> tuple[str, float] | None:
    """Return where the product is wrong and by how much, or None."""
    layout = Layout.of(lower)
    flat = layout.ravel(lower)
    direction = _direction(layout, flat)

    def loss(w: Tensor, u: Params) -> Tensor:
        with replaying(drawn):
            return scalar(lower_loss(layout.unravel(w), u, batch), "the lower loss")

    def slope(w: Tensor, u: Params) -> Tensor:
        return gradient(lambda x: loss(x, u), w, create_graph=True)

    with untouched(layout.device):
        taped = tape(slope, flat, upper, kind="auto")
        if resting:
            marks = {key: resting.get(key, torch.zeros_like(w)) for key, w in lower.items()}
            rests = (layout.ravel({key: mark.to(flat) for key, mark in marks.items()}) > 0) & (taped.value == 0)
            direction = direction.masked_fill(rests, 0.0)
        product = layout.unravel(taped.pull_lower(direction))
        mixed = taped.pull_upper(direction) if upper else {}
        rounding = 1e3 * torch.finfo(layout.dtype).eps * float(taped.value.norm()) / min(_STEPS[layout.dtype])
    del taped
    quotients = [_quotient(loss, layout, flat, upper, direction, epsilon) for epsilon in _STEPS[layout.dtype]]
    blocks = [("lower", product, [q[0] for q in quotients]), ("upper", mixed, [q[1] for q in quotients])]
    worst: tuple[str, float] | None = None
    for what, exact, estimates in blocks:
        total = max((float(_norm(e)) for e in estimates), default=0.0)
        for key in exact:
            ends = [e[key].to(layout.dtype) for e in estimates if key in e]
            if len(ends) != len(estimates):
                continue
            errors = [float((exact[key].to(layout.dtype) - end).norm()) for end in ends]
            size = max(float(ends[-1].norm()), 1e-2 * total)
            gap, largest = float((ends[0] - ends[1]).norm()), max(float(end.norm()) for end in ends)
            settled = min(errors) > 4 * gap and (gap < 0.5 * largest or gap <= rounding)
            relative = min(errors) / size if size > 0 else 0.0
            if settled and relative > _TOLERANCE[layout.dtype] and (worst is None or relative > worst[1]):
                worst = f"{what}[{key!r}]", relative
    return worst


def _quotient(
    loss: Callable[[Tensor, Params], Tensor],
    layout: Layout,
    flat: Tensor,
    upper: Params,
    direction: Tensor,
    epsilon: float,
) -> tuple[Params, Params]:
    """Return the central difference of the gradients in lower and upper parameters."""
    ends = [_gradients(loss, layout, flat + sign * epsilon * direction, upper) for sign in (1, -1)]

    def difference(ahead: Params, behind: Params) -> Params:
        return {k: (ahead[k] - behind[k]) / (2 * epsilon) for k in ahead if k in behind}

    return difference(ends[0][0], ends[1][0]), difference(ends[0][1], ends[1][1])


def _gradients(
    loss: Callable[[Tensor, Params], Tensor], layout: Layout, flat: Tensor, upper: Params
) -> tuple[Params, Params]:
    """Return the gradients at one point; upper entries that are not read are left out."""
    with untouched(layout.device), torch.enable_grad():
        leaf = flat.detach().requires_grad_()
        leaves = {n: u.detach().requires_grad_() for n, u in upper.items()}
        slope, *others = torch.autograd.grad(loss(leaf, leaves), [leaf, *leaves.values()], allow_unused=True)
    lower = layout.unravel(torch.zeros_like(flat) if slope is None else slope)
    return lower, {n: g for n, g in zip(leaves, others, strict=True) if g is not None}


def _direction(layout: Layout, flat: Tensor) -> Tensor:
    """Return a random direction, each parameter moving in proportion to its size."""
    whole = flat.square().mean().sqrt()
    noise = gaussian(layout.size, seed=0, stream=0, dtype=layout.dtype, device=layout.device)
    scales = [
        torch.maximum(piece.square().mean().sqrt(), 0.1 * whole).clamp(min=1e-3).expand(piece.numel())
        for piece in flat.split_with_sizes(layout.sizes)
        if piece.numel()
    ]
    return noise * torch.cat(scales)


def _norm(params: Params) -> Tensor:
    return torch.stack([p.norm() for p in params.values()]).norm() if params else torch.zeros(())


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


class _Double(TorchFunctionMode):
    """Every operation in the body sees its floating-point tensors in float64, buffers and closed-over data too."""

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        wide_args, wide_kwargs = pytree.tree_map(_double, (args, kwargs or {}))
        return function(*wide_args, **wide_kwargs)


_STOPS = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
_LEAVES = (torch.Tensor.numpy, torch.Tensor.__array__)
"""What refuses tensors that require gradients."""
_SET_GRAD = torch._C._set_grad_enabled
_AROUND = ("torch.autograd.grad_mode", "torch.utils._contextlib")
"""Where `torch.no_grad()` sets the mode for its caller."""


class _LetThrough(TorchFunctionMode):
    """Gradients go through `.detach()` and `torch.no_grad()` of the caller's code in the body."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[Tensor | None] = []
        """What went through; None for a mode that was not set."""

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stops = function in _STOPS and args[0].requires_grad
        if (stops or (function is _SET_GRAD and not args[0])) and _is_users(sys._getframe(1)):
            self.passed.append(args[0].clone() if stops else None)
            return self.passed[-1]
        if function in _LEAVES and args[0].requires_grad:
            args = (args[0].detach(), *args[1:])
        return function(*args, **(kwargs or {}))

    def close(self) -> None:
        """Cut off what went through: the caller's objects may hold it."""
        for tensor in self.passed:
            if tensor is not None:
                with contextlib.suppress(RuntimeError):
                    tensor.detach_()


def _is_users(frame: FrameType | None) -> bool:
    """Return whether a call comes from a user's loss, not from inside an `autograd.Function`.

    `hypergrad.detach` stops what users name.
    """
    while frame is not None and _module(frame) in _AROUND:
        frame = frame.f_back
    name = _module(frame)
    if name != "hypergrad.network" and name.partition(".")[0] in ("torch", "hypergrad"):
        return False
    while frame is not None and _module(frame) != "torch.autograd.function":
        frame = frame.f_back
    return frame is None


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__"))
