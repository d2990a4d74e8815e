"""The lower run as a record that methods read.

`descend` runs the lower optimizer and records what derivatives need; `solved` and `solved_root` wrap a solution that
came from elsewhere. A `Trajectory` answers two questions: the *residual* whose root the lower solution is (for implicit
methods) and the *step map* that led to it (for unrolled ones). Both are pure functions of flat vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._autograd import as_leaves, by_autograd, leaf, underlying
from hypergrad._calls import under_way
from hypergrad._flat import Layout, Params, as_params, check_params, constant
from hypergrad._functional import Loss, check_signature, in_transform
from hypergrad._random import RandomState, random_state, replaying, same_state
from hypergrad._untouched import Buffers, buffers_at_first, buffers_left, untouched
from hypergrad.fused import fused
from hypergrad.optim import Bound, Optimizer, bind
from hypergrad.step import HyperFunction, Recipe, Recording, States, Step, constant_states, take, takes_step

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptimizer

    from hypergrad.optim import FromTorch

Root = Callable[[Params, Params, Any], Params]


@dataclass(frozen=True)
class Trajectory:
    """A record of how a lower solution came about; made by `descend`, `solved` or `solved_root`.

    Attributes:
        layout: how the lower parameters lie in the flat vectors below.
        end_flat: the lower solution, shape (layout.size,).
        names: the lower names in the caller's order.
        loss: the lower loss; None for a root.
        root: F of `solved_root`; None otherwise.
        steps: the lower steps taken, oldest first; empty where the solution came from elsewhere.
        end_states: the optimizer's states after the last step.
        start: the function of `upper` at which the run began, or None where it began at constants.
        response: a loss used instead of `loss` in the implicit system, or None.
        upper_layout: names and shapes of the upper parameters of the run; None where it came from elsewhere or is an
            engine's.
        batch: the batch of a solution that came from elsewhere.
        random: the generators as that solution's loss, or the start of a run, met them; None for a start without draws.
    """

    layout: Layout
    end_flat: Tensor
    names: tuple[str, ...]
    loss: Loss | None
    root: Root | None = None
    steps: tuple[Step, ...] = ()
    end_states: States = ()
    start: Callable[[Params], Params] | None = None
    response: Loss | None = None
    upper_layout: Layout | None = None
    batch: Any = None
    random: RandomState | None = None

    @property
    def end(self) -> Params:
        """The lower parameters after the run, detached, in the caller's order."""
        return self.named(self.end_flat)

    @property
    def state(self) -> States:
        """The optimizer's state after the run; pass it to the next `descend(state=...)`."""
        return self.end_states

    @property
    def num_steps(self) -> int:
        """The number of lower steps taken."""
        return len(self.steps)

    @property
    def buffers(self) -> Buffers | None:
        """What the last step found in modules' buffers; None where the batch says it, or nothing is known."""
        return self.steps[-1].buffers if self.steps else None

    def named(self, flat: Tensor) -> Params:
        """Return views of `flat` by name, in the caller's order."""
        params = self.layout.unravel(flat)
        return {name: params[name] for name in self.names}

    def samples(self, count: int) -> list[tuple[Any, RandomState | None]]:
        """Return the last `count` batches of the run, each with the random draws of its step."""
        if not self.steps:
            return [(self.batch, self.random)]
        return [(step.batch, step.random) for step in self.steps[-count:]]

    def with_fresh(self, batches: Sequence[Any]) -> Trajectory:
        """Return the record with `batches` in the place of the last step's, as samples at its end."""
        if not batches:
            return self
        last = self.steps[-1]
        return replace(self, steps=(*self.steps[:-1], *(replace(last, batch=batch) for batch in batches)))

    def backwards(self, first: int, upper: Params) -> Iterator[tuple[Step, Tensor, States]]:
        """Yield the steps from the last down to `first`, each with the parameters and optimizer states it began with.

        States that the record left out are recomputed, one segment between recorded states at a time.
        """
        stop = self.num_steps
        while stop > first:
            begin = next((k for k in range(stop - 1, -1, -1) if self.steps[k].flat is not None), None)
            if begin is None:
                raise ValueError(_thinned(first))
            begins = [self._began(begin)]
            for step in self.steps[begin : stop - 1]:
                begins.append(step.advance(*begins[-1], upper))
            for index in range(stop - 1, max(begin, first) - 1, -1):
                yield self.steps[index], *begins[index - begin]
            stop = begin

    def again(self, upper: Params) -> Trajectory:
        """Return the record of the same run, batches and random draws, made at other upper parameters."""
        constants = as_params(upper)
        flat, states = self._began(0)
        if self.start is not None:
            flat = self.layout.ravel(as_params(self.start(constants)))
        steps: list[Step] = []
        for step in self.steps:
            steps.append(replace(step, flat=flat, states=states, taped=None, leaves=None))
            flat, states = step.advance(flat, states, constants)
        return replace(self, steps=tuple(steps), end_flat=flat, end_states=states)

    def replay(self, first: int, upper: Params) -> Tensor:
        """Return the end of the run from step `first` on, recomputed as a differentiable function of `upper`.

        Where the run began at `start(upper)`, the parameters at `first` are that start plus a constant.
        """
        flat, states = self._began(first) if first < self.num_steps else (self.end_flat, self.end_states)
        if self.start is not None:
            begin = self.layout.ravel(self.start(upper))
            flat = begin if first == 0 else flat + (begin - begin.detach())
        for step in self.steps[first:]:
            flat, states = step.advance(flat, states, upper, create_graph=True)
        return flat

    def _began(self, index: int) -> tuple[Tensor, States]:
        step = self.steps[index]
        if step.flat is None or step.states is None:
            raise ValueError(_thinned(index))
        return step.flat, step.states


