"""Bilevel problems whose hypergradient is known: what a method is tested against.

Each is a `KnownProblem`: two losses in the library's form, and the lower solution as a function of the
upper parameters, from which `truth` follows by ordinary differentiation. Everything is float64 unless asked
otherwise, and drawn from a seed without touching the global generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad._flat import Params, constant
from hypergrad._functional import Loss


@dataclass(frozen=True)
class KnownProblem:
    """Two losses and the exact lower solution.

    Attributes:
        name: what it is called in test ids.
        lower_loss, upper_loss: pure functions (lower, upper, batch) -> scalar; `batch` is not read.
        lower: lower parameters to start from.
        upper: the upper parameters.
        solution: upper -> the lower solution, whose first derivative is exact.
        largest, smallest: bounds on the eigenvalues of the lower Hessian at the solution.
    """

    name: str
    lower_loss: Loss
    upper_loss: Loss
    lower: Params
    upper: Params
    solution: Callable[[Params], Params]
    largest: float
    smallest: float

    def truth(self, upper: Params | None = None) -> Params:
        """Return d upper_loss(solution(upper), upper) / d upper."""
        point = self.upper if upper is None else upper

        def total(u: Params) -> Tensor:
            return self.upper_loss(self.solution(u), u, None)

        gradient: Params = torch.func.grad(total)(point)
        return gradient

    def solved_at(self, upper: Params | None = None) -> Params:
        """Return the lower solution, detached."""
        return {name: w.detach() for name, w in self.solution(self.upper if upper is None else upper).items()}


def relative_error(actual: Params, expected: Params) -> float:
    """Return norm(actual - expected) / norm(expected); the norm itself where `expected` is zero.

    Args:
        actual: by name.
        expected: the same names.
    """
    if set(actual) != set(expected):
        raise ValueError(f"entries {sorted(actual)} were to be compared with {sorted(expected)}.")
    difference = torch.cat([(actual[name] - expected[name]).double().reshape(-1) for name in expected])
    scale = torch.cat([expected[name].double().reshape(-1) for name in expected]).norm()
    return float(difference.norm() / scale) if scale > 0 else float(difference.norm())


def spd(size: int, condition: float, *, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a symmetric matrix with eigenvalues log-spaced from 1 / condition to 1, shape (size, size)."""
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -1, size, base=condition, dtype=torch.float64) if size > 1 else torch.ones(1).double()
    matrix = (basis * values) @ basis.T
    symmetric: Tensor = (matrix + matrix.T) / 2
    return symmetric.to(dtype)


