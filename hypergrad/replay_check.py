"""Whether a recorded run can be taken again: what methods differentiate that go back through its steps."""

from __future__ import annotations

import torch

from hypergrad._flat import Params
from hypergrad.trajectory import Trajectory

TOLERANCE = 0.01
"""How far from where it went a run may end that is taken again, of the way it went: beyond rounding, on any device."""


def check_replay(trajectory: Trajectory, upper: Params, name: str) -> None:
    """Raise a ValueError if the first recorded steps, taken again, end elsewhere than they did.

    One gradient a step. Derivatives are those of the run as it is taken again, so that they would be wrong.

    Each coordinate counts by its gradient: one that is zero but for rounding may go a whole step of Adam's either way.

    Args:
        trajectory: the record of a run, with optimizer states.
        upper: the parameters that it was made with.
        name: the problem, for the message.
    """
    steps = trajectory.steps
    recorded = [k for k, step in enumerate(steps) if step.flat is not None and step.taken]
    if not recorded:
        return
    first, last = recorded[0], recorded[1] if len(recorded) > 1 else len(steps)
    began = steps[first].flat
    ended = trajectory.end_flat if last == len(steps) else steps[last].flat
    states = steps[first].states
    if began is None or ended is None or states is None:
        return
    again = began
    for step in steps[first:last]:
        again, states = step.advance(again, states, upper)
    layout = trajectory.layout
    weights = steps[first].gradient(began, upper).abs()
    moved, gap, size = (layout.norm(weights * x) for x in (ended - began, again - ended, ended))
    rounding = 4 * len(steps[first:last]) * max(torch.finfo(dtype).eps for dtype in layout.dtypes)
    if gap > TOLERANCE * moved + rounding * size:
        raise ValueError(
            f"problem {name!r}: its run cannot be taken again from its record: step {last - 1} ends "
            f"{float(gap / moved):.1%} of the way from where it ended, so that derivatives through it would be wrong. "
            "Something takes part beside parameters, batch and the generators of torch, NumPy and Python: a hook on "
            "the optimizer or on a parameter, a generator or an attribute of the module's own, data that refill the "
            "tensors of earlier batches. Move it into loss, batch or a registered buffer. Engine(product_check=False) "
            "goes on all the same."
        )
