"""Whether a recorded run can be taken again: what methods differentiate that go back through its steps."""

from __future__ import annotations

from hypergrad._again import distance
from hypergrad._flat import Params
from hypergrad.trajectory import Trajectory


def check_replay(trajectory: Trajectory, upper: Params, name: str) -> None:
    """Raise a ValueError if the first recorded steps, taken again, end elsewhere than they did.

    One gradient a step. Derivatives are those of the run as it is taken again, so that they would be wrong.

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
    grad = steps[first].gradient(began, upper)
    apart = distance(trajectory.layout, began, ended, again, grad, last - first)
    if apart is not None:
        raise ValueError(
            f"problem {name!r}: its run cannot be taken again from its record: step {last - 1} ends "
            f"{apart:.1%} of the way from where it ended, so that derivatives through it would be wrong. "
            "Something takes part beside parameters, batch and the generators of torch, NumPy and Python: a hook on "
            "the optimizer or on a parameter, a generator or an attribute of the module's own, data that refill the "
            "tensors of earlier batches. Move it into loss, batch or a registered buffer. Engine(product_check=False) "
            "goes on all the same."
        )