def _thinned(index: int) -> str:
    return (
        f"the record of this run was thinned and does not reach back to step {index}. Record it for the method that "
        "reads it: descend(..., recording=method.recording(num_steps))."
    )


def descend(
    lower_loss: Loss,
    lower: Mapping[str, Tensor],
    upper: Mapping[str, Tensor],
    *,
    optimizer: Optimizer | FromTorch | Bound | TorchOptimizer,
    batches: Iterable[Any],
    state: States | None = None,
    hyper: Mapping[str, HyperFunction] | None = None,
    start: Callable[[Params], Params] | None = None,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    project: Callable[[Params], Params] | None = None,
    response: Loss | None = None,
    recording: Recording | None = None,
) -> Trajectory:
    r"""Return the record of an optimizer's run on the lower loss, one step a batch.

    .. math:: (w_{k+1}, s_{k+1}) = \Phi(w_k, s_k, \nabla_w L(w_k, u; b_k)), \qquad k = 0 \dots K-1

    with lower parameters w, upper parameters u, optimizer states s and batches b. Nothing is taped while it runs: one
    gradient of `lower_loss` a step, and K references to parameters and states are kept (see `recording`). The caller's
    tensors, modules, `.grad` and random state are left as they were found.

    Args:
        lower_loss: pure function (lower, upper, batch) -> scalar.
        lower: initial lower parameters, name -> tensor of any shape.
        upper: upper parameters, name -> tensor of any shape.
        optimizer: one of `hypergrad.optim`, `hypergrad.optim.from_torch(...)`, or a `torch.optim` object, whose
            parameter groups and state are read and left alone.
        batches: one entry per step, passed to `lower_loss` as they are; `[None] * 100` for 100 full-batch steps.
        state: `traj.state` of an earlier run, to continue its momentum.
        hyper: optimizer hyperparameters as functions of the upper parameters, `{"lr": fn}`; `fn(upper)` or
            `fn(upper, step)` returns a scalar, or a dict with one tensor for each lower parameter.
        start: function of the upper parameters that returns the lower parameters at which the run begins, instead of
            `lower`, which then gives names and shapes only; hypergradients flow through it.
        clip_norm: bound on the norm of each step's gradient, as `torch.nn.utils.clip_grad_norm_` applies it.
        clip_value: bound on its entries, as `clip_grad_value_` applies it.
        project: function of the parameters applied after each step (simplex, box).
        response: a loss used instead of `lower_loss` by implicit methods, in curvature and mixed partial alike.
        recording: which states the record keeps (default: every step's); `method.recording(num_steps)` asks for just
            what a method reads.

    Returns:
        Trajectory: `.end` the lower parameters after the run, `.state` the optimizer's state.

    Raises:
        ValueError: for malformed parameters, a `batches` that is empty or refills tensors that it has yielded, an
            unknown `hyper` name, a loss that is not a scalar.

    Example:
        >>> import torch, hypergrad as hg
        >>> def loss(lower, upper, batch):
        ...     return ((lower["w"] - upper["c"]) ** 2).sum()
        >>> lower, upper = {"w": torch.zeros(2)}, {"c": torch.ones(2)}
        >>> traj = hg.descend(loss, lower, upper, optimizer=hg.optim.SGD(lr=0.25), batches=[None] * 3)
        >>> traj.end["w"]
        tensor([0.8750, 0.8750])
    """
    check_params(lower, "lower")
    check_params(upper, "upper")
    for option, bound in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if bound is not None and not (isinstance(bound, int | float) and bound > 0):
            raise ValueError(f"{option} must be a positive number, got {bound!r}; leave it None for no clipping.")
    _check_functions(lower_loss=lower_loss, start=start, project=project, response=response)
    _check_functions(**{f"hyper[{name!r}]": function for name, function in (hyper or {}).items()})
    if recording is not None and not isinstance(recording, Recording):
        raise ValueError(f"recording must come from method.recording(num_steps), got {recording!r}.")
    batches = _as_list(batches)
    constants = as_params(upper)
    initial = as_params(lower)
    bound_optimizer = bind(optimizer, lower)
    bound_optimizer.check_hyper(hyper or {})
    layout = Layout.of(initial, names=bound_optimizer.names)
    recipe = Recipe(lower_loss, layout, bound_optimizer, dict(hyper or {}), clip_norm, clip_value, project)
    recording = recording or Recording()
    steps: list[Step] = []
    with under_way(), untouched(layout.device):
        drawn = random_state(layout.device)
        flat = constant(layout.record(initial if start is None else _started(start, constants, initial)))
        random = random_state(layout.device)
        if start is None or same_state(drawn, random):
            drawn = None
        else:
            start = partial(_started_again, start, drawn)
        states = bound_optimizer.init(flat) if state is None else _continued(state, bound_optimizer, flat)
        if in_transform():  # even zeros belong to the innermost transform, which may end before they are read
            states = constant_states(states)
        whole = fused(recipe, states, constants, recording.compile) if recording.taped_from is None else None
        advance = None if whole is None else whole.advance
        above = as_leaves(constants) if recording.taped_from is not None and by_autograd() else None
        responds_at_random = response is not None and _draws(response, layout, flat, constants, batches[-1])
        for index, batch in enumerate(batches):
            replayed = index >= recording.first or index == len(batches) - 1
            step = Step(recipe, batch, index, random, buffers=buffers_left() if replayed else None)
            step, flat, states = take(step, flat, states, constants, recording, len(batches), advance, above)
            random = random_state(layout.device)
            if same_state(step.random, random):
                step = replace(step, recipe=recipe, random=step.random if responds_at_random else None)
            steps.append(step)
        if first := buffers_at_first():
            steps = [s if s.buffers is None else replace(s, buffers={**first, **s.buffers}) for s in steps]
    return Trajectory(
        layout=layout,
        end_flat=flat,
        names=tuple(initial),
        loss=lower_loss,
        steps=tuple(steps),
        end_states=states,
        start=start,
        response=response,
        upper_layout=Layout.of(constants, what="upper"),
        random=drawn,
    )


