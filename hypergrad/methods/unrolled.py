"""Differentiation of the lower run itself: backwards by an adjoint sweep, or forwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._compiled import COMPILE, Compile, to_compile
from hypergrad._flat import Params
from hypergrad._functional import in_transform
from hypergrad._random import replaying
from hypergrad._result import Stats
from hypergrad._tape import add, named, second_order, upper_gradient, vjp
from hypergrad.fused import fused
from hypergrad.methods._refusals import check_option, check_run, refuse_state
from hypergrad.methods._run import pull_start, run_start
from hypergrad.methods.base import Pulled, ResponseMethod
from hypergrad.solvers.base import reads_allowed
from hypergrad.step import Recording, Step, state_tensors
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Unrolled(ResponseMethod):
    r"""Reverse-mode differentiation of the lower run, by an adjoint sweep over its recorded states.

    .. math:: (\lambda_k, \mu_k, \bar u_k) = D\Phi_k(w_k, s_k, u)^T (\lambda_{k+1}, \mu_{k+1}), \qquad
        \bar u = \sum_k \bar u_k, \quad \lambda_K = v, \; \mu_K = 0

    with the step maps Phi_k : (w_k, s_k, u) -> (w_{k+1}, s_{k+1}) of parameters w and optimizer states s. It is the
    exact derivative of the run that was made (of its last `truncate` steps, if set), converged or not; as an estimate
    of the derivative of the *solution* its error shrinks with the number of steps at the rate of the run.

    Cost: per step one gradient of the lower loss and one product with its Hessian and mixed derivative. Memory: K
    states, or about 2 sqrt(K) with `checkpoint`, and one tape; not K tapes, unless `retain` asks for them.

    Bias: none for the run that was made, if all of it is differentiated.

    Args:
        truncate: differentiate the last n steps only; None for all. Where the run began at `start(upper)`, the
            cotangent
            passes the steps before unchanged: `truncate=0` is first-order MAML.
        checkpoint: keep every n-th state while the run is recorded, and recompute the others: an int, or "sqrt". The
            record must be made for it: `descend(..., recording=method.recording(K))`; the engine does.
        retain: the fraction of steps, the last ones, whose tape is kept from the run, so that the sweep need not
            evaluate their gradient again; recorded likewise. Time against memory.
        compile: compile a step, gradient and update in one, and its derivative: True, or the name of a backend of
            `torch.compile`; one compilation each way for all steps, of all tasks where an engine runs many together,
            whose upper loss is compiled too where it can be. The sweep uses it, and the run where the record is made
            for it. With `retain`, hyperparameters as functions of `upper`, or `project`, the gradient alone is
            compiled. The loss must draw no random numbers, and what it sees besides its arguments is taken to stay the
            same within one run: the compiler's checks are made at its first step. The first values are compared with
            eager ones; where they differ, a warning says so and steps are eager. Derivatives of the rule itself are.

    Raises:
        ValueError: for options out of range; for `solved`, where there is no run.

    Reference: L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and reverse gradient-based hyperparameter
        optimization", ICML 2017, arXiv 1703.01785; A. Shaban, C.-A. Cheng, N. Hatch, B. Boots, "Truncated
        back-propagation for bilevel optimization", AISTATS 2019, arXiv 1810.10667.
    """

    differentiable: ClassVar[bool] = True

    truncate: int | None = None
    checkpoint: int | Literal["sqrt"] | None = None
    retain: float = 0.0
    compile: Compile = False

    def __post_init__(self) -> None:
        """Validate the options."""
        check_option(
            self.truncate is None or (isinstance(self.truncate, int) and self.truncate >= 0),
            "Unrolled",
            "truncate",
            self.truncate,
            "None or an int >= 0",
        )
        check_option(
            self.checkpoint is None
            or self.checkpoint == "sqrt"
            or (isinstance(self.checkpoint, int) and self.checkpoint >= 1),
            "Unrolled",
            "checkpoint",
            self.checkpoint,
            "None, 'sqrt' or an int >= 1",
        )
        check_option(
            isinstance(self.retain, int | float) and 0.0 <= self.retain <= 1.0,
            "Unrolled",
            "retain",
            self.retain,
            "a fraction from 0 to 1",
        )
        check_option(isinstance(self.compile, bool | str), "Unrolled", "compile", self.compile, COMPILE)

    @property
    def second_order(self) -> bool:
        """Return whether any are taken: first-order MAML takes none."""
        return self.truncate != 0

    @property
    def serves_shards(self) -> bool:
        """Return whether gradients are all it takes: those of first-order MAML."""
        return not self.second_order

    def recording(self, num_steps: int) -> Recording:
        """Return which states and tapes of a run of `num_steps` the sweep reads."""
        window = num_steps if self.truncate is None else min(self.truncate, num_steps)
        every = math.isqrt(max(window, 1)) if self.checkpoint == "sqrt" else self.checkpoint or 1
        taped = round(self.retain * window)
        return Recording(num_steps - window, max(every, 1), num_steps - taped if taped else None, self.compile)

    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return the cotangent of `upper` swept back through the run."""
        refuse_state(self, state)
        compile = to_compile("Unrolled", self.compile)
        first = self._first(trajectory)
        bar = cotangent
        state_bars = tuple(
            {k: torch.zeros_like(v) if isinstance(v, Tensor) else v for k, v in s.items()}
            for s in trajectory.end_states
        )
        grad: Params = {}
        whole = None
        if trajectory.num_steps > first and self.retain == 0.0:
            whole = fused(trajectory.steps[-1].recipe, trajectory.end_states, upper, compile)
        unchecked = trajectory.upper_layout is not None and cotangent.device.type == "cpu" and reads_allowed(cotangent)
        ended = trajectory.end_flat
        with second_order():
            for step, flat, states in trajectory.backwards(first, upper):
                cotangents = bar, state_bars
                if whole is None:
                    known = ended if unchecked and step.taped is None else None  # one will do, where it costs no wait
                    bar, state_bars, upper_bar = step.pull(
                        flat, states, upper, cotangents, compile=compile, ended=known
                    )
                    unchecked, ended = unchecked and known is None, flat
                else:
                    bar, state_bars, upper_bar = whole.pull(step, flat, states, upper, cotangents)
                grad = add(grad, upper_bar)
        if trajectory.start is not None:
            grad = add(grad, pull_start(trajectory, upper, bar))
        count = torch.full((), trajectory.num_steps - first, dtype=torch.int64, device=cotangent.device)
        return Pulled(grad, None, Stats(num_products=count, num_steps=count))

    def differentiable_vjp(self, trajectory: Trajectory, end: Tensor, upper: Params, cotangent: Tensor) -> Params:  # noqa: ARG002
        """Return the same, by taping the whole run again; memory grows with the number of steps."""
        first = self._first(trajectory)
        if in_transform():
            with second_order():
                _, pullback = vjp(lambda u: trajectory.replay(first, u), upper)
            pulled: Params = pullback(cotangent)[0]
            return pulled
        with torch.enable_grad(), second_order():
            aliases = {n: u.view_as(u) if u.requires_grad else u.detach().requires_grad_() for n, u in upper.items()}
            replayed = trajectory.replay(first, aliases)
            if not replayed.requires_grad:
                return {}
            tensors = torch.autograd.grad(
                replayed, list(aliases.values()), cotangent, create_graph=True, allow_unused=True
            )
        return named(aliases, tensors)

    def _first(self, trajectory: Trajectory) -> int:
        check_run(self, trajectory, "differentiates the steps of a lower run")
        return 0 if self.truncate is None else max(trajectory.num_steps - self.truncate, 0)


