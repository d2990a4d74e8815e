"""The exact hypergradient of a task, in float64, by means that share no code with the library's methods.

A worker like any other: plain `torch.autograd` for derivatives, LAPACK or SciPy for linear systems. Which of its ways
is taken is the task's doing: its own closed form; for a solved lower level the implicit-function theorem with a dense
Hessian, or with an iterative solve run to rounding; for a run of steps, the taped run itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import scipy.sparse.linalg
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad.bench.problems.base import Params, Task
from hypergrad.bench.protocol import Offer
from hypergrad.bench.serving import Contender, Outcome, serve

DENSE = 1000
"""Up to how many lower scalars the Hessian is formed."""

MAX_STEPS = 3000
"""Of an iterative solve."""

Loss = Callable[[Params, Params, Any], Tensor]


class Reference(Contender):
    """What the others are compared with."""

    def offers(self, task: Task, size: str) -> list[Offer]:  # noqa: ARG002 - one way for each task
        """Return the one way there is for the task."""
        return [Offer("reference")]

    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:  # noqa: ARG002
        """Return the function that computes it."""
        return lambda: exact(task)

    def versions(self) -> dict[str, str]:
        """Return those of what does the work."""
        return {"torch": str(torch.__version__), "scipy": scipy.__version__}


def exact(task: Task) -> Outcome:
    """Return the exact hypergradient of a task built in float64, and how it was found."""
    if task.reference is not None:
        return Outcome(task.reference, note="closed form")
    if task.kind == "implicit":
        return implicit(task.lower_loss, task.upper_loss, task.lower, task.upper, *_batches(task))
    if task.kind == "unrolled":
        return Outcome(unrolled(task), note=f"{task.steps} taped steps")
    return _over_tasks(task)


def _batches(task: Task) -> tuple[Any, Any]:
    return task.lower_batches[0], task.upper_batch


def implicit(
    lower_loss: Loss, upper_loss: Loss, lower: Params, upper: Params, lower_batch: Any, upper_batch: Any
) -> Outcome:
    """Return the implicit-function theorem's derivative at `lower`, the solve exact to rounding."""
    w = {name: value.detach().clone().requires_grad_() for name, value in lower.items()}
    u = {name: value.detach().clone().requires_grad_() for name, value in upper.items()}
    value = upper_loss(w, u, upper_batch)
    grads = torch.autograd.grad(value, [*w.values(), *u.values()], allow_unused=True, materialize_grads=True)
    cotangent, direct = _flat(grads[: len(w)]), grads[len(w) :]
    slope, product = _curvature(lower_loss, w, u, lower_batch)
    solution, note = _solve(product, cotangent.detach())
    mixed = torch.autograd.grad(slope, list(u.values()), solution, allow_unused=True, materialize_grads=True)
    gradient = {name: (d - m).detach() for name, d, m in zip(u, direct, mixed, strict=True)}
    return Outcome(gradient, note=f"{note}; norm of the lower gradient {float(slope.detach().norm()):.1e}")


def _solve(product: Callable[[Tensor], Tensor], b: Tensor) -> tuple[Tensor, str]:
    if b.numel() <= DENSE:
        hessian = torch.stack([product(row) for row in torch.eye(b.numel(), dtype=b.dtype)])
        values = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
        note = f"dense Hessian, eigenvalues {float(values[0]):.1e} to {float(values[-1]):.1e}"
        return torch.linalg.solve(hessian, b), note
    return _iterate(product, b)


