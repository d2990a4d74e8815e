"""A loss that shows its inner structure, so that Gauss-Newton curvature can be read off it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hypergrad._flat import Params
from hypergrad._functional import arity


@dataclass(frozen=True)
class Composite:
    r"""A lower loss criterion(outputs(lower)) + penalty(lower), for `Implicit(curvature="gauss_newton")`.

    .. math:: L(w, u) = \ell(z(w, u), u) + p(w, u), \qquad G = J^T B J + \nabla^2_w p

    with outputs z, J = dz/dw, B the Hessian of the criterion in z. G is positive semi-definite wherever the criterion
    is convex in the outputs and the penalty in the parameters, and equals the Hessian where z is linear in w or the
    criterion's gradient vanishes. The penalty keeps its exact Hessian. A `Composite` is itself a loss: call it anywhere
    a loss is expected.

    Args:
        outputs: function (lower, upper, batch) -> Tensor, the model's predictions, any shape.
        criterion: function (outputs, upper, batch) -> scalar, or (outputs, batch) -> scalar.
        penalty: function (lower, upper, batch) -> scalar, or (lower, upper) -> scalar; None for none. Of either, a
            third argument that has a default other than None keeps it.

    Example:
        >>> import torch, hypergrad as hg
        >>> loss = hg.Composite(
        ...     outputs=lambda lower, upper, batch: batch[0] @ lower["w"],
        ...     criterion=lambda outputs, upper, batch: ((outputs - batch[1]) ** 2).mean(),
        ...     penalty=lambda lower, upper, batch: upper["l"].exp() * (lower["w"] ** 2).sum(),
        ... )
        >>> loss({"w": torch.zeros(2)}, {"l": torch.zeros(())}, (torch.eye(2), torch.ones(2)))
        tensor(1.)
    """

    outputs: Callable[..., Tensor]
    criterion: Callable[..., Tensor]
    penalty: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        """Check that the parts are functions."""
        for name in ("outputs", "criterion", "penalty"):
            part = getattr(self, name)
            if not callable(part) and not (name == "penalty" and part is None):
                raise ValueError(f"Composite: {name} must be a function, got {part!r}.")

    def criterion_at(self, outputs: Tensor, upper: Params, batch: Any) -> Tensor:
        """Return the criterion at `outputs`."""
        if arity(self.criterion, 3) == 2:
            return self.criterion(outputs, batch)
        return self.criterion(outputs, upper, batch)

    def penalty_at(self, lower: Params, upper: Params, batch: Any) -> Tensor | None:
        """Return the penalty at `lower`, or None where there is none."""
        if self.penalty is None:
            return None
        if arity(self.penalty, 3) == 2:
            return self.penalty(lower, upper)
        return self.penalty(lower, upper, batch)

    def __call__(self, lower: Params, upper: Params, batch: Any) -> Tensor:
        """Return the loss, a scalar."""
        value = self.criterion_at(self.outputs(lower, upper, batch), upper, batch)
        penalty = self.penalty_at(lower, upper, batch)
        return value if penalty is None else value + penalty
