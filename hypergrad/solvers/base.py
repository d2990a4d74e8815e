"""What a linear solver is, what it returns, and how every solver here begins and ends.

A solver is an immutable value; `solve(op, b)` returns a `Solution` for A x = b. Nothing in a solve reads a
tensor's value unless `check_every` asks for it, so that a solve runs on an accelerator without waiting, and
inside `vmap`, `torch.compile(fullgraph=True)` and fake tensors. After convergence the remaining iterations
change nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._functional import in_transform
from hypergrad._result import Result
from hypergrad.operators import Operator

CheckEvery = Literal["auto"] | int | None
"""How often an iterative solver asks the device whether it may stop: see `CG`."""


@dataclass(frozen=True)
class Solution:
    """What a solve returns. A pytree; every field is a tensor on the device of the right-hand side.

    Attributes:
        x: the solution, or the best iterate there is, shape (n,); finite wherever the start is.
        result: the `Result` code, a 0-dim int64 tensor.
        num_steps: iterations that changed x, 0-dim int64.
        num_products: products with the operator or its transpose, all included, 0-dim int64.
        residual_norm: norm(b - A x), 0-dim; from the solver's recurrence where its class says so.
    """

    x: Tensor
    result: Tensor
    num_steps: Tensor
    num_products: Tensor
    residual_norm: Tensor


pytree.register_dataclass(Solution)


class Solver(ABC):
    """A way to solve A x = b from products with A.

    Attributes:
        requires_symmetric: whether `solve` refuses an operator that is not marked symmetric.
        uses_initial: whether `solve` accepts `x0`; a direct solver has no use for one and refuses it.
    """

    requires_symmetric: ClassVar[bool]
    uses_initial: ClassVar[bool]

    @abstractmethod
    def solve(self, op: Operator, b: Tensor, *, x0: Tensor | None = None) -> Solution:
        """Return the solution of A x = b, started at `x0` (default: zero).

        Args:
            op: the operator A.
            b: the right-hand side, shape (op.size,), of the operator's dtype.
            x0: where to start, shaped as `b`.

        Raises:
            ValueError: if the system does not suit the solver: see `check_system`.
        """


Apply = Callable[[Tensor], Tensor]
"""r -> M r."""


class Preconditioner(ABC):
    """A recipe for a positive definite map M close to the inverse of an operator."""

    @abstractmethod
    def build(self, op: Operator) -> tuple[Apply, int]:
        """Return the map r -> M r, and the number of products with `op` that building it took.

        Args:
            op: the operator to approximate the inverse of.
        """


def check_system(solver: Solver, op: Operator, b: Tensor, x0: Tensor | None) -> None:
    """Raise a ValueError that names what of the system A x = b does not suit `solver`."""
    name = type(solver).__name__
    if b.shape != (op.size,):
        raise ValueError(f"{name} expects b of shape ({op.size},), the size of the operator, got {tuple(b.shape)}.")
    if b.dtype != op.dtype:
        raise ValueError(f"{name} expects b of dtype {op.dtype}, the operator's, got {b.dtype}. Convert one of them.")
    if solver.requires_symmetric and not op.symmetric:
        raise ValueError(
            f"{name} needs a symmetric operator, and this one is not marked symmetric. Use GMRES or Exact, "
            "or declare an operator of your own symmetric=True if A equals its transpose."
        )
    if x0 is None:
        return
    if not solver.uses_initial:
        raise ValueError(
            f"{name} is a direct solver and cannot start from x0. Leave x0=None (warm_start=False), "
            "or use CG, MINRES or GMRES."
        )
    if x0.shape != b.shape or x0.dtype != b.dtype:
        raise ValueError(
            f"{name} expects x0 like b, shape {tuple(b.shape)} and dtype {b.dtype}, "
            f"got {tuple(x0.shape)} and {x0.dtype}."
        )


def reads_allowed(b: Tensor) -> bool:
    """Return whether a value of `b` could be read here: no trace, no transform, no fake tensor."""
    return type(b) in (Tensor, torch.nn.Parameter) and not in_transform()


def check_interval(check_every: CheckEvery, b: Tensor, name: str) -> int:
    """Return after how many steps to ask whether to stop; 0 for never.

    Raises:
        ValueError: if an explicit `check_every` meets a solve in which values cannot be read.
    """
    if check_every is None:
        return 0
    if check_every == "auto":
        return 1 if b.device.type == "cpu" and reads_allowed(b) else 0
    if in_transform():
        raise ValueError(
            f"{name}(check_every={check_every}) reads a value every {check_every} steps, which torch.func "
            "transforms and torch.compile do not allow. Use check_every=None, or 'auto'."
        )
    return check_every


Scalar = Tensor | float
"""A 0-dim tensor, or its value where values are read."""


class Start(NamedTuple):
    """A system A d = r for the correction to `x`, scaled so that the largest entry of r is 1 (or r is zero).

    What is no vector is a 0-dim tensor, and a Python number where `reads`.

    Attributes:
        x: the start; zero if x0 is absent or of no use.
        r: (b - A x) / scale, zero if that is not finite.
        scale: the factor that takes d and r back to the units of b.
        tol: the norm of r at which a solve may stop, in the units of r.
        b_norm: norm(b), computed without overflow.
        finite: whether b and the first residual are finite.
        num_products: products spent so far.
        reads: whether values are read at every step.
    """

    x: Tensor
    r: Tensor
    scale: Scalar
    tol: Scalar
    b_norm: Scalar
    finite: Tensor | bool
    num_products: int
    reads: bool


def start(op: Operator, b: Tensor, x0: Tensor | None, *, rtol: float, atol: float, reads: bool = False) -> Start:
    """Return the scaled system from which an iterative solver begins.

    The solve stops when norm(b - A x) <= max(rtol * norm(b), atol). The tolerance is never below eps^2 times
    the first residual: a recurrence that falls further says nothing about x. `reads` allows to decide by reading
    values, which is what a solver does that checks at every step.
    """
    if reads:
        return _start_reading(op, b, x0, rtol=rtol, atol=atol)
    size = largest(b)
    finite = size < float("inf")
    scale = torch.where(finite & (size > 0), size, 1.0)
    r = b / scale
    b_norm = torch.linalg.vector_norm(r) * scale
    x, num_products = torch.zeros_like(b), 0
    if x0 is not None:
        begun = torch.where(size > 0, x0, 0.0)
        first = b - op.mv(begun)
        size, num_products = largest(first), 1
        usable = torch.maximum(size, largest(begun)) < float("inf")
        finite = finite & usable
        scale = torch.where(finite & (size > 0), size, scale)
        x, r = torch.where(usable, begun, x), torch.where(usable, first / scale, r)
    r = torch.where(finite, r, 0.0)
    eps = torch.finfo(b.dtype).eps
    tol = (b_norm / scale * rtol).clamp(min=eps * eps)
    if atol > 0:
        tol = torch.maximum(tol, atol / scale)
    return Start(x, r, scale, tol, b_norm, finite, num_products, False)


def _start_reading(op: Operator, b: Tensor, x0: Tensor | None, *, rtol: float, atol: float) -> Start:
    """Return the same from values that are read: an operation on a number costs nothing beside one on a tensor."""
    size = largest(b).item()
    finite = size < math.inf
    scale = size if finite and size > 0 else 1.0
    r = b / scale
    b_norm = torch.linalg.vector_norm(r).item() * scale
    x, num_products = torch.zeros_like(b), 0
    if x0 is not None:
        begun = x0 if size > 0 else x
        first = b - op.mv(begun)
        size, num_products = largest(first).item(), 1
        if size < math.inf and largest(begun).item() < math.inf:
            scale = size if finite and size > 0 else scale
            x, r = begun, first / scale
        else:
            finite = False
    eps = torch.finfo(b.dtype).eps
    tol = max(b_norm / scale * rtol, eps * eps, atol / scale)
    return Start(x, r if finite else torch.zeros_like(r), scale, tol, b_norm, finite, num_products, True)


def finish(
    begun: Start, d: Tensor, residual_norm: Scalar, result: Tensor | Result, num_steps: Tensor | int, num_products: int
) -> Solution:
    """Return the solution x + scale * d; one that is not finite gives way to the start and says NON_FINITE.

    Args:
        begun: what `start` returned.
        d: the correction, in the scaled units.
        residual_norm: its residual's norm, in the scaled units.
        result: the code, if all is finite.
        num_steps: iterations that changed d.
        num_products: products since `start`.
    """
    device = d.device
    norm = residual_norm * begun.scale
    if isinstance(begun.scale, Tensor):
        x = torch.addcmul(begun.x, d, begun.scale)
        whole = largest(x) < float("inf")
        x = torch.where(whole, x, begun.x)
        result = choose(begun.finite & whole, result, Result.NON_FINITE)
        norm = torch.where(torch.as_tensor(begun.finite), norm, begun.b_norm)
    else:
        x = torch.add(begun.x, d, alpha=begun.scale)
        if not largest(x) < float("inf"):
            x, result = begun.x, Result.NON_FINITE
        if not begun.finite:
            norm, result = begun.b_norm, Result.NON_FINITE
    return Solution(
        x=x,
        result=result.tensor(device) if isinstance(result, Result) else result,
        num_steps=count(num_steps, device),
        num_products=count(begun.num_products + num_products, device),
        residual_norm=norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=d.dtype, device=device),
    )


def largest(vector: Tensor) -> Tensor:
    """Return the largest absolute entry: 0 of none, NaN where one is; below infinity only if all are finite."""
    if not vector.numel():
        return vector.new_zeros(())
    low, high = torch.aminmax(vector)  # on CPU the norm of order infinity takes ten times as long
    return torch.maximum(-low, high)


def pick(condition: Tensor, yes: Tensor, no: Tensor | float, *, reads: bool) -> Tensor:
    """Return `yes` where the 0-dim `condition` holds, else `no`: without a copy if the condition may be read.

    On CPU `torch.where` of a vector by one condition takes ten times as long as an addition.
    """
    if not reads:
        return torch.where(condition, yes, no)
    if condition:
        return yes
    return no if isinstance(no, Tensor) else torch.full_like(yes, no)


def room(vector: Tensor) -> Tensor | None:
    """Return where an update of `vector` may be written: in its place, or None in a new tensor.

    Fresh memory for a vector of a megabyte may cost more than the arithmetic. Transforms and differentiation need the
    old value.
    """
    return None if in_transform() or torch.is_grad_enabled() else vector


def choose(condition: Tensor, yes: Result | Tensor, no: Result | Tensor) -> Tensor:
    """Return the code `yes` where `condition` holds, else `no`, as a 0-dim int64 tensor."""
    codes = [int(code) if isinstance(code, Result) else code for code in (yes, no)]
    return torch.where(condition, codes[0], codes[1])


def count(value: Tensor | int, device: torch.device) -> Tensor:
    """Return a count as a 0-dim int64 tensor."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.int64, device=device)


def check_count(name: str, option: str, value: object, minimum: int = 1) -> None:
    """Raise a ValueError unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} expects {option} to be an int >= {minimum}, got {option}={value!r}.")


def check_number(name: str, option: str, value: object, *, positive: bool = False) -> None:
    """Raise a ValueError unless `value` is a finite number, non-negative or `positive`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if value > 0 or (value == 0 and not positive):
            return
    bound = "> 0" if positive else ">= 0"
    raise ValueError(f"{name} expects {option} to be a finite number {bound}, got {option}={value!r}.")


def check_check_every(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is "auto", None or an int >= 1."""
    if value is None or value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} expects check_every to be 'auto', None or an int >= 1, got check_every={value!r}.")