def _iterate(product: Callable[[Tensor], Tensor], b: Tensor) -> tuple[Tensor, str]:
    residual = 0.0
    if not bool(b.any()):
        return b, "zero"

    def matvec(v: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = product(torch.from_numpy(v)).numpy()
        return found

    make: Any = scipy.sparse.linalg.LinearOperator
    operator = make((b.numel(), b.numel()), matvec=matvec, dtype=np.float64)
    for name, solve in (("MINRES", scipy.sparse.linalg.minres), ("CG", scipy.sparse.linalg.cg)):
        found, _ = solve(operator, b.numpy(), rtol=1e-13, maxiter=MAX_STEPS)
        x = torch.from_numpy(np.asarray(found))
        residual = float((product(x) - b).norm() / b.norm())
        if residual < 1e-9:
            return x, f"{name} to a residual of {residual:.0e}"
    raise RuntimeError(f"neither MINRES nor CG solves the system of {b.numel()} unknowns: residual {residual:.1e}.")


def unrolled(task: Task) -> Params:
    """Return the derivative of the run that the task describes, by taping all of it."""
    u = {name: value.detach().clone().requires_grad_() for name, value in task.upper.items()}
    lower = {name: value.detach().clone() for name, value in task.lower.items()}
    return _through(task, lower, u, task.lower_batches, task.upper_batch)


def _through(task: Task, lower: Params, u: Params, batches: list[Any], upper_batch: Any) -> Params:
    end = run(task, lower, u, batches)
    value = task.upper_loss(end, u, upper_batch)
    grads = torch.autograd.grad(value, list(u.values()), allow_unused=True, materialize_grads=True)
    return {name: g.detach() for name, g in zip(u, grads, strict=True)}


def run(task: Task, lower: Params, u: Params, batches: list[Any]) -> Params:
    """Return the lower parameters after one step a batch, as a differentiable function of `u`."""
    w = {name: value if value.requires_grad else value.clone().requires_grad_() for name, value in lower.items()}
    first = {name: torch.zeros_like(value) for name, value in w.items()}
    second = dict(first)
    for step, batch in enumerate(batches):
        grads = torch.autograd.grad(
            task.lower_loss(w, u, batch), list(w.values()), create_graph=True, materialize_grads=True
        )
        lr = task.hyper["lr"](u, step) if task.hyper else task.lr
        updated = {}
        for (name, value), g in zip(w.items(), grads, strict=True):
            g = g + task.weight_decay * value
            if task.optimizer == "adam":
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                root = torch.where(second[name] > 0, second[name], 1.0).sqrt() * (second[name] > 0)
                scaled = root / (1 - 0.999 ** (step + 1)) ** 0.5 + 1e-8
                updated[name] = value - lr * first[name] / (1 - 0.9 ** (step + 1)) / scaled
            else:
                first[name] = task.momentum * first[name] + g
                updated[name] = value - lr * first[name]
        w = updated
    return w


def _over_tasks(task: Task) -> Outcome:
    """Return the mean of the tasks' derivatives in where they began."""
    count = len(pytree.tree_leaves(task.upper_batch)[0])
    total: Params = {}
    for index in range(count):

        def pick(leaf: Any, at: int = index) -> Any:
            return leaf[at] if isinstance(leaf, Tensor) else leaf

        batches, upper_batch = pytree.tree_map(pick, (task.lower_batches, task.upper_batch))
        u = {name: value.detach().clone().requires_grad_() for name, value in task.upper.items()}
        if task.converged:
            solution = _minimizer(task, batches[0])
            grad = implicit(task.lower_loss, task.upper_loss, solution, u, batches[0], upper_batch).gradient
        else:
            grad = _through(task, u, u, batches, upper_batch)
        total = {name: g + total[name] if total else g for name, g in grad.items()}
    how = "solutions by Newton's method, exact linear systems" if task.converged else f"{task.steps} taped steps a task"
    return Outcome({name: g / count for name, g in total.items()}, note=how)


def _minimizer(task: Task, batch: Any) -> Params:
    """Return the solution that descent from the task's start leads to: L-BFGS, then Newton's method."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in task.upper.items()}
    constants = {name: value.detach() for name, value in task.upper.items()}
    optimizer = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=200,
        tolerance_grad=1e-6,
        tolerance_change=0,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = task.lower_loss(leaves, constants, batch)
        for leaf, g in zip(leaves.values(), torch.autograd.grad(value, list(leaves.values())), strict=True):
            leaf.grad = g
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    solution = {name: value.detach() for name, value in leaves.items()}
    return newton_step(task.lower_loss, solution, constants, batch)


def newton_step(lower_loss: Loss, lower: Params, upper: Params, batch: Any) -> Params:
    """Return the lower parameters after one step of Newton's method, its linear system solved to rounding."""
    w = {name: value.detach().clone().requires_grad_() for name, value in lower.items()}
    slope, product = _curvature(lower_loss, w, upper, batch)
    step, _ = _solve(product, slope.detach())
    parts = step.split_with_sizes([value.numel() for value in w.values()])
    return {n: (value - part.view(value.shape)).detach() for (n, value), part in zip(w.items(), parts, strict=True)}


def _curvature(lower_loss: Loss, w: Params, upper: Params, batch: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the lower gradient at the leaves `w`, flat and taped, and the product with its derivative."""
    leaves = list(w.values())
    slope = _flat(torch.autograd.grad(lower_loss(w, upper, batch), leaves, create_graph=True, materialize_grads=True))

    def product(v: Tensor) -> Tensor:
        return _flat(torch.autograd.grad(slope, leaves, v, retain_graph=True, materialize_grads=True))

    return slope, product


def _flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


if __name__ == "__main__":
    serve(Reference())
