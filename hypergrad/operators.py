"""Linear operators on flat vectors: what a solver needs to know of a matrix that nobody forms.

An operator multiplies: `mv(v)` is A v and `rmv(v)` is A^T v, for v of shape (size,). The operators here
combine others or wrap a matrix or a function; those built from a loss (Hessians and their like) live with the
methods that need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor


class Operator(ABC):
    """A square linear map A on vectors of shape (size,).

    Attributes:
        size: the length n of the vectors.
        dtype: the dtype of vectors and products.
        device: their device.
        symmetric: whether A = A^T is promised. Solvers that need symmetry refuse an operator without the
            promise.
        second_moment: a flat vector with an adaptive optimizer's second-moment estimate, for preconditioning,
            or None.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    symmetric: bool
    second_moment: Tensor | None

    @abstractmethod
    def mv(self, v: Tensor) -> Tensor:
        """Return A v."""

    @abstractmethod
    def rmv(self, v: Tensor) -> Tensor:
        """Return A^T v."""

    def mm(self, vectors: Tensor) -> Tensor:
        """Return A v for each row v of `vectors`, as rows; shapes (k, size). k products, at once where that helps."""
        return torch.stack([self.mv(v) for v in vectors.unbind(0)]) if len(vectors) else torch.zeros_like(vectors)

    def known_diagonal(self) -> Tensor | None:
        """Return the diagonal of a positive definite diagonal part of A that is known as such, or None.

        Weight decay, damping and the penalty of a `Composite` are such parts; preconditioners use it.
        """
        return None


@final
class Matrix(Operator):
    """The operator of a dense matrix.

    A product costs n^2 multiplications. The promise `symmetric=True` is taken on trust: checking it would
    read values.

    Args:
        dense: the matrix, shape (n, n), floating point.
        symmetric: promise that `dense` equals its transpose.

    Raises:
        ValueError: if `dense` is not a square floating-point matrix.

    Example:
        >>> import torch
        >>> Matrix(torch.diag(torch.tensor([1.0, 2.0])), symmetric=True).mv(torch.ones(2))
        tensor([1., 2.])
    """

    def __init__(self, dense: Tensor, symmetric: bool = False) -> None:
        """Wrap `dense`."""
        if dense.ndim != 2 or dense.shape[0] != dense.shape[1]:
            raise ValueError(f"Matrix expects a square matrix, shape (n, n), got shape {tuple(dense.shape)}.")
        if not dense.is_floating_point():
            raise ValueError(f"Matrix expects floating-point entries, got {dense.dtype}. Convert it with .double().")
        self.dense = dense
        self.size = dense.shape[0]
        self.dtype = dense.dtype
        self.device = dense.device
        self.symmetric = bool(symmetric)
        self.second_moment = None

    def mv(self, v: Tensor) -> Tensor:
        """Return A v."""
        return self.dense @ v

    def rmv(self, v: Tensor) -> Tensor:
        """Return A^T v."""
        return v @ self.dense

    def mm(self, vectors: Tensor) -> Tensor:
        """Return A v for each row v."""
        return vectors @ self.dense.mT


