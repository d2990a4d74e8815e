"""A bridge to the iterative solvers of SciPy, for comparison and for operators that only run on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from hypergrad._result import Result
from hypergrad.operators import Operator
from hypergrad.solvers.base import (
    Solution,
    Solver,
    check_count,
    check_number,
    check_system,
    finish,
    reads_allowed,
    start,
)

_sparse: Any = scipy.sparse.linalg  # SciPy is not annotated

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "bicg": _sparse.bicg,
    "bicgstab": _sparse.bicgstab,
    "cg": _sparse.cg,
    "cgs": _sparse.cgs,
    "gcrotmk": _sparse.gcrotmk,
    "gmres": _sparse.gmres,
    "lgmres": _sparse.lgmres,
    "minres": _sparse.minres,
    "qmr": _sparse.qmr,
    "tfqmr": _sparse.tfqmr,
}
_SYMMETRIC = ("cg", "minres")
_BASIS_NUMBERS = 2**26
"""How many numbers the vectors kept between two restarts of GMRES may take: 512 MiB in float64."""


@final
@dataclass(frozen=True)
class SciPy(Solver):
    """The solution by `scipy.sparse.linalg.<name>`, its products made with the operator wherever that lives.

    Solves A x = b until norm(b - A x) <= max(rtol * norm(b), atol), except "minres", which stops by its own
    rule, norm(r) <= rtol * norm(A) norm(x), with estimates of its own; where more than a tenth of b is left then, for
    x has become very large, the result is `Result.SINGULAR`.

    Cost: the products that SciPy asks for and one for the residual; "bicg" and "qmr" multiply with A^T too.
        Vectors
    travel to the host and back at every product, so it is slow for operators on an accelerator. It reads
    values: inside `vmap`, `torch.compile` and with fake tensors it is refused.

    Wrong as the chosen method is; whatever it returns, residual_norm is computed from the operator.

    Args:
        name: one of "bicg", "bicgstab", "cg", "cgs", "gcrotmk", "gmres", "lgmres", "minres", "qmr", "tfqmr".
            "cg" and "minres" need a symmetric operator.
        max_steps: the most iterations; for "gcrotmk" and "lgmres" of the outer iteration.
        rtol: relative tolerance.
        atol: absolute tolerance; refused for "minres", which has none.

    Raises:
        ValueError: for an unknown name or an option out of range; by `solve` where values cannot be read.

    Example:
        >>> import torch
        >>> from hypergrad.operators import Matrix
        >>> A = Matrix(torch.tensor([[0.0, 1.0], [-2.0, 0.0]], dtype=torch.float64))
        >>> SciPy("gmres").solve(A, torch.tensor([3.0, 4.0], dtype=torch.float64)).x.round(decimals=9)
        tensor([-2.,  3.], dtype=torch.float64)

    Reference: P. Virtanen et al., "SciPy 1.0: fundamental algorithms for scientific computing in Python",
        2020,
    arXiv 1907.10121.
    """

    name: str
    max_steps: int = 100
    rtol: float = 1e-5
    atol: float = 0.0

    requires_symmetric: ClassVar[bool] = False  # "cg" and "minres" do, and check it themselves
    uses_initial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate the options."""
        if self.name not in _FUNCTIONS:
            raise ValueError(f"SciPy expects name to be one of {sorted(_FUNCTIONS)}, got name={self.name!r}.")
        check_count("SciPy", "max_steps", self.max_steps)
        check_number("SciPy", "rtol", self.rtol)
        check_number("SciPy", "atol", self.atol)
        if self.name == "minres" and self.atol > 0:
            raise ValueError(
                f"SciPy's minres has no absolute tolerance, got atol={self.atol}. Use atol=0, or hypergrad's MINRES."
            )

    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the solution of A x = b; see the class.

        Raises:
            ValueError: if the system does not suit the solver, or values cannot be read here.
        """
        check_system(self, op, b, x0)
        if self.name in _SYMMETRIC and not op.symmetric:
            raise ValueError(
                f"SciPy({self.name!r}) needs a symmetric operator, and this one is not marked symmetric. Use "
                "SciPy('gmres'), GMRES or Exact, or declare an operator of your own symmetric=True if A equals its "
                "transpose."
            )
        if not reads_allowed(b):
            raise ValueError(
                f"SciPy({self.name!r}) reads values, which torch.func transforms, torch.compile and fake "
                "tensors do not allow. Use GMRES, or CG for a positive definite operator."
            )
        begun = start(op, b, x0, rtol=self.rtol, atol=self.atol)
        r = begun.r
        tol, norm = float(begun.tol), float(torch.linalg.vector_norm(r))
        if norm <= tol:
            return finish(begun, torch.zeros_like(r), norm, _code(0, b), 0, 0)
        counter = _Counter()

        def host(
            product: Callable[[Tensor], Tensor],
        ) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
            def multiply(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
                counter.products += 1
                return _to_numpy(product(torch.from_numpy(v.reshape(-1).copy()).to(device=b.device, dtype=b.dtype)))

            return multiply

        rhs = _to_numpy(r)
        A = _sparse.LinearOperator((op.size, op.size), matvec=host(op.mv), rmatvec=host(op.rmv), dtype=rhs.dtype)
        options: dict[str, Any] = {"maxiter": self.max_steps, "callback": counter.step}
        shrunk = 1.0
        if self.name == "minres":
            options |= {"rtol": self.rtol}
            shrunk = np.finfo(np.float64).eps ** 2  # it adds norm(b) to its estimate of norm(A)
            rhs = rhs.astype(np.float64) * shrunk
        else:
            options |= {"rtol": 0.0, "atol": tol}
        if self.name == "gmres":
            restart = min(max(20, _BASIS_NUMBERS // max(op.size, 1)), self.max_steps, op.size)
            options |= {"restart": restart, "maxiter": math.ceil(self.max_steps / restart)}
            options |= {"callback_type": "pr_norm"}
        with np.errstate(all="ignore"):
            d_host, info = _FUNCTIONS[self.name](A, rhs, **options)
        d = torch.from_numpy(d_host / shrunk).to(device=b.device, dtype=b.dtype)
        residual_norm = torch.linalg.vector_norm(r - op.mv(d))
        left = float(residual_norm) > max(0.1, 10 * self.rtol) * norm  # by its own rule that may count as converged
        code = Result.SINGULAR.tensor(b.device) if self.name == "minres" and left and info == 0 else _code(info, b)
        return finish(begun, d, residual_norm, code, counter.steps, counter.products + 1)


class _Counter:
    """Counts what happens inside SciPy."""

    def __init__(self) -> None:
        self.products = 0
        self.steps = 0

    def step(self, _: object) -> None:
        """Count an iteration: the callback."""
        self.steps += 1


def _code(info: int, b: Tensor) -> Tensor:
    """Return the result for SciPy's exit status: 0 converged, positive stopped early, negative broke down."""
    code = Result.SUCCESS if info == 0 else Result.MAX_STEPS if info > 0 else Result.SINGULAR
    return code.tensor(b.device)


def _to_numpy(v: Tensor) -> np.ndarray[Any, Any]:
    """Return `v` on the host, at least float32."""
    wide = torch.promote_types(v.dtype, torch.float32)
    return np.asarray(v.detach().to(device="cpu", dtype=wide).numpy())
