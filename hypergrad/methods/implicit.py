"""Implicit differentiation of the lower level's stationarity condition."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypergrad._compiled import COMPILE, Compile, to_compile
from hypergrad._flat import Params
from hypergrad._functional import in_transform
from hypergrad._result import Stats
from hypergrad.methods._refusals import check_fixed_point, check_initial, check_number, check_option, check_start
from hypergrad.methods._solve import differentiable_solve, solve
from hypergrad.methods.base import Pulled, ResponseMethod
from hypergrad.operators import Damped
from hypergrad.solvers import CG, SecondMoment, Solver
from hypergrad.solvers.recycling import solve_recycling
from hypergrad.stationarity import Curvature, linearize
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Implicit(ResponseMethod):
    r"""The implicit-function theorem, with any linear solver.

    .. math:: F(w^*(u), u) = 0 \;\Rightarrow\;
        \Big(\frac{dw^*}{du}\Big)^T v = -(\partial_u F)^T x, \qquad (\partial_w F + \delta I)^T x = v

    F is the gradient of the lower loss in w, plus coupled weight decay times w, negated under `maximize`: the
    stationarity condition of loss *and* optimizer; or the caller's F of `solved_root`. v is the cotangent, delta the
    damping. Exact if w* is a stationary point with invertible dF/dw and the solve is; the error is otherwise
    proportional to the norm of F at the end of the run (`stats.stationarity`) and to `stats.residual_norm`.

    Cost: one gradient of the lower loss, one product per step of the solver, one mixed product. Memory: one taped
    gradient.

    Bias: none at a stationary point with a converged solve and no damping.

    Args:
        solver: `CG`, `Neumann`, `Nystrom`, `MINRES`, `GMRES`, `Exact`, `SciPy` or your own `Solver`.
        damping: delta >= 0, added to the diagonal. It biases the result; it is not part of the problem.
        curvature: "hessian", or "gauss_newton" for a `Composite` loss (positive semi-definite curvature).
        warm_start: begin the solve at the solution of the last one (`state=`); one product more, often far fewer steps.
        recycle: with `CG`, how many directions of earlier solves are kept, with their products, as the preconditioner
            of the next (`state=`). No products of its own; 2 * recycle vectors of memory, which each step of the solver
            reads twice: 32 for a deep network, some 8 where a product costs little more than reading the parameters.
            It pays where consecutive upper steps meet nearly the same curvature; add `warm_start` where they meet the
            same upper batch as well.
        batches: how many of the run's last batches are averaged in curvature and mixed partial.
        over: prefixes of lower names that respond; the other lower parameters count as constants. None for all.
        compile: compile the gradient that is taped, and with it each product: True, or the name of a backend of
            `torch.compile`. Once for each loss object and layout, which takes seconds to minutes; worth it over many
            calls. The loss must draw no random numbers. Derivatives of the rule itself (`best_response` twice) stay
            eager. The first product for each set of shapes is compared with an eager one; where the compiler got it
            wrong, a warning says so and eager products are used.
        fresh: draw the `batches` anew once per lower run instead of taking the run's last; engine only.
        decoupled: what to do about decoupled weight decay (AdamW), which moves the fixed point in a way that this
            condition does not describe: "refuse" or "ignore".

    Raises:
        ValueError: at construction for options out of range; later for runs whose fixed point this condition does not
            describe (decoupled decay, projections, a learning rate as upper variable), with what to use instead.

    Reference: F. Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016, arXiv 1602.02355;
        J. Lorraine, P. Vicol, D. Duvenaud, "Optimizing millions of hyperparameters by implicit differentiation",
        AISTATS 2020, arXiv 1911.02590.
    """

    differentiable: ClassVar[bool] = True

    solver: Solver
    damping: float | Tensor = 0.0
    curvature: Curvature = "hessian"
    warm_start: bool = False
    recycle: int = 0
    batches: int = 1
    over: Sequence[str] | None = None
    compile: Compile = False
    fresh: bool = False
    decoupled: Literal["refuse", "ignore"] = "refuse"

    def __post_init__(self) -> None:
        """Validate the options."""
        check_option(isinstance(self.solver, Solver), "Implicit", "solver", self.solver, "a solver such as hg.CG(10)")
        check_number("Implicit", "damping", self.damping, zero=True)
        check_option(
            self.curvature in ("hessian", "gauss_newton"),
            "Implicit",
            "curvature",
            self.curvature,
            "'hessian' or 'gauss_newton'",
        )
        check_option(
            isinstance(self.batches, int) and self.batches >= 1, "Implicit", "batches", self.batches, "an int >= 1"
        )
        check_option(
            self.decoupled in ("refuse", "ignore"), "Implicit", "decoupled", self.decoupled, "'refuse' or 'ignore'"
        )
        check_option(
            self.over is None
            or (not isinstance(self.over, str) and len(self.over) > 0 and all(isinstance(p, str) for p in self.over)),
            "Implicit",
            "over",
            self.over,
            "None or a sequence of one or more prefixes: ['backbone.']",
        )
        check_option(isinstance(self.compile, bool | str), "Implicit", "compile", self.compile, COMPILE)
        if self.compile and self.curvature == "gauss_newton":
            raise ValueError(
                f"Implicit: compile={self.compile!r} serves curvature='hessian', not 'gauss_newton'. Leave one "
                "of them out."
            )
        if self.warm_start and not self.solver.uses_initial:
            raise ValueError(
                f"Implicit: warm_start=True has no effect with {type(self.solver).__name__}, which solves from "
                "scratch. Leave it False, or use hg.CG, hg.MINRES or hg.GMRES."
            )
        self._check_recycle()

    def _check_recycle(self) -> None:
        """Raise a ValueError unless directions can be kept as asked."""
        count = self.recycle
        check_option(
            isinstance(count, int) and not isinstance(count, bool) and count >= 0,
            "Implicit",
            "recycle",
            count,
            "an int >= 0",
        )
        if not count:
            return
        if not isinstance(self.solver, CG) or self.solver.preconditioner is not None:
            raise ValueError(
                f"Implicit: recycle={count} preconditions the next solve by directions of earlier ones. It needs an "
                f"hg.CG without a preconditioner of its own, got {self.solver!r}."
            )

    def check_functional(self) -> None:
        """Raise a ValueError for `fresh`, whose batches an engine draws."""
        if self.fresh:
            raise ValueError(
                "Implicit: fresh=True draws batches from a Problem's data, so it needs an hg.Engine. Here, pass the "
                "batches to hg.descend and leave fresh=False."
            )

    @property
    def _keeps_state(self) -> bool:
        return self.warm_start or self.recycle > 0

    @property
    def differentiates_optimizer(self) -> bool:
        """Return whether more than the weight decay is read: only a preconditioner from the second moment does."""
        return isinstance(self.solver, CG) and isinstance(self.solver.preconditioner, SecondMoment)

    @property
    def fixed_point(self) -> Literal["refuse", "ignore"]:
        """Return what to do about decoupled decay; the run must end at a fixed point."""
        return self.decoupled

    @property
    def num_batches(self) -> int:
        """Return how many of the run's last batches are averaged."""
        return 1 if self.fresh else self.batches

    @property
    def num_fresh(self) -> int:
        """Return how many batches are drawn anew."""
        return self.batches if self.fresh else 0

    def recording(self, num_steps: int) -> Recording:
        """Return that only the last state is read."""
        return Recording(first=num_steps)

    def vjp(self, trajectory: Trajectory, upper: Params, cotangent: Tensor, state: Tensor | None = None) -> Pulled:
        """Return -(dF/du)^T x with (dF/dw + damping I)^T x = cotangent."""
        check_fixed_point(self, trajectory, upper, decoupled=self.decoupled)
        lin = linearize(
            trajectory,
            upper,
            batches=self.batches,
            over=self.over,
            curvature=self.curvature,
            compile=to_compile("Implicit", self.compile),
        )
        v = lin.responding.select(cotangent)
        rows = (2 * self.recycle + 1,) if self.recycle else ()
        check_initial(self, state, (*rows, *v.shape), warm_start=self._keeps_state)
        damped = isinstance(self.damping, Tensor) or self.damping > 0
        operator = Damped(lin.operator, self.damping) if damped else lin.operator
        with contextlib.nullcontext() if in_transform() else torch.no_grad():
            if isinstance(self.solver, CG) and self.recycle:
                warm = self.warm_start
                solution, kept = solve_recycling(self.solver, operator, v, state, self.recycle, warm_start=warm)
            else:
                solution = solve(self.solver, operator, v, state)
                kept = solution.x
        grad = {name: -g for name, g in lin.mixed(solution.x).items()}
        check_start(self, trajectory, upper, grad)
        stats = Stats(
            num_products=solution.num_products,
            num_steps=solution.num_steps,
            residual_norm=solution.residual_norm,
            stationarity=lin.value.norm(),
        )
        return Pulled(grad, solution.result, stats, kept if self._keeps_state else None)

    def differentiable_vjp(self, trajectory: Trajectory, end: Tensor, upper: Params, cotangent: Tensor) -> Params:
        """Return the same, differentiable: the solve is differentiated by a solve with the transpose."""
        check_fixed_point(self, trajectory, upper, decoupled=self.decoupled)
        lin = linearize(trajectory, upper, batches=self.batches, over=self.over, curvature=self.curvature, at=end)
        v = lin.responding.select(cotangent)

        def operator_at(point: Tensor, at_upper: Params) -> Damped:
            there = linearize(
                trajectory, at_upper, batches=self.batches, over=self.over, curvature=self.curvature, at=point
            )
            return Damped(there.operator, self.damping)

        x = differentiable_solve(self.solver, operator_at, end, upper, v)
        grad = {name: -g for name, g in lin.mixed(x).items()}
        check_start(self, trajectory, upper, grad)
        return grad