@final
class Function(Operator):
    """The operator of a function that multiplies.

    Args:
        mv: v -> A v, linear in v; both of shape (size,).
        rmv: v -> A^T v. May be left out; a symmetric operator then answers with `mv`, another raises when
            asked.
        size: the length n of the vectors.
        dtype: the dtype of vectors and products.
        device: their device.
        symmetric: promise that A = A^T.
        second_moment: the optimizer's second-moment estimate as a flat vector, if there is one.
        mm: (k, size) -> (k, size), A applied to each row; left out, one product after the other.
        known_diagonal: what `Operator.known_diagonal` returns, called when that is asked for.

    Raises:
        ValueError: if `size` is negative or `second_moment` does not have shape (size,).

    Example:
        >>> import torch
        >>> twice = Function(lambda v: 2 * v, size=3, dtype=torch.float32, device="cpu", symmetric=True)
        >>> twice.rmv(torch.ones(3))
        tensor([2., 2., 2.])
    """

    def __init__(
        self,
        mv: Callable[[Tensor], Tensor],
        rmv: Callable[[Tensor], Tensor] | None = None,
        *,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        symmetric: bool = False,
        second_moment: Tensor | None = None,
        mm: Callable[[Tensor], Tensor] | None = None,
        known_diagonal: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Wrap `mv` and `rmv`."""
        if size < 0:
            raise ValueError(f"Function expects size >= 0, the length of its vectors, got size={size}.")
        if second_moment is not None and second_moment.shape != (size,):
            raise ValueError(
                f"Function expects second_moment of shape ({size},), got {tuple(second_moment.shape)}. "
                "Pass it as one flat vector in the order of the operator's vectors."
            )
        self._mv = mv
        self._rmv = rmv
        self._mm = mm
        self._known_diagonal = known_diagonal
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = bool(symmetric)
        self.second_moment = second_moment

    def mv(self, v: Tensor) -> Tensor:
        """Return A v."""
        return self._mv(v)

    def rmv(self, v: Tensor) -> Tensor:
        """Return A^T v.

        Raises:
            ValueError: if the operator is neither symmetric nor given `rmv`.
        """
        if self._rmv is not None:
            return self._rmv(v)
        if self.symmetric:
            return self._mv(v)
        raise ValueError(
            "This Function has no transposed product: it was built without rmv and is not symmetric. "
            "Pass rmv=, or symmetric=True if A equals its transpose."
        )

    def mm(self, vectors: Tensor) -> Tensor:
        """Return A v for each row v."""
        return super().mm(vectors) if self._mm is None or not len(vectors) else self._mm(vectors)

    def known_diagonal(self) -> Tensor | None:
        """Return what the caller gave."""
        return None if self._known_diagonal is None else self._known_diagonal()


@final
class Damped(Operator):
    """A + damping * I: its eigenvalues are those of A, moved up by `damping`.

    One vector operation beyond the product of A. A solve with it is biased: the answer is that of a loss with
    an added `damping / 2 * norm(x)^2`.

    Args:
        op: the operator A.
        damping: a number, or a tensor that broadcasts to a vector (a tensor may need gradients or be batched
            by vmap).

    Raises:
        ValueError: if `damping` is a number that is negative or not finite.

    Example:
        >>> import torch
        >>> Damped(Matrix(torch.zeros(2, 2)), 0.5).mv(torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, op: Operator, damping: float | Tensor) -> None:
        """Add `damping` to the diagonal of `op`."""
        if not isinstance(damping, Tensor) and not 0.0 <= damping < float("inf"):
            raise ValueError(f"Damped expects a finite damping >= 0, got damping={damping}.")
        self.op = op
        self.damping = damping
        self.size = op.size
        self.dtype = op.dtype
        self.device = op.device
        self.symmetric = op.symmetric
        self.second_moment = op.second_moment

    def mv(self, v: Tensor) -> Tensor:
        """Return A v + damping * v."""
        return self._add(self.op.mv(v), v)

    def rmv(self, v: Tensor) -> Tensor:
        """Return A^T v + damping * v."""
        return self._add(self.op.rmv(v), v)

    def mm(self, vectors: Tensor) -> Tensor:
        """Return A v + damping * v for each row v."""
        return self._add(self.op.mm(vectors), vectors)

    def known_diagonal(self) -> Tensor | None:
        """Return that of A, plus the damping."""
        known = self.op.known_diagonal()
        if known is None and not isinstance(self.damping, Tensor) and self.damping == 0:
            return None
        return self._add(
            torch.zeros((), dtype=self.dtype, device=self.device) if known is None else known, self._ones()
        )

    def _ones(self) -> Tensor:
        return torch.ones(self.size, dtype=self.dtype, device=self.device)

    def _add(self, product: Tensor, v: Tensor) -> Tensor:
        if isinstance(self.damping, Tensor):
            return torch.addcmul(product, v, self.damping.to(v.dtype))
        return product.add(v, alpha=self.damping)


@final
class Scaled(Operator):
    """factor * A. A negative factor turns a positive definite operator into a negative definite one.

    Args:
        op: the operator A.
        factor: a number or a 0-dim tensor.

    Example:
        >>> import torch
        >>> Scaled(Matrix(torch.eye(2)), 3.0).mv(torch.ones(2))
        tensor([3., 3.])
    """

    def __init__(self, op: Operator, factor: float | Tensor) -> None:
        """Multiply `op` by `factor`."""
        self.op = op
        self.factor = factor
        self.size = op.size
        self.dtype = op.dtype
        self.device = op.device
        self.symmetric = op.symmetric
        self.second_moment = op.second_moment

    def mv(self, v: Tensor) -> Tensor:
        """Return factor * A v."""
        return self.op.mv(v) * self.factor

    def rmv(self, v: Tensor) -> Tensor:
        """Return factor * A^T v."""
        return self.op.rmv(v) * self.factor

    def mm(self, vectors: Tensor) -> Tensor:
        """Return factor * A v for each row v."""
        return self.op.mm(vectors) * self.factor


@final
class Sum(Operator):
    """A_1 + A_2 + ...: one product of each operand per product; symmetric if all operands are.

    `second_moment` is that of the first operand that has one.

    Args:
        ops: the operands, all of one size, dtype and device.

    Raises:
        ValueError: if `ops` is empty or its members differ in size, dtype or device.

    Example:
        >>> import torch
        >>> Sum([Matrix(torch.eye(2)), Matrix(torch.ones(2, 2))]).mv(torch.ones(2))
        tensor([3., 3.])
    """

    def __init__(self, ops: Sequence[Operator]) -> None:
        """Add `ops`."""
        if not ops:
            raise ValueError("Sum expects at least one operator, got none.")
        first = ops[0]
        for index, op in enumerate(ops):
            if (op.size, op.dtype, op.device) != (first.size, first.dtype, first.device):
                raise ValueError(
                    f"Sum expects operators of one size, dtype and device; operator {index} has "
                    f"({op.size}, {op.dtype}, {op.device}), "
                    f"operator 0 has ({first.size}, {first.dtype}, {first.device})."
                )
        self.ops = tuple(ops)
        self.size = first.size
        self.dtype = first.dtype
        self.device = first.device
        self.symmetric = all(op.symmetric for op in ops)
        self.second_moment = next((op.second_moment for op in ops if op.second_moment is not None), None)

    def mv(self, v: Tensor) -> Tensor:
        """Return the sum of A_i v."""
        product = self.ops[0].mv(v)
        for op in self.ops[1:]:
            product = product + op.mv(v)
        return product

    def rmv(self, v: Tensor) -> Tensor:
        """Return the sum of A_i^T v."""
        product = self.ops[0].rmv(v)
        for op in self.ops[1:]:
            product = product + op.rmv(v)
        return product


@final
class Transposed(Operator):
    """A^T: `mv` and `rmv` exchanged.

    Args:
        op: the operator A; its `rmv` must be available.

    Example:
        >>> import torch
        >>> Transposed(Matrix(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))).mv(torch.tensor([1.0, 0.0]))
        tensor([0., 1.])
    """

    def __init__(self, op: Operator) -> None:
        """Transpose `op`."""
        self.op = op
        self.size = op.size
        self.dtype = op.dtype
        self.device = op.device
        self.symmetric = op.symmetric
        self.second_moment = op.second_moment

    def mv(self, v: Tensor) -> Tensor:
        """Return A^T v."""
        return self.op.rmv(v)

    def rmv(self, v: Tensor) -> Tensor:
        """Return A v."""
        return self.op.mv(v)


def dense(op: Operator) -> Tensor:
    """Return the matrix of `op`, shape (size, size), by applying `mv` to the columns of the identity.

    Costs `size` products and size^2 numbers.

    Args:
        op: the operator.

    Example:
        >>> import torch
        >>> dense(Function(lambda v: 2 * v, size=2, dtype=torch.float32, device="cpu"))
        tensor([[2., 0.],
                [0., 2.]])
    """
    return op.mm(torch.eye(op.size, dtype=op.dtype, device=op.device)).mT
