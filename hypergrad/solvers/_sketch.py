"""The randomized Nystrom approximation of a positive semidefinite operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad.operators import Operator
from hypergrad.solvers._probes import signs
from hypergrad.solvers.base import Apply


class LowRank(NamedTuple):
    """A_nys = Q core Q^T, Q with orthonormal columns.

    Attributes:
        q: Q, shape (n, r).
        core: symmetric positive semidefinite, shape (r, r).
        failed: whether the operator is not positive semidefinite, or not finite.
        complete: whether r = n, so that nothing is orthogonal to Q.
        num_products: products spent.
    """

    q: Tensor
    core: Tensor
    failed: Tensor
    complete: bool
    num_products: int


def approximate(op: Operator, rank: int, seed: int) -> LowRank:
    """Return the randomized Nystrom approximation of `op`.

    With W an orthonormal basis of the span of `rank` random vectors of signs and Y = A W + s W, a tiny shift s keeping
    W^T Y positive definite,

        A_nys = Y (W^T Y)^{-1} Y^T = B B^T,  B = Y C^{-T},  C C^T = W^T Y,  B = Q R,  core = R R^T.

    Only QR and Cholesky factorizations are used: eigen- and singular value decompositions wait for the
    device. Costs min(rank, n) products.
    """
    rank = min(rank, op.size)
    probes = signs(op.size, seed=seed, count=rank, dtype=op.dtype, device=op.device)
    w = torch.linalg.qr(probes.mT)[0]
    y = op.mm(w.mT).mT
    finite = torch.linalg.vector_norm(y) < float("inf")
    y = torch.where(finite, y, w)
    size = torch.linalg.vector_norm(y)
    y = y + torch.finfo(op.dtype).eps * op.size**0.5 * torch.where(size > 0, size, 1.0) * w
    gram = w.mT @ y
    factor, info = torch.linalg.cholesky_ex((gram + gram.mT) / 2)
    failed = info != 0
    factor = torch.where(failed, torch.eye(rank, dtype=op.dtype, device=op.device), factor)
    q, r = torch.linalg.qr(torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False))
    return LowRank(q, r @ r.mT, failed | torch.logical_not(finite), rank == op.size, rank)


def shifted_inverse(low_rank: LowRank, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of core + shift I, and whether it exists; the identity if it does not."""
    eye = torch.eye(low_rank.core.shape[0], dtype=shift.dtype, device=shift.device)
    factor, info = torch.linalg.cholesky_ex(low_rank.core + shift * eye)
    exists = info == 0
    return torch.where(exists, factor, eye), exists


def inverse(low_rank: LowRank, factor: Tensor, exists: Tensor, shift: Tensor) -> tuple[Apply, Tensor]:
    """Return v -> Q (C C^T)^{-1} Q^T v + (v - Q Q^T v) / shift, and whether it can be used; v -> v if not.

    C is a Cholesky factor, shape (r, r), that exists if `exists`. The second part is left out where it is empty.
    """
    usable = exists & torch.logical_not(low_rank.failed)
    q, within = low_rank.q, low_rank.q @ torch.cholesky_inverse(factor)
    if low_rank.complete:
        left, kept = torch.where(usable, within, 0.0), torch.where(usable, 0.0, 1.0).to(q.dtype)
        return (lambda v: torch.addmv(kept * v, left, q.mT @ v)), usable
    less, scale = torch.where(usable, q - shift * within, 0.0), torch.where(usable, 1.0 / shift, 1.0)
    return (lambda v: scale * torch.addmv(v, less, q.mT @ v, alpha=-1)), usable
