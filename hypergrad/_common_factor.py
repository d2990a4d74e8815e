"""Batches of matrix products with a common factor, as one product.

`vmap` leaves A b_1, ..., A b_r to a batched kernel that reads A once for each. As A (b_1 ... b_r) it is read once,
which is what batching is for: r products with the second derivative of a linear layer then cost little more than one
where memory is the limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mv.default, torch.ops.aten.addmm.default}
_FEW = 1 << 17
"""So few entries are written in the time that it takes to call the kernels."""
_MOST = 64
_BOUND = 1 << 25
"""Of the entries that one batch may write, for the sake of memory."""


class CommonFactor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, `bmm` with a factor that is the same for the whole batch, an expanded one, is one `mm`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        """Run `func`, in another way if it is such a product."""
        if func is torch.ops.aten.bmm.default:
            left, right = args
            if _is_expanded(left):
                return _common_left(left[0], right)
            if _is_expanded(right):
                return _common_left(right[0].mT, left.mT).mT
        return func(*args, **(kwargs or {}))


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, what one product reads and writes is counted, to say whether a batch of them would be faster."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._factors = self._written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        """Run `func`, and count the larger factor of a matrix product and what is written."""
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self._factors += max(x.numel() for x in args if isinstance(x, Tensor))
        if not func.is_view:
            self._written += sum(x.numel() for x in pytree.tree_leaves(out) if isinstance(x, Tensor))
        return out

    def together(self) -> int:
        """Return how many products are best computed at once, 1 for one after the other.

        A batch reads the factors once, and calls each kernel once, but what it writes leaves the caches.
        """
        if self._factors < self._written and self._written > _FEW:
            return 1
        return max(1, min(_MOST, _BOUND // max(self._written, 1)))


def _is_expanded(batch: Tensor) -> bool:
    return batch.shape[0] > 1 and batch.stride(0) == 0


def _common_left(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right[k] for each k; shapes (n, d) and (r, d, m) to (r, n, m).

    Of the two ways to write it as one product, kernels are faster in the one that reads `left` along its rows.
    """
    count, inner, columns = right.shape
    if left.stride(1) == 1:
        side_by_side = right.permute(1, 0, 2).reshape(inner, count * columns)
        return (left @ side_by_side).view(-1, count, columns).permute(1, 0, 2)
    rows = right.mT.reshape(count * columns, inner)
    return (rows @ left.mT).view(count, columns, -1).mT
