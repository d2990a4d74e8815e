"""The condition that defines a lower solution, linearized once and multiplied with as often as asked.

For an optimizer's run it is the stationarity of loss *and* optimizer,

    F(w, u) = s grad_w L(w, u) + d w = 0

with s = -1 under `maximize`, else 1, and d the coupled weight decay of each parameter group. For `solved` d = 0; for
`solved_root` F is the caller's. The best response then satisfies dF/dw dw*/du = -dF/du.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hypergrad._compiled import Compile, CompiledTape, compiled_gradient
from hypergrad._flat import Layout, Params
from hypergrad._functional import Loss, Residual, in_transform, scalar
from hypergrad._random import RandomState, replaying
from hypergrad._tape import Tape, TapeKind, gradient, tape
from hypergrad.averaged import Averaged, PartsTape, plain, ranks_of
from hypergrad.composite import Composite
from hypergrad.loss_scale import check_compile
from hypergrad.operators import Function, Operator
from hypergrad.trajectory import Trajectory

Curvature = Literal["hessian", "gauss_newton"]
Sample = tuple[Any, RandomState | None]


@dataclass(frozen=True)
class Responding:
    """The part of the lower parameters that responds to `upper`; the others are constants at the solution."""

    layout: Layout
    whole: Layout
    constants: Params

    @staticmethod
    def of(trajectory: Trajectory, over: Sequence[str] | None) -> Responding:
        """Return all of the lower parameters, or those whose names begin with one of the prefixes in `over`."""
        whole = trajectory.layout
        if over is None:
            return Responding(whole, whole, {})
        chosen = [name for name in whole.names if any(name.startswith(prefix) for prefix in over)]
        unmatched = [prefix for prefix in over if not any(name.startswith(prefix) for name in whole.names)]
        if unmatched:
            raise ValueError(
                f"over={list(over)}: no lower parameter begins with {unmatched}; they are {list(whole.names)}."
            )
        params = whole.unravel(trajectory.end_flat)
        constants = {name: p for name, p in params.items() if name not in chosen}
        return Responding(Layout.of(params, names=chosen), whole, constants)

    def select(self, flat: Tensor) -> Tensor:
        """Return the responding part of a vector over all lower parameters."""
        return flat if not self.constants else self.layout.ravel(self.whole.unravel(flat))

    def complete(self, part: Tensor) -> Params:
        """Return all lower parameters by name: `part`, and the constants."""
        return {**self.layout.unravel(part), **self.constants}


class Linearization:
    """F linearized at a lower solution: `operator` is (dF/dw)^T and `mixed(x)` is (dF/du)^T x.

    Attributes:
        value: F at the solution, a flat vector; its norm says how stationary the solution is.
        operator: (dF/dw)^T as a linear operator (its Gauss-Newton part, where asked for).
        responding: which lower parameters the vectors above range over.
    """

    def __init__(self, tape: Tape, operator: Operator, responding: Responding) -> None:
        """Hold the tape of F and the operator that goes with it."""
        self._tape = tape
        self.operator = operator
        self.responding = responding

    @property
    def value(self) -> Tensor:
        """F at the solution; of an average over ranks, free once a product has been taken."""
        return self._tape.value

    def mixed(self, x: Tensor) -> Params:
        """Return (dF/du)^T x, named like `upper`."""
        return self._tape.pull_upper(x)


def linearize(
    trajectory: Trajectory,
    upper: Params,
    *,
    batches: int = 1,
    over: Sequence[str] | None = None,
    curvature: Curvature = "hessian",
    kind: TapeKind = "auto",
    at: Tensor | None = None,
    compile: Compile = False,
) -> Linearization:
    """Return the stationarity condition of `trajectory` linearized at its end.

    One gradient of the lower loss per batch; then each product with `operator`, and `mixed`, re-uses that tape.

    Args:
        trajectory: the lower run or solution.
        upper: the upper parameters it was made with.
        batches: how many of the run's last batches are averaged.
        over: prefixes of the lower names that respond; None for all.
        curvature: "hessian", or "gauss_newton" for a `Composite` loss.
        kind: which tape; "auto" takes `torch.func` inside transforms and eager autograd elsewhere.
        at: a lower solution connected to `upper`; the products then stay differentiable in both.
        compile: compile the gradient and its products; for a loss, not a root, under curvature "hessian".
    """
    responding = Responding.of(trajectory, over)
    samples = samples_of(trajectory, batches)
    point = responding.select(trajectory.end_flat if at is None else at)
    loss = trajectory.response or trajectory.loss
    if isinstance(loss, Averaged) and at is None and not in_transform():
        condition_tape: Tape = _parts_tape(trajectory, responding, samples, loss, point, upper, compile)
    elif compile:
        compiled = compiled_stationarity(trajectory, responding, samples, compile)
        condition_tape = CompiledTape(compiled, point, upper)
    else:
        condition = stationarity(trajectory, responding, samples)
        condition_tape = tape(condition, point, upper, kind=kind, differentiable=at is not None)
    known = partial(_known_diagonal, trajectory, responding, samples, point, upper, kind)
    if curvature == "gauss_newton":
        operator = _gauss_newton(trajectory, responding, samples, point, upper, kind, known)
    else:
        operator = _jacobian(condition_tape, trajectory, responding, known)
    return Linearization(condition_tape, operator, responding)


def _parts_tape(
    trajectory: Trajectory,
    responding: Responding,
    samples: Sequence[Sample],
    loss: Averaged,
    point: Tensor,
    upper: Params,
    compile: Compile,
) -> PartsTape:
    """Return the tape of F for a lower loss that is an average."""
    one = replace(trajectory, loss=loss.loss, response=None)

    def residual(part: Any) -> Residual:
        if compile:
            return compiled_stationarity(one, responding, [(part, None)], compile)
        return stationarity(one, responding, [(part, None)])

    residuals = [(random, [residual(part) for part in loss.parts(batch)]) for batch, random in samples]
    return PartsTape(residuals, point, upper, loss, CompiledTape if compile else None)


def stationarity(trajectory: Trajectory, responding: Responding, samples: Sequence[Sample]) -> Residual:
    """Return F as a pure function (responding part of lower, upper) -> flat vector, averaged over `samples`."""
    loss = trajectory.response or trajectory.loss

    def root(part: Tensor, upper: Params) -> Tensor:
        assert trajectory.root is not None
        (batch, random), *_ = samples
        with replaying(random):
            value = trajectory.root(responding.complete(part), upper, batch)
        trajectory.layout.check_like(value, "the result of the root function F")
        return responding.layout.ravel(value)

    if loss is None:
        return root

    def mean_loss(part: Tensor, upper: Params) -> Tensor:
        total = None
        for batch, random in samples:
            with replaying(random):
                value = scalar(loss(responding.complete(part), upper, batch), "the lower loss")
            total = value if total is None else total + value
        assert total is not None
        return total / len(samples) if len(samples) > 1 else total

    def condition(part: Tensor, upper: Params) -> Tensor:
        grad = gradient(lambda w: mean_loss(w, upper), part, create_graph=True)
        return _with_decay(trajectory, responding, grad, part, upper)

    return condition


def compiled_stationarity(
    trajectory: Trajectory, responding: Responding, samples: Sequence[Sample], compile: Compile
) -> Residual:
    """Return F likewise, its gradient compiled.

    Raises:
        ValueError: by F, for a root, and for a loss that draws random numbers or cannot be compiled.
    """
    loss = trajectory.response or trajectory.loss
    if loss is None:
        raise ValueError(
            "compile=True serves lower losses; this lower level is the root of a map (solved_root). Use compile=False."
        )
    check_compile(loss)

    def condition(part: Tensor, upper: Params) -> Tensor:
        grad = compiled_gradient(
            loss,
            part,
            upper,
            [batch for batch, _ in samples],
            layout=responding.layout,
            constants=responding.constants,
            compile=compile,
        )
        return _with_decay(trajectory, responding, grad, part, upper)

    return condition


def _with_decay(trajectory: Trajectory, responding: Responding, grad: Tensor, part: Tensor, upper: Params) -> Tensor:
    """Return sign * grad + decay * part, as the run's optimizer sees them."""
    if not trajectory.steps:
        return grad
    last = trajectory.steps[-1]
    bound = last.recipe.optimizer
    sign = _part(bound.sign(), responding)
    coupled = _part(bound.decay(last.recipe.hyper_values(upper, last.index)).coupled, responding)
    if not (isinstance(sign, float) and sign == 1.0):
        grad = sign * grad
    if not (isinstance(coupled, float) and coupled == 0.0):
        grad = grad + coupled * part
    return grad


