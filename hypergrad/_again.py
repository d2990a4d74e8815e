"""Whether a lower run that is taken again from its record ends where it ended."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad._flat import Layout


def distance(layout: Layout, began: Tensor, ended: Tensor, again: Tensor, grad: Tensor, num_steps: int) -> float | None:
    """Return how far from where it ended a run ends that is taken again, of the way it went; None if by rounding alone.

    Each coordinate counts by its gradient: one that is zero but for rounding may go a whole step of Adam's either way.

    Args:
        layout: of all vectors here.
        began: where both began.
        ended: where the run ended.
        again: where it ends now.
        grad: the gradient at `began`.
        num_steps: taken from there.
    """
    if layout.over_shards is None and torch.equal(again, ended):
        return None
    moved, gap = (layout.norm((x - y).mul_(grad)) for x, y in ((ended, began), (again, ended)))
    size = layout.norm(ended * grad)
    rounding = 4 * num_steps * max(torch.finfo(dtype).eps for dtype in layout.dtypes)
    return float(gap / moved) if gap > _TOLERANCE * moved + rounding * size else None


_TOLERANCE = 0.01
"""Beyond rounding, on any device."""