def solved(
    lower_loss: Loss, lower: Mapping[str, Tensor], batch: Any = None, *, response: Loss | None = None
) -> Trajectory:
    """Return the record of a lower solution that came from elsewhere: a minimizer of `lower_loss`.

    Implicit methods need no more than this; methods that differentiate a run refuse it. It costs nothing.

    Args:
        lower_loss: pure function (lower, upper, batch) -> scalar, stationary in `lower` at the solution.
        lower: the solution, name -> tensor.
        batch: passed to `lower_loss` as it is.
        response: a loss used instead of `lower_loss` in the implicit system.

    Example:
        >>> import torch, hypergrad as hg
        >>> def loss(lower, upper, batch):
        ...     return ((lower["w"] - upper["c"]) ** 2).sum()
        >>> traj = hg.solved(loss, {"w": torch.ones(2)})
        >>> upper_loss = lambda lower, upper, batch: (lower["w"] ** 2).sum()
        >>> hg.hypergradient(upper_loss, traj, {"c": torch.ones(2)}, method=hg.Implicit(hg.Exact())).grad["c"]
        tensor([2., 2.])
    """
    return _given(lower, batch, loss=lower_loss, response=response)


def solved_root(F: Root, lower: Mapping[str, Tensor], batch: Any = None) -> Trajectory:  # noqa: N803 - the contract's name
    """Return the record of a root of F(lower, upper, batch) = 0 that came from elsewhere.

    Fixed points T(w) = w are roots of F = w - T(w); projected maps likewise. The Jacobian dF/d lower need not be
    symmetric, so the solver must be one that does not assume it: `GMRES`, `Exact`, `Neumann` or `SciPy("gmres")`.

    Args:
        F: pure function (lower, upper, batch) -> dict named and shaped like `lower`.
        lower: the root, name -> tensor.
        batch: passed to `F` as it is.
    """
    return _given(lower, batch, root=F)


