"""Linear systems with known answers, shared by the tests of the solvers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypergrad.operators import Matrix, Operator

DOUBLE = torch.float64


def matrix(n: int, condition: float, kind: str = "definite", seed: int = 0) -> Tensor:
    """Return an n x n matrix of known condition number: "definite", "indefinite" or "nonsymmetric"."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))[0]
    values = torch.logspace(0, -math.log10(condition) if n > 1 else 0, n, dtype=DOUBLE)
    if kind == "nonsymmetric":
        right = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE, generator=generator))[0]
        return left @ torch.diag(values) @ right
    if kind == "indefinite":
        values[1::2] *= -1
    full = left @ torch.diag(values) @ left.T
    return (full + full.T) / 2


def system(
    n: int, condition: float, kind: str = "definite", dtype: torch.dtype = DOUBLE
) -> tuple[Matrix, Tensor, Tensor]:
    """Return an operator, a right-hand side and the solution."""
    A = matrix(n, condition, kind)
    x = torch.randn(n, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    op = Matrix(A.to(dtype), symmetric=kind != "nonsymmetric")
    return op, (A @ x).to(dtype), x.to(dtype)


def relative_error(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


class Counting(Operator):
    """Counts the products asked of an operator."""

    def __init__(self, op: Operator) -> None:
        self.op, self.products = op, 0
        self.size, self.dtype, self.device = op.size, op.dtype, op.device
        self.symmetric, self.second_moment = op.symmetric, op.second_moment

    def mv(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.op.mv(v)

    def rmv(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.op.rmv(v)


class Operations(TorchDispatchMode):
    """Records the operations that run, views left out, as (name, is any argument of full length)."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.paused = length, False
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and not self.paused:
            full = any(isinstance(t, Tensor) and t.numel() >= self.length for t in (*args, out))
            self.seen.append((str(func), full))
        return out


class Paused(Operator):
    """An operator whose products an `Operations` does not count."""

    def __init__(self, op: Operator, operations: Operations) -> None:
        self.op, self.operations = op, operations
        self.size, self.dtype, self.device = op.size, op.dtype, op.device
        self.symmetric, self.second_moment = op.symmetric, op.second_moment

    def mv(self, v: Tensor) -> Tensor:
        self.operations.paused = True
        product = self.op.mv(v)
        self.operations.paused = False
        return product

    def rmv(self, v: Tensor) -> Tensor:
        return self.op.rmv(v)
