"""Reptile: move the start of the lower run towards its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hypergrad._flat import Params
from hypergrad.methods._run import pull_start, run_start
from hypergrad.methods.base import Method, Total, UpperLoss
from hypergrad.step import Recording
from hypergrad.trajectory import Trajectory


@dataclass(frozen=True)
class Reptile(Method):
    r"""An update direction for the level above: from where the lower run began to where it ended.

    .. math:: d = \Big(\frac{\partial w_0}{\partial u}\Big)^T (w_0(u) - w_K)

    with start w_0(u) and end w_K of the run; the level above steps along -d. It is not the gradient of any loss: the
    upper loss is evaluated for the record only, and its direct derivative is left out. Engine only; the lower problem
    needs `start=`.

    Cost: no derivative beyond those of the run.

    Bias: it is a direction, not a gradient.

    Reference: A. Nichol, J. Achiam, J. Schulman, "On first-order meta-learning algorithms", 2018, arXiv 1803.02999.
    """

    @property
    def serves_shards(self) -> bool:
        """Return that gradients are all it takes."""
        return True

    @property
    def second_order(self) -> bool:
        """Return that none are taken."""
        return False

    @property
    def differentiates_optimizer(self) -> bool:
        """Return that the optimizer is not read."""
        return False

    def recording(self, num_steps: int) -> Recording:
        """Return that only the last state is read."""
        return Recording(first=num_steps)

    def direction(self, trajectory: Trajectory, upper: Params) -> Params:
        """Return the direction d, by name."""
        return pull_start(trajectory, upper, run_start(trajectory, upper) - trajectory.end_flat)

    def total(
        self,
        upper_loss: UpperLoss,  # noqa: ARG002
        trajectory: Trajectory,  # noqa: ARG002
        upper: Params,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        state: Tensor | None,  # noqa: ARG002
    ) -> Total:
        """Raise a ValueError: a direction is not a hypergradient."""
        raise ValueError(
            "Reptile yields an update direction, not a hypergradient. Use it as the method of a Problem in an "
            "hg.Engine, or hg.Unrolled(truncate=0) (first-order MAML) for a gradient."
        )