def quadratic(
    size: int = 6,
    num_upper: int = 4,
    condition: float = 10.0,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> KnownProblem:
    """Return the problem with lower loss w.A w / 2 - w.B tanh(v) + w.(c s^3) and a quadratic upper loss.

    The upper loss has a direct term. The lower parameters come as a matrix, for odd sizes with a scalar; the
    upper ones as a vector v and a scalar s.

    Args:
        size: number of lower scalars.
        num_upper: length of the upper vector.
        condition: of A, whose largest eigenvalue is 1.
        seed: of the random coefficients.
        dtype: of everything.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    matrix = spd(size, condition, generator=generator, dtype=dtype)
    mixing, shift, target, skew = draw(size, num_upper), draw(size), draw(size), draw(size, num_upper)
    split = size > 2 and size % 2 == 1

    def flat(lower: Params) -> Tensor:
        return (
            torch.cat([lower["weight"].reshape(-1), lower["bias"].reshape(-1)])
            if split
            else lower["weight"].reshape(-1)
        )

    def named(vector: Tensor) -> Params:
        if not split:
            return {"weight": vector.view(-1, 2) if size % 2 == 0 else vector}
        return {"bias": vector[-1], "weight": vector[:-1].view(-1, 2)}

    def force(upper: Params) -> Tensor:
        return mixing @ torch.tanh(upper["v"]) - shift * upper["s"] ** 3

    def lower_loss(lower: Params, upper: Params, _batch: Any) -> Tensor:
        w = flat(lower)
        return 0.5 * w @ (matrix @ w) - w @ force(upper)

    def upper_loss(lower: Params, upper: Params, _batch: Any) -> Tensor:
        w = flat(lower)
        return 0.5 * ((w - target) ** 2).sum() + 0.3 * (w @ skew) @ upper["v"] + 0.1 * upper["s"] ** 2

    def solution(upper: Params) -> Params:
        return named(torch.linalg.solve(matrix, force(upper)))

    return KnownProblem(
        f"quadratic-{size}-{condition:g}",
        lower_loss,
        upper_loss,
        {name: torch.zeros_like(w) for name, w in named(draw(size)).items()},
        {"v": draw(num_upper), "s": draw()},
        solution,
        1.0,
        1.0 / condition,
    )


def ridge(num_rows: int = 20, num_columns: int = 5, *, seed: int = 0) -> KnownProblem:
    """Return ridge regression with one log-penalty a weight; the upper loss is the error on held-out rows.

        w*(u) = (X^T X / n + diag(exp(u)))^{-1} X^T y / n

    Args:
        num_rows: rows for the lower level, and as many held out.
        num_columns: number of weights.
        seed: of the data.
    """
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(2 * num_rows, num_columns, generator=generator, dtype=torch.float64)
    labels = data @ torch.randn(num_columns, generator=generator, dtype=torch.float64)
    labels = labels + 0.3 * torch.randn(2 * num_rows, generator=generator, dtype=torch.float64)
    (x, held_x), (y, held_y) = data.chunk(2), labels.chunk(2)
    gram, moment = x.T @ x / num_rows, x.T @ y / num_rows

    def lower_loss(lower: Params, upper: Params, _batch: Any) -> Tensor:
        w = lower["w"]
        return 0.5 * ((x @ w - y) ** 2).mean() + 0.5 * (upper["log_penalty"].exp() * w * w).sum()

    def upper_loss(lower: Params, _upper: Params, _batch: Any) -> Tensor:
        return 0.5 * ((held_x @ lower["w"] - held_y) ** 2).mean()

    def solution(upper: Params) -> Params:
        return {"w": torch.linalg.solve(gram + torch.diag(upper["log_penalty"].exp()), moment)}

    upper = {"log_penalty": torch.linspace(-2, 0, num_columns, dtype=torch.float64)}
    values = torch.linalg.eigvalsh(gram + torch.diag(upper["log_penalty"].exp()))
    return KnownProblem(
        f"ridge-{num_columns}",
        lower_loss,
        upper_loss,
        {"w": torch.zeros(num_columns, dtype=torch.float64)},
        upper,
        solution,
        float(values.max()),
        float(values.min()),
    )


def logistic(num_rows: int = 30, num_columns: int = 4, *, seed: int = 0) -> KnownProblem:
    """Return logistic regression with one log-penalty a weight, solved and differentiated densely.

    Args:
        num_rows: rows for the lower level, and as many held out.
        num_columns: number of weights.
        seed: of the data.
    """
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(2 * num_rows, num_columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(2 * num_rows, generator=generator, dtype=torch.float64)
    labels = torch.sign(data @ torch.randn(num_columns, generator=generator, dtype=torch.float64) + noise)
    (x, held_x), (y, held_y) = data.chunk(2), labels.chunk(2)

    def lower_loss(lower: Params, upper: Params, _batch: Any) -> Tensor:
        w = lower["w"]
        fit = torch.nn.functional.softplus(-y * (x @ w)).mean()
        return fit + 0.5 * (upper["log_penalty"].exp() * w * w).sum()

    def upper_loss(lower: Params, _upper: Params, _batch: Any) -> Tensor:
        return torch.nn.functional.softplus(-held_y * (held_x @ lower["w"])).mean()

    upper = {"log_penalty": torch.linspace(-3, -1, num_columns, dtype=torch.float64)}
    lower = {"w": torch.zeros(num_columns, dtype=torch.float64)}
    return newton_problem(f"logistic-{num_columns}", lower_loss, upper_loss, lower, upper)


def tanh_network(num_rows: int = 12, width: int = 4, *, seed: int = 5) -> KnownProblem:
    """Return a one-layer tanh network whose weight penalties, one a tensor, are the upper parameters.

    The penalties make the lower problem strongly convex near the minimizer that Newton's method finds.

    Args:
        num_rows: rows for the lower level, and as many held out.
        width: hidden units.
        seed: of data and initial weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, held_x = draw(num_rows, 2), draw(num_rows, 2)
    y, held_y = torch.sin(x.sum(1)), torch.sin(held_x.sum(1))

    def outputs(lower: Params, rows: Tensor) -> Tensor:
        return torch.tanh(rows @ lower["w1"] + lower["b1"]) @ lower["w2"]

    def lower_loss(lower: Params, upper: Params, _batch: Any) -> Tensor:
        penalty = sum(
            (upper["log_penalty"][k].exp() * (lower[n] ** 2).sum() for k, n in enumerate(sorted(lower))),
            x.new_zeros(()),
        )
        return 0.5 * ((outputs(lower, x) - y) ** 2).mean() + 0.5 * penalty

    def upper_loss(lower: Params, upper: Params, _batch: Any) -> Tensor:
        return 0.5 * ((outputs(lower, held_x) - held_y) ** 2).mean() + 0.01 * (upper["log_penalty"] ** 2).sum()

    lower = {"w1": draw(2, width), "b1": draw(width), "w2": draw(width)}
    upper = {"log_penalty": torch.tensor([-2.0, -2.5, -3.0], dtype=torch.float64)}
    return newton_problem(f"tanh-{width}", lower_loss, upper_loss, lower, upper)


def newton_problem(name: str, lower_loss: Loss, upper_loss: Loss, lower: Params, upper: Params) -> KnownProblem:
    """Return the problem whose lower solution is found from `lower` to machine precision, densely.

    Newton's method with a shift that keeps its matrix positive definite. The solution's derivative is that
    of one more step with its matrix held fixed, which is the implicit-function theorem.

    Args:
        name: of the problem.
        lower_loss: pure function (lower, upper, batch) -> scalar.
        upper_loss: likewise.
        lower: where to start.
        upper: the upper parameters.

    Raises:
        ValueError: if the gradient does not vanish, or the Hessian is not positive definite where it does.
    """
    names, shapes = list(lower), [w.shape for w in lower.values()]
    sizes = [w.numel() for w in lower.values()]

    def named(vector: Tensor) -> Params:
        return {n: p.view(s) for n, p, s in zip(names, vector.split_with_sizes(sizes), shapes, strict=True)}

    def gradient(vector: Tensor, at: Params) -> Tensor:
        slope: Tensor = torch.func.grad(lambda v: lower_loss(named(v), at, None))(vector)
        return slope

    def minimizer(at: Params) -> tuple[Tensor, Tensor]:
        point = torch.cat([w.detach().reshape(-1) for w in lower.values()])
        eye = torch.eye(point.numel(), dtype=point.dtype)
        for _ in range(500):
            slope, hessian = gradient(point, at), torch.func.jacrev(gradient)(point, at)
            least = torch.linalg.eigvalsh(hessian).min()
            shift = torch.clamp(1e-2 - least, min=0.0) if least < 1e-3 else torch.zeros_like(least)
            step = torch.linalg.solve(hessian + shift * eye, slope)
            point = point - step / torch.clamp(step.norm(), min=1.0)
            if step.norm() < 1e-15 * (1 + point.norm()):
                break
        hessian = torch.func.jacrev(gradient)(point, at)
        if gradient(point, at).norm() > 1e-12 or torch.linalg.eigvalsh(hessian).min() <= 0:
            raise ValueError(f"{name}: Newton's method did not reach a minimizer from this start; choose another seed.")
        return point, hessian

    def solution(at: Params) -> Params:
        constants = {n: constant(u) for n, u in at.items()}
        point, hessian = minimizer(constants)
        return named(point - torch.linalg.solve(hessian, gradient(point, at)))

    _, hessian = minimizer(upper)
    values = torch.linalg.eigvalsh(hessian)
    return KnownProblem(name, lower_loss, upper_loss, lower, upper, solution, float(values.max()), float(values.min()))