def _given(
    lower: Mapping[str, Tensor],
    batch: Any,
    *,
    loss: Loss | None = None,
    root: Root | None = None,
    response: Loss | None = None,
) -> Trajectory:
    check_params(lower, "lower")
    _check_functions(**({"lower_loss": loss, "response": response} if root is None else {"F": root}))
    layout = Layout.of(as_params(lower))
    return Trajectory(
        layout=layout,
        end_flat=constant(layout.record(as_params(lower))),
        names=tuple(lower),
        loss=loss,
        root=root,
        response=response,
        batch=batch,
        random=random_state(layout.device),
    )


def _as_list(batches: Iterable[Any]) -> list[Any]:
    scalar_tensor = isinstance(batches, Tensor) and batches.dim() == 0
    if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable) or scalar_tensor:
        raise ValueError(
            f"batches must be a sequence with one entry per lower step, got {type(batches).__name__}. "
            "For one batch b and K steps pass [b] * K."
        )
    listed = _unmoved(batches)
    if not listed:
        raise ValueError(
            "batches is empty: the lower level would take no step. Pass one entry per step, or hg.solved(...) "
            "for a solution that came from elsewhere."
        )
    return listed


def _unmoved(batches: Iterable[Any]) -> list[Any]:
    """Return `batches` as a list; a ValueError if one was changed in place once the next was asked for."""
    if isinstance(batches, list | tuple | repeat | Tensor) or torch.compiler.is_compiling():
        return list(batches)
    listed: list[Any] = []
    yielded: list[tuple[int, Tensor, int]] = []
    for index, batch in enumerate(batches):
        listed.append(batch)
        leaves = [underlying(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
        yielded += [(index, x, x._version) for x in leaves if not x.is_inference() and not x._is_view()]
    moved = [index for index, x, version in yielded if x._version != version]
    if moved:
        raise ValueError(
            f"batches: a tensor of batch {moved[0]} was changed in place after it was yielded, and each step keeps its "
            "batch until it is differentiated. Yield new tensors, batch.clone() for instance."
        )
    return listed


_ARGUMENTS = {"project": "lower", **dict.fromkeys(("lower_loss", "response", "F"), "lower, upper, batch")}
"""What `descend`'s functions are called with; the others are functions of `upper`."""


def _check_functions(**functions: Any) -> None:
    """Raise a ValueError that names the first argument that is neither a function nor absent."""
    for name, function in functions.items():
        absent = function is None and name not in ("lower_loss", "F")
        if not callable(function) and not absent:
            raise ValueError(f"{name} must be a function, got {type(function).__name__}.")
        if callable(function) and not torch.compiler.is_compiling():
            check_signature(function, _ARGUMENTS.get(name, "upper, step" if takes_step(function) else "upper"), name)


def _continued(state: Any, optimizer: Bound, flat: Tensor) -> States:
    """Return `state` if it is one of this optimizer on these parameters."""
    fresh = optimizer.init(flat)
    fits = isinstance(state, Sequence) and len(state) == len(fresh)
    fits = fits and all(isinstance(s, Mapping) and set(s) == set(f) for s, f in zip(state, fresh, strict=True))
    if not fits:
        kept = [sorted(f) for f in fresh]
        raise ValueError(
            f"state does not belong to this optimizer, which keeps {kept} for its groups. Pass traj.state of a run "
            "with the same optimizer and parameters, or None."
        )
    for given, expected in zip(state, fresh, strict=True):
        for key, value in expected.items():
            if isinstance(value, Tensor) and key != "step" and given[key].shape != value.shape:
                raise ValueError(
                    f"state[{key!r}] has shape {tuple(given[key].shape)}, this run needs {tuple(value.shape)}. Pass "
                    "traj.state of a run on the same parameters, or None."
                )
    return tuple(state)


def _started(start: Callable[[Params], Params], upper: Params, template: Params) -> Params:
    begun = start(upper)
    Layout.of(template).check_like(begun, "the result of start")
    return as_params(begun)


def _draws(loss: Loss, layout: Layout, flat: Tensor, upper: Params, batch: Any) -> bool:
    """Return whether `loss` draws random numbers; the generators go on from where they were."""
    before = random_state(layout.device)
    with replaying(before), torch.enable_grad():
        loss(layout.unravel(leaf(flat)), upper, batch)
        return not same_state(before, random_state(layout.device))


def _started_again(start: Callable[[Params], Params], drawn: RandomState | None, upper: Params) -> Params:
    """Return the start with the random draws of the first time."""
    with replaying(drawn):
        return start(upper)
