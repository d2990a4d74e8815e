"""Preconditioners for CG: cheap positive definite approximations of the inverse of an operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from hypergrad.operators import Operator


class Preconditioner(ABC):
    """A recipe for a positive definite map M close to the inverse of an operator."""

    @abstractmethod
    def build(self, op: Operator) -> tuple[Callable[[Tensor], Tensor], int]:
        """Return the map r -> M r, and the number of products with `op` that building it took."""