@dataclass(frozen=True)
class ForwardUnrolled(ResponseMethod):
    r"""Forward-mode differentiation of the lower run: the same derivative as `Unrolled`, for few upper variables.

    .. math:: Z_{k+1} = \partial_{(w, s)} \Phi_k\, Z_k + \partial_u \Phi_k, \qquad \bar u = Z_K^T v

    with one column of Z per scalar upper variable. Products with the step map's Jacobian are built from two reverse
    passes, which every operation that has a second derivative supports.

    Cost: per step one taped gradient and two products for each upper variable. Memory: K states, one tape, and Z.

    Bias: none for the run that was made.

    Reference: L. Franceschi, M. Donini, P. Frasconi, M. Pontil, "Forward and reverse gradient-based hyperparameter
        optimization", ICML 2017, arXiv 1703.01785.
    """

    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return Z_K^T cotangent."""
        refuse_state(self, state)
        check_run(self, trajectory, "differentiates the steps of a lower run")
        if not _reads_upper(trajectory, upper):
            return Pulled({})
        columns = _basis(upper)
        tangents = [_start_tangent(trajectory, upper, column) for column in columns]
        for step, flat, states in reversed(list(trajectory.backwards(0, upper))):
            push = step.linear(flat, states, upper)
            tangents = [push(*tangent, column) for tangent, column in zip(tangents, columns, strict=True)]
        entries = iter([torch.dot(flat_dot, cotangent) for flat_dot, _ in tangents])
        grad = {
            name: torch.stack([next(entries) for _ in range(u.numel())]).to(u.dtype).view(u.shape)
            if u.numel()
            else torch.zeros_like(u)
            for name, u in upper.items()
        }
        count = torch.full((), 2 * len(columns) * trajectory.num_steps, dtype=torch.int64, device=cotangent.device)
        steps = torch.full((), trajectory.num_steps, dtype=torch.int64, device=cotangent.device)
        return Pulled(grad, None, Stats(num_products=count, num_steps=steps))


def _reads_upper(trajectory: Trajectory, upper: Params) -> bool:
    """Return whether a step of the run reads `upper`, the last ones asked first; True where that cannot be told."""
    if in_transform() or trajectory.start is not None or trajectory.steps[-1].recipe.hyper:
        return True
    return any(step.taken and _step_reads(step, flat, upper) for step, flat, _ in trajectory.backwards(0, upper))


def _step_reads(step: Step, flat: Tensor, upper: Params) -> bool:
    with replaying(step.random):
        return bool(upper_gradient(lambda u: step.lower_loss(flat, u), upper))


def _basis(upper: Params) -> list[Params]:
    """Return one dict like `upper` for each of its scalars, 1 there and 0 elsewhere."""
    columns = []
    for name, u in upper.items():
        eye = torch.eye(u.numel(), dtype=u.dtype, device=u.device)
        for row in eye.unbind():
            columns.append({n: row.view(u.shape) if n == name else torch.zeros_like(v) for n, v in upper.items()})
    return columns


def _start_tangent(trajectory: Trajectory, upper: Params, column: Params) -> tuple[Tensor, list[Tensor]]:
    flat = torch.zeros_like(trajectory.end_flat)
    if trajectory.start is not None:
        flat = _push(lambda u: run_start(trajectory, u), upper, column)
    return flat, [torch.zeros_like(t) for t in state_tensors(trajectory.end_states)]


def _push(function: Callable[[Params], Tensor], upper: Params, column: Params) -> Tensor:
    """Return the derivative of `function` at `upper` along `column`, by double vjp."""
    value, pullback = vjp(function, upper)
    _, push = vjp(lambda c: pullback(c)[0], torch.zeros_like(value))
    pushed: Tensor = push(column)[0]
    return pushed
