"""The batches of a problem with tasks, one task at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def split(batch: Any) -> list[Any]:
    """Return the batch of each task; every tensor in `batch` leads with the number of tasks."""
    leaves, spec = pytree.tree_flatten(batch)
    count = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
    return [
        pytree.tree_unflatten([leaf[i] if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        for i in range(count)
    ]