def _part(value: Tensor | float, responding: Responding) -> Tensor | float:
    if isinstance(value, Tensor):
        return responding.select(value) if value.dim() else value
    return float(value)


def samples_of(trajectory: Trajectory, batches: int) -> list[Sample]:
    """Return the last `batches` batches of the run with their random draws; a ValueError if there are fewer."""
    samples = trajectory.samples(batches)
    if len(samples) < batches:
        raise ValueError(
            f"batches={batches} were to be averaged, but the run has {len(samples)}. Lower batches, or take more lower "
            f"steps."
        )
    return samples


def _jacobian(
    condition: Tape, trajectory: Trajectory, responding: Responding, known: Callable[[], Tensor | None]
) -> Operator:
    symmetric = trajectory.root is None
    return Function(
        condition.pull_lower,
        condition.pull_lower if symmetric else condition.push_lower,
        size=responding.layout.size,
        dtype=responding.layout.dtype,
        device=responding.layout.device,
        symmetric=symmetric,
        second_moment=_second_moment(trajectory, responding),
        mm=condition.pull_lower_each,
        known_diagonal=known,
    )


def _known_diagonal(
    trajectory: Trajectory,
    responding: Responding,
    samples: Sequence[Sample],
    point: Tensor,
    upper: Params,
    kind: TapeKind,
) -> Tensor | None:
    """Return the diagonal that weight decay and the penalty of a Composite put into dF/dw; None without either."""
    loss = trajectory.response or trajectory.loss
    ones = torch.ones_like(point)
    if isinstance(loss, Composite) and loss.penalty is not None:
        pulled = [_penalty_tape(loss, responding, sample, point, upper, kind).pull_lower(ones) for sample in samples]
        return _with_decay(trajectory, responding, torch.stack(pulled).mean(0), ones, upper)
    nothing = torch.zeros_like(point)
    decay = _with_decay(trajectory, responding, nothing, ones, upper)
    return None if decay is nothing else decay


