"""What first-order methods read off the end of a lower run."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad._flat import Params
from hypergrad._functional import in_transform, scalar
from hypergrad._random import replaying
from hypergrad._tape import add, named, upper_gradient, vjp
from hypergrad.methods._refusals import check_run
from hypergrad.methods.base import Method
from hypergrad.trajectory import Trajectory


def last_learning_rate(method: Method, trajectory: Trajectory, upper: Params) -> Tensor | float:
    """Return the learning rate of the run's last step: a number, or a flat vector where parameters differ in it."""
    check_run(method, trajectory, "takes its step size from the lower run unless step_size is given")
    last = trajectory.steps[-1]
    states = last.states if last.states is not None else trajectory.end_states
    return last.recipe.optimizer.learning_rate(states, last.recipe.hyper_values(upper, last.index))


def loss_gradient(trajectory: Trajectory, flat: Tensor, upper: Params) -> Params:
    """Return the derivative in `upper` of the lower loss at `flat`, with the run's last batch and random draws."""
    loss = trajectory.response or trajectory.loss
    assert loss is not None
    ((batch, random),) = trajectory.samples(1)

    def value(u: Params) -> Tensor:
        return scalar(loss(trajectory.named(flat), u, batch), "the lower loss")

    with replaying(random):
        return upper_gradient(value, upper)


def objective(trajectory: Trajectory, flat: Tensor, upper: Params) -> Tensor:
    """Return what the lower level minimizes: its loss (negated under `maximize`) plus coupled weight decay."""
    loss = trajectory.response or trajectory.loss
    assert loss is not None
    ((batch, random),) = trajectory.samples(1)
    with replaying(random):
        value = scalar(loss(trajectory.named(flat), upper, batch), "the lower loss")
    if not trajectory.steps:
        return value
    last = trajectory.steps[-1]
    bound = last.recipe.optimizer
    sign = bound.sign()
    if isinstance(sign, Tensor):
        raise ValueError(
            "Penalty: some parameter groups of the lower optimizer maximize and others minimize, so the lower level "
            "has no single objective to penalize. Use hg.Implicit."
        )
    decay = bound.decay(last.recipe.hyper_values(upper, last.index)).coupled
    return sign * value + 0.5 * torch.sum(decay * flat * flat)


def decay_gradient(trajectory: Trajectory, upper: Params, direction: Tensor) -> Params:
    """Return the derivative in `upper` of <weight decay * lower, direction>, if the decay is a function of `upper`."""
    if not trajectory.steps or "weight_decay" not in trajectory.steps[-1].recipe.hyper:
        return {}
    last = trajectory.steps[-1]

    def pairing(u: Params) -> Tensor:
        decay = last.recipe.optimizer.decay(last.recipe.hyper_values(u, last.index)).coupled
        return torch.dot(decay * trajectory.end_flat, direction)

    return upper_gradient(pairing, upper)


def difference_quotient(trajectory: Trajectory, upper: Params, direction: Tensor, epsilon: float) -> Params:
    """Return (dF/du)^T direction by a central difference of two first-order gradients around the end of the run.

    The lower parameters are moved by epsilon along the unit vector of `direction`; the error is O(epsilon^2).
    """
    signed = direction
    if trajectory.steps:
        sign = trajectory.steps[-1].recipe.optimizer.sign()
        signed = direction if isinstance(sign, float) and sign == 1.0 else sign * direction
    norm = torch.linalg.vector_norm(signed)
    unit = signed / torch.where(norm > 0, norm, 1.0)
    ahead = loss_gradient(trajectory, trajectory.end_flat + epsilon * unit, upper)
    behind = loss_gradient(trajectory, trajectory.end_flat - epsilon * unit, upper)
    scale = norm / (2 * epsilon)
    quotient = {name: (ahead[name] - behind[name]) * scale for name in ahead if name in behind}
    return add(quotient, decay_gradient(trajectory, upper, direction))


def run_start(trajectory: Trajectory, upper: Params) -> Tensor:
    """Return where the run begins as a function of `upper`, flat."""
    assert trajectory.start is not None
    return trajectory.layout.ravel(trajectory.start(upper))


def pull_start(trajectory: Trajectory, upper: Params, cotangent: Tensor) -> Params:
    """Return the cotangent of `upper` from one of the run's start."""
    if in_transform():
        _, pullback = vjp(lambda u: run_start(trajectory, u), upper)
        pulled: Params = pullback(cotangent)[0]
        return pulled
    with torch.enable_grad():
        leaves = {name: u.detach().requires_grad_() for name, u in upper.items()}
        begun = run_start(trajectory, leaves)
        if not begun.requires_grad:
            return {}
        return named(leaves, torch.autograd.grad(begun, list(leaves.values()), cotangent, allow_unused=True))
