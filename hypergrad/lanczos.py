"""Extreme eigenvalues of a symmetric operator from a few products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.operators import Function, Operator
from hypergrad.solvers._probes import gaussian


@dataclass(frozen=True)
class Spectrum:
    """Ritz values: eigenvalues of an operator restricted to a Krylov space.

    Attributes:
        values: in ascending order, shape (m,). Each lies between the smallest and the largest eigenvalue.
        bounds: for each value a distance within which an eigenvalue lies, shape (m,).
        num_products: products spent.
    """

    values: Tensor
    bounds: Tensor
    num_products: int

    @property
    def smallest(self) -> float:
        """Return the smallest Ritz value: an upper bound on the smallest eigenvalue."""
        return float(self.values[0])

    @property
    def largest(self) -> float:
        """Return the largest Ritz value: a lower bound on the largest eigenvalue."""
        return float(self.values[-1])

    @property
    def smallest_bound(self) -> float:
        """Return a distance from `smallest` within which an eigenvalue lies."""
        return float(self.bounds[0])

    @property
    def largest_bound(self) -> float:
        """Return a distance from `largest` within which an eigenvalue lies."""
        return float(self.bounds[-1])


def lanczos(op: Operator, num_steps: int = 30, *, seed: int = 0) -> Spectrum:
    r"""Return the Ritz values of `op` over the Krylov space of a random vector, with error bounds.

    .. math:: A V_m = V_m T_m + \beta_m v_{m+1} e_m^T, \qquad T_m S = S \Theta, \qquad
        \min_j |\lambda_j - \theta_i| \le \beta_m |s_{mi}|

    with orthonormal V_m, reorthogonalized twice in full at each step, tridiagonal T_m and Ritz values theta. Where the
    space is exhausted before `num_steps`, it goes on from another random vector, so that with num_steps >= n all
    eigenvalues come out, multiple ones too.

    Cost: min(num_steps, n) products and as many vectors of memory; the values of T are read back.

    Biased: before convergence the extremes are underestimated in size; `bounds` says by how much they may move, but not
    that no eigenvalue further out was missed.

    Args:
        op: a symmetric operator. For another, see `singular_values`.
        num_steps: the most products, >= 1.
        seed: of the start vector, which comes from a hash and not from a random generator.

    Raises:
        ValueError: if `op` is not marked symmetric, has size 0, or `num_steps` < 1.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> lanczos(Matrix(torch.diag(torch.tensor([-1.0, 2.0, 5.0])), symmetric=True)).values.float()
        tensor([-1.0000,  2.0000,  5.0000])

    Reference: C. Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential and
        integral operators", 1950; B. N. Parlett, "The Symmetric Eigenvalue Problem", 1980.
    """
    if not op.symmetric:
        raise ValueError("lanczos needs an operator that is marked symmetric; singular_values takes any.")
    if op.size < 1:
        raise ValueError("lanczos needs an operator of size >= 1, got an empty one.")
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"lanczos: num_steps must be an int >= 1, got {num_steps!r}.")
    num_steps = min(num_steps, op.size)
    basis = torch.empty(num_steps, op.size, dtype=op.dtype, device=op.device)
    diagonal, coupling = [], []
    residual = gaussian(op.size, seed=seed, stream=0, dtype=op.dtype, device=op.device)
    beta, scale = 0.0, 0.0
    rounding = 10 * op.size**0.5 * torch.finfo(op.dtype).eps
    for step in range(num_steps):
        if step > 0 and beta <= rounding * scale:  # an invariant subspace: go on in its complement
            beta = 0.0
            fresh = gaussian(op.size, seed=seed, stream=step, dtype=op.dtype, device=op.device)
            residual = _orthogonal_to(basis[:step], fresh)
        if step > 0:
            coupling.append(beta)
        basis[step] = residual / torch.linalg.vector_norm(residual)
        product = op.mv(basis[step])
        alpha = float(torch.dot(basis[step], product))
        diagonal.append(alpha)
        residual = _orthogonal_to(basis[: step + 1], product)
        beta = float(torch.linalg.vector_norm(residual))
        scale = max(scale, abs(alpha), beta)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if coupling:
        off = torch.tensor(coupling, dtype=torch.float64)
        tridiagonal = tridiagonal + torch.diag(off, 1) + torch.diag(off, -1)
    if not bool(torch.isfinite(tridiagonal).all()):
        nan = torch.full((num_steps,), float("nan"), dtype=torch.float64)
        return Spectrum(nan, nan, num_steps)
    values, vectors = torch.linalg.eigh(tridiagonal)
    exhausted = num_steps == op.size
    bounds = torch.zeros_like(values) if exhausted else beta * vectors[-1].abs()
    return Spectrum(values, bounds.clamp(min=rounding * scale), num_steps)


def singular_values(op: Operator, num_steps: int = 30, *, seed: int = 0) -> Spectrum:
    """Return Ritz estimates of the singular values of any operator: square roots of those of A^T A.

    Costs two products a step. Small singular values are resolved to sqrt(eps) times the largest.

    Args:
        op: the operator A, with `rmv`.
        num_steps: the most steps, >= 1.
        seed: of the start vector.
    """
    normal = Function(lambda v: op.rmv(op.mv(v)), size=op.size, dtype=op.dtype, device=op.device, symmetric=True)
    squares = lanczos(normal, num_steps, seed=seed)
    values = squares.values.clamp(min=0.0).sqrt()
    return Spectrum(values, (squares.values + squares.bounds).clamp(min=0.0).sqrt() - values, 2 * squares.num_products)


def _orthogonal_to(basis: Tensor, vector: Tensor) -> Tensor:
    """Return `vector` less its components along the orthonormal rows of `basis`, twice for good measure."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