def _second_moment(trajectory: Trajectory, responding: Responding) -> Tensor | None:
    if not trajectory.steps or not trajectory.end_states:
        return None
    moment = trajectory.steps[-1].recipe.optimizer.second_moment(trajectory.end_states)
    return None if moment is None else responding.select(moment)


def _gauss_newton(
    trajectory: Trajectory,
    responding: Responding,
    samples: Sequence[Sample],
    point: Tensor,
    upper: Params,
    kind: TapeKind,
    known: Callable[[], Tensor | None],
) -> Operator:
    """Return s (J^T B J + Hessian of the penalty) + d I, averaged over `samples`."""
    given = trajectory.response or trajectory.loss
    loss = None if given is None else plain(given)
    if not isinstance(loss, Composite):
        raise ValueError(
            "curvature='gauss_newton' needs the lower loss as hg.Composite(outputs, criterion, penalty): a plain "
            "function does not show its outputs. Wrap it, or use curvature='hessian'."
        )
    products = [
        _gauss_newton_product(loss, responding, sample, point, upper, kind) for sample in _in_parts(given, samples)
    ]
    ranks = ranks_of(given)

    def product(v: Tensor) -> Tensor:
        shared = v
        if ranks is not None:
            (v,) = ranks.share([v])
        total = products[0](v)
        for other in products[1:]:
            total = total + other(v)
        if len(products) > 1:
            total = total / len(products)
        if ranks is not None:
            (total,) = ranks.average([total])
        return _with_decay(trajectory, responding, total, shared, upper)

    return Function(
        product,
        product,
        size=responding.layout.size,
        dtype=responding.layout.dtype,
        device=responding.layout.device,
        symmetric=True,
        second_moment=_second_moment(trajectory, responding),
        known_diagonal=known,
    )


def _in_parts(loss: Loss | None, samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples cut into micro-batches; all of them draw from the sample's random state."""
    if not isinstance(loss, Averaged):
        return list(samples)
    return [(part, random) for batch, random in samples for part in loss.parts(batch)]


def _gauss_newton_product(
    loss: Composite, responding: Responding, sample: Sample, point: Tensor, upper: Params, kind: TapeKind
) -> Callable[[Tensor], Tensor]:
    batch, random = sample
    shape = torch.Size()

    def outputs(part: Tensor, u: Params) -> Tensor:
        nonlocal shape
        with replaying(random):
            predictions = loss.outputs(responding.complete(part), u, batch)
        shape = predictions.shape
        return predictions.reshape(-1)

    def criterion_gradient(z: Tensor, u: Params) -> Tensor:
        return gradient(lambda flat: loss.criterion_at(flat.view(shape), u, batch), z, create_graph=True)

    model = tape(outputs, point, upper, kind=kind)
    criterion = tape(criterion_gradient, model.value, upper, kind=kind)
    if loss.penalty is None:
        return lambda v: model.pull_lower(criterion.pull_lower(model.push_lower(v)))
    curved = _penalty_tape(loss, responding, sample, point, upper, kind)
    return lambda v: model.pull_lower(criterion.pull_lower(model.push_lower(v))) + curved.pull_lower(v)


def _penalty_tape(
    loss: Composite, responding: Responding, sample: Sample, point: Tensor, upper: Params, kind: TapeKind
) -> Tape:
    """Return the tape of the gradient of the penalty."""

    def penalty(part: Tensor, u: Params) -> Tensor:
        value = loss.penalty_at(responding.complete(part), u, sample[0])
        assert value is not None
        return scalar(value, "the penalty of the Composite")

    return tape(lambda w, u: gradient(lambda x: penalty(x, u), w, create_graph=True), point, upper, kind=kind)
