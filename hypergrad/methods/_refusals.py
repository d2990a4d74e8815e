"""What methods refuse, in one place: each message names the option or the run, and what to use instead."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._functional import in_transform
from hypergrad.methods.base import Method
from hypergrad.trajectory import Trajectory


def check_option(holds: bool, owner: str, option: str, value: Any, expected: str) -> None:
    """Raise a ValueError that names the option unless `holds`."""
    if not holds:
        raise ValueError(f"{owner}: {option} must be {expected}, got {value!r}.")


def check_number(owner: str, option: str, value: Any, *, zero: bool = False, none: bool = False) -> None:
    """Raise a ValueError unless `value` is a finite number above 0 (or 0, or None, where these are allowed)."""
    if (none and value is None) or (zero and isinstance(value, Tensor)):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    expected = f"{'None or ' if none else ''}a finite number {'>=' if zero else '>'} 0"
    check_option(number and (value >= 0 if zero else value > 0), owner, option, value, expected)


def check_run(method: Method, trajectory: Trajectory, why: str) -> None:
    """Raise a ValueError unless the lower solution is the end of a recorded run."""
    if not trajectory.steps:
        raise ValueError(
            f"{type(method).__name__} {why}, but this lower solution came from elsewhere (solved or solved_root). "
            "Record a run with hg.descend(...), or use hg.Implicit, which needs the solution only."
        )


def check_loss(method: Method, trajectory: Trajectory) -> None:
    """Raise a ValueError unless the lower level is a minimization."""
    if trajectory.root is not None:
        raise ValueError(
            f"{type(method).__name__} needs a lower loss; this lower level is the root of a map (solved_root). "
            "Use hg.Implicit with hg.GMRES or hg.Exact."
        )


def check_fixed_point(
    method: Method, trajectory: Trajectory, upper: Params, *, decoupled: Literal["refuse", "ignore"] = "ignore"
) -> None:
    """Raise a ValueError if the run's fixed point is not the stationarity of loss and coupled weight decay."""
    if not trajectory.steps:
        return
    last = trajectory.steps[-1]
    recipe = last.recipe
    name = type(method).__name__
    if recipe.project is not None:
        raise ValueError(
            f"{name}: the lower run applies `project`, so its solution is not a stationary point of the loss. Use "
            "hg.Unrolled, or hg.solved_root(F, ...) with F = w - project(w - step * gradient) and hg.GMRES."
        )
    unmoved = sorted(set(recipe.hyper) - {"weight_decay"})
    if unmoved and _depends_on_upper(recipe.hyper_values, unmoved, upper, last.index):
        raise ValueError(
            f"{name}: the optimizer's {unmoved} as a function of the upper parameters does not move the fixed point "
            "of the lower level, so its derivative here would be zero. Use hg.Unrolled or hg.ForwardUnrolled."
        )
    apart = recipe.optimizer.decay(recipe.hyper_values(upper, last.index)).decoupled
    is_decoupled = isinstance(apart, Tensor) or apart != 0
    moved = is_decoupled and "weight_decay" in recipe.hyper
    if moved and _depends_on_upper(recipe.hyper_values, ["weight_decay"], upper, last.index):
        raise ValueError(
            f"{name}: the optimizer's decoupled weight decay (AdamW) is a function of the upper parameters; how it "
            "moves the fixed point depends on the preconditioner. Use hg.Unrolled, or coupled decay (Adam with "
            "weight_decay)."
        )
    if decoupled == "refuse" and is_decoupled:
        raise ValueError(
            f"{name}: the lower optimizer has decoupled weight decay (AdamW), whose fixed point depends on the "
            "optimizer's preconditioner. Use coupled decay (Adam with weight_decay, or a penalty in the loss), "
            "hg.Unrolled, or pass decoupled='ignore' to leave the decay out."
        )


def check_start(method: Method, trajectory: Trajectory, upper: Params, read: Params) -> None:
    """Raise a ValueError if the run began at a function of `upper` that the method ignores and the loss reads not.

    Args:
        method: ignores where the run begins.
        trajectory: the run.
        upper: the upper parameters.
        read: what the lower loss reads of them, by name. Inside transforms, where that is not known, all or nothing.
    """
    if trajectory.start is None:
        return
    of_engine = trajectory.upper_layout is None  # its graph asks for a read of each problem, not of each tensor
    known = {_problem_of(name) for name in read} if of_engine else set(read)
    unread = {name: u for name, u in upper.items() if (_problem_of(name) if of_engine else name) not in known}
    if in_transform():
        lost = [] if read else list(upper)
    else:
        lost = _start_reads(trajectory, upper, unread)
    if lost:
        raise ValueError(
            f"{type(method).__name__} ignores where the lower run begins, which is a function of {lost} here, and the "
            "lower loss does not read them: their hypergradient would be zero. Use hg.Unrolled (truncate=0 is FOMAML), "
            "or add a proximal term that reads them to the lower loss (iMAML)."
        )


def _problem_of(name: str) -> str:
    """Return which of an engine's problems an upper name belongs to."""
    return name.split(".", 1)[0]


def _start_reads(trajectory: Trajectory, upper: Params, unread: Params) -> list[str]:
    """Return which of the names `unread` the run's start depends on."""
    assert trajectory.start is not None
    leaves = {name: u.detach().requires_grad_() for name, u in unread.items()}
    if not leaves:
        return []
    with torch.enable_grad():
        begun = [x for x in trajectory.start({**upper, **leaves}).values() if x.requires_grad]
    if not begun:
        return []
    found = torch.autograd.grad(begun, list(leaves.values()), [torch.zeros_like(x) for x in begun], allow_unused=True)
    return [name for name, slope in zip(leaves, found, strict=True) if slope is not None]


def check_initial(method: Method, state: Tensor | None, shape: tuple[int, ...], *, warm_start: bool) -> None:
    """Raise a ValueError if `state` cannot warm-start this solve, whose state has `shape`."""
    if state is None:
        return
    if not warm_start:
        raise ValueError(
            f"{type(method).__name__}: state was given, but warm_start is False. Construct it with warm_start=True."
        )
    if not isinstance(state, Tensor):
        raise ValueError(f"{type(method).__name__}: state must be the h.state of an earlier call, got {state!r}.")
    if state.shape != shape:
        raise ValueError(
            f"{type(method).__name__}: state has shape {tuple(state.shape)}, this solve needs {tuple(shape)}. "
            "Pass the h.state of a call on the same lower parameters, or None."
        )


def refuse_state(method: Method, state: Tensor | None) -> None:
    """Raise a ValueError if a warm start was given to a method that keeps none."""
    if state is not None:
        raise ValueError(
            f"{type(method).__name__} solves nothing iteratively and takes no warm start: pass state=None."
        )


def _depends_on_upper(hyper_values: Any, names: list[str], upper: Params, index: int) -> bool:
    if in_transform():
        return True
    leaves = {name: u.detach().requires_grad_() for name, u in upper.items()}
    with torch.enable_grad():
        values = hyper_values(leaves, index)
    return any(_requires_grad(values[name]) for name in names)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_requires_grad(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_requires_grad(v) for v in value)
    return isinstance(value, Tensor) and value.requires_grad
