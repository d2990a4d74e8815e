"""Preconditioners for CG: cheap positive definite approximations of the inverse of an operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from hypergrad.operators import Function, Operator
from hypergrad.solvers._probes import signs
from hypergrad.solvers._sketch import approximate, inverse, shifted_inverse
from hypergrad.solvers.base import Apply, Preconditioner, check_count, check_number, largest


@final
@dataclass(frozen=True)
class HutchinsonDiagonal(Preconditioner):
    """M = 1 / |diagonal of A|, estimated.

        diag(A) = E[z * A z]  for z with independent entries +1 and -1,

    averaged over `num_probes` vectors, absolute values taken, and raised to at least `floor` times the
    largest entry.

    Cost: num_probes products; then one vector operation per step. The estimate of entry i is off by about
    sqrt(sum_{j != i} A_ij^2 / num_probes): good for matrices that their diagonal dominates, of no use for
    others, where it can slow CG down. CG's answer does not depend on it, only the number of steps.

    Args:
        num_probes: random vectors to average over.
        seed: their seed; no generator's state is used.
        floor: smallest entry of the diagonal relative to the largest.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> A = Matrix(torch.diag(torch.tensor([1.0, 100.0])))
        >>> M, products = HutchinsonDiagonal(num_probes=1).build(A)
        >>> M(torch.ones(2)), products
        (tensor([1.0000, 0.0100]), 1)

    Reference: C. Bekas, E. Kokiopoulou, Y. Saad, "An estimator for the diagonal of a matrix", 2007.
    """

    num_probes: int = 8
    seed: int = 0
    floor: float = 1e-6

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("HutchinsonDiagonal", "num_probes", self.num_probes)
        check_count("HutchinsonDiagonal", "seed", self.seed, minimum=0)
        check_number("HutchinsonDiagonal", "floor", self.floor, positive=True)

    def build(self, op: Operator) -> tuple[Apply, int]:
        """Return r -> r / |diagonal|, and `num_probes`."""
        z = signs(op.size, seed=self.seed, count=self.num_probes, dtype=op.dtype, device=op.device)
        diagonal = (z * op.mm(z)).mean(0).abs()
        top = largest(diagonal)
        diagonal = torch.maximum(diagonal, self.floor * torch.where(top > 0, top, 1.0))
        # An infinite entry would make M zero there and hide that the operator is not finite.
        diagonal = torch.where(top < float("inf"), diagonal, float("nan"))
        return (lambda r: r / diagonal), self.num_probes


@final
@dataclass(frozen=True)
class SecondMoment(Preconditioner):
    """M = 1 / (v^power + eps), v the second-moment estimate of the lower level's adaptive optimizer.

    Free: no products, since Adam, RMSprop and their like have v already. With power 1/2 it is the diagonal
    they divide by, whose relation to the diagonal of the Hessian is a heuristic; CG's answer does not depend
    on it, only the number of steps, which can also rise.

    Args:
        power: 0.5 for the optimizer's own scaling, 1 for that of the empirical Fisher matrix.
        eps: added to v^power; in a damped system a value near the damping is sensible.

    Raises:
        ValueError: for an option out of range, and by `build` if the operator carries no second moment.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Function
        >>> v = torch.tensor([4.0, 16.0])
        >>> A = Function(lambda r: r, size=2, dtype=v.dtype, device="cpu", symmetric=True, second_moment=v)
        >>> M, products = SecondMoment().build(A)
        >>> M(torch.ones(2)), products
        (tensor([0.5000, 0.2500]), 0)

    Reference: D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv 1412.6980.
    """

    power: float = 0.5
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Validate the options."""
        check_number("SecondMoment", "power", self.power, positive=True)
        check_number("SecondMoment", "eps", self.eps, positive=True)

    def build(self, op: Operator) -> tuple[Apply, int]:
        """Return r -> r / (v^power + eps), and 0."""
        if op.second_moment is None:
            raise ValueError(
                "SecondMoment needs an operator with a second moment, and this one has none. "
                "Run the lower level with an adaptive "
                "optimizer that keeps one (Adam, AdamW, RMSprop, Adagrad), or use HutchinsonDiagonal()."
            )
        scale = op.second_moment.to(op.dtype) ** self.power + self.eps
        return (lambda r: r / scale), 0


