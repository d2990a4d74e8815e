"""An optimizer of which only the weight decay is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hypergrad.optim._algebra import Scalar
from hypergrad.optim.base import Decay, Hyper, LearningRate, Optimizer, State


@dataclass(frozen=True, kw_only=True)
class Opaque(Optimizer):
    """An optimizer known only by its weight decay and `maximize`: all that a stationarity condition needs.

    Made by `from_torch(optimizer, opaque=True)` for methods that do not differentiate the optimizer.

    Args:
        of: name of the optimizer's class.
        coupled: weight decay that is added to the gradient.
        decoupled: weight decay that scales the parameters.
        maximize: ascend.

    Example:
        >>> Opaque(of="LBFGS").decay()
        Decay(coupled=0.0, decoupled=0.0)
    """

    HYPER: ClassVar[frozenset[str]] = frozenset()

    lr: LearningRate = field(default=0.0, kw_only=False)
    of: str
    coupled: Scalar = 0.0
    decoupled: Scalar = 0.0

    def init(self, params: Tensor) -> State:  # noqa: ARG002
        """Return a state that holds nothing."""
        return {"step": 0}

    def update(
        self,
        params: Tensor,  # noqa: ARG002
        grad: Tensor,  # noqa: ARG002
        state: State,  # noqa: ARG002
        hyper: Hyper | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, State]:
        """Raise a ValueError: the rule is not known."""
        raise ValueError(
            f"The update of {self.of} is not known here, so it cannot be run or differentiated. Unrolled, "
            "ForwardUnrolled, SAMA and OneStep need an optimizer of hypergrad.optim or one that from_torch "
            "takes; Implicit takes any."
        )

    def decay(self, hyper: Hyper | None = None) -> Decay:  # noqa: ARG002
        """Return the weight decay."""
        return Decay(coupled=self.coupled, decoupled=self.decoupled)