@final
@dataclass(frozen=True)
class NystromPreconditioner(Preconditioner):
    """M = (A_nys + rho I)^{-1}, or the same with the space beyond the rank scaled by the last eigenvalue.

        M = Q (core + rho I)^{-1} Q^T + (I - Q Q^T) / rho,       damping = rho,
        M = Q core^{-1} Q^T + (I - Q Q^T) / lambda,              damping = None,

    with A_nys = Q core Q^T as in `Nystrom` and lambda = 1 / norm(core^{-1}), an estimate of the smallest
    eigenvalue of core. CG then sees the eigenvalues in the span of Q near 1 and the others relative to rho or
    lambda.

    Cost: min(rank, n) products; then two n x rank products per step. For spectra that fall off fast; a flat
    spectrum gains nothing. An operator that is not positive semidefinite gets M = I.

    Args:
        rank: number of random vectors.
        damping: rho, or None.
        seed: seed of the random vectors; no generator's state is used.

    Raises:
        ValueError: for an option out of range.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> A = Matrix(torch.diag(torch.tensor([2.0, 4.0])), symmetric=True)
        >>> M, products = NystromPreconditioner(rank=2).build(A)
        >>> M(torch.ones(2)), products
        (tensor([0.5000, 0.2500]), 2)

    Reference: Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nystrom Preconditioning", 2021, arXiv
        2110.02820.
    """

    rank: int = 10
    damping: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("NystromPreconditioner", "rank", self.rank)
        check_count("NystromPreconditioner", "seed", self.seed, minimum=0)
        if self.damping is not None:
            check_number("NystromPreconditioner", "damping", self.damping, positive=True)

    def build(self, op: Operator) -> tuple[Apply, int]:
        """Return r -> M r, and the products spent."""
        low_rank = approximate(op, self.rank, self.seed)
        if self.damping is None:
            factor, exists = shifted_inverse(low_rank, torch.zeros((), dtype=op.dtype, device=op.device))
            shift = 1.0 / torch.linalg.vector_norm(torch.cholesky_inverse(factor))
        else:
            shift = torch.full((), self.damping, dtype=op.dtype, device=op.device)
            factor, exists = shifted_inverse(low_rank, shift)
        apply, _ = inverse(low_rank, factor, exists, shift)
        return apply, low_rank.num_products


@final
@dataclass(frozen=True)
class PenaltyPreconditioner(Preconditioner):
    """M = (P + S)^{-1}: P a diagonal part of A that is known, S a low-rank sketch of the rest.

        A = P + R,    M = P^{-1/2} (I + S)^{-1} P^{-1/2},    S the Nystrom approximation of P^{-1/2} R P^{-1/2},

    P the sum of weight decay, damping and the diagonal of the Hessian of a `Composite` loss's penalty (by one product
    with the penalty alone, whose terms should hold one parameter each, as weight decay's do). R is then the curvature
    of the data. CG sees 1 plus the eigenvalues of P^{-1/2} R P^{-1/2} beyond the rank. Where penalties differ between
    parameters, rank 0 already takes out their spread, at no product.

    Cost: min(rank, n) products, all at once where the operator can; then two n x rank products per step. If R is not
    positive semidefinite in sight of the sketch, S = 0.

    Args:
        rank: number of random vectors, 0 for M = P^{-1}.
        seed: their seed; no generator's state is used.

    Raises:
        ValueError: for an option out of range, and by `build` if the operator knows no such part.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Damped, Matrix
        >>> A = Damped(Matrix(torch.diag(torch.tensor([1.0, 3.0])), symmetric=True), 1.0)
        >>> M, products = PenaltyPreconditioner(rank=2).build(A)
        >>> M(torch.ones(2)), products
        (tensor([0.5000, 0.2500]), 2)

    Reference: Z. Frangella, J. A. Tropp, M. Udell, "Randomized Nystrom Preconditioning", 2021, arXiv
        2110.02820, for the sketch.
    """

    rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate the options."""
        check_count("PenaltyPreconditioner", "rank", self.rank, minimum=0)
        check_count("PenaltyPreconditioner", "seed", self.seed, minimum=0)

    def build(self, op: Operator) -> tuple[Apply, int]:
        """Return r -> M r, and `rank`."""
        known = op.known_diagonal()
        if known is None:
            raise ValueError(
                "PenaltyPreconditioner needs a known part of the operator's diagonal, and there is none. Write "
                "the lower loss as hg.Composite(outputs, criterion, penalty), give its optimizer weight decay, or add "
                "damping; or use NystromPreconditioner() or HutchinsonDiagonal()."
            )
        top = largest(known)
        root = torch.maximum(known, 1e-6 * torch.where(top > 0, top, 1.0)).rsqrt()
        if self.rank == 0:
            return (lambda r: root * (root * r)), 0
        scaled = Function(
            lambda v: root * op.mv(root * v) - v,
            size=op.size,
            dtype=op.dtype,
            device=op.device,
            symmetric=True,
            mm=lambda vectors: root * op.mm(root * vectors) - vectors,
        )
        low_rank = approximate(scaled, self.rank, self.seed)
        shift = torch.ones((), dtype=op.dtype, device=op.device)
        apply, _ = inverse(low_rank, *shifted_inverse(low_rank, shift), shift)
        return (lambda r: root * apply(root * r)), low_rank.num_products
