"""What first-order methods read off the end of a lower run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypergrad._autograd import as_leaves, by_autograd, grads, is_connected, leaf
from hypergrad._flat import Params
from hypergrad._functional import Loss, scalar
from hypergrad._random import RandomState, random_state, replaying
from hypergrad._tape import add, named, upper_gradient, vjp
from hypergrad._untouched import going_on_from
from hypergrad.averaged import over_parts, over_ranks
from hypergrad.methods._refusals import check_run
from hypergrad.methods.base import Method, UpperLoss
from hypergrad.trajectory import Trajectory


def last_learning_rate(method: Method, trajectory: Trajectory, upper: Params) -> Tensor | float:
    """Return the learning rate of the run's last step: a number, or a flat vector where parameters differ in it."""
    check_run(method, trajectory, "takes its step size from the lower run unless step_size is given")
    last = trajectory.steps[-1]
    states = last.states if last.states is not None else trajectory.end_states
    return last.recipe.optimizer.learning_rate(states, last.recipe.hyper_values(upper, last.index))


def loss_gradient(trajectory: Trajectory, flat: Tensor, upper: Params) -> Params:
    """Return the derivative in `upper` of the lower loss at `flat`, with the run's last batch and random draws.

    Of an average over ranks, this rank's share: what is linear in it is reduced once, at its end.
    """
    ((batch, random),) = trajectory.samples(1)

    def of_part(loss: Loss, part: Any) -> Params:
        return upper_gradient(lambda u: scalar(loss(trajectory.named(flat), u, part), "the lower loss"), upper)

    with replaying(random), going_on_from(trajectory.buffers):
        return over_parts(minimized(trajectory), batch, of_part)


def minimized(trajectory: Trajectory) -> Loss:
    """Return the loss that stands for the lower level in its derivatives."""
    loss = trajectory.response or trajectory.loss
    assert loss is not None
    return loss


Sample = tuple[Any, RandomState | None]
"""A batch and the random draws that go with it."""


def objective(
    method: Method, trajectory: Trajectory, flat: Tensor, upper: Params, sample: Sample | None = None
) -> Tensor:
    """Return what the lower level minimizes: its loss (negated under `maximize`) plus coupled weight decay.

    On `sample`, or the run's last batch and random draws.
    """
    loss = trajectory.response or trajectory.loss
    assert loss is not None
    batch, random = trajectory.samples(1)[0] if sample is None else sample
    with replaying(random), going_on_from(trajectory.buffers):
        value = scalar(loss(trajectory.named(flat), upper, batch), "the lower loss")
    if not trajectory.steps:
        return value
    last = trajectory.steps[-1]
    bound = last.recipe.optimizer
    sign = bound.sign()
    if isinstance(sign, Tensor):
        raise ValueError(
            f"{type(method).__name__}: some parameter groups of the lower optimizer maximize and others minimize, so "
            "the lower level has no single objective to penalize. Use hg.Implicit."
        )
    decay = bound.decay(last.recipe.hyper_values(upper, last.index)).coupled
    return sign * value + 0.5 * torch.sum(decay * flat * flat)


def upper_objective(upper_loss: UpperLoss, trajectory: Trajectory, batch: Any) -> Callable[[Tensor, Params], Tensor]:
    """Return the upper loss as a function (flat lower, upper), with the same random draws at every call."""
    drawn = random_state(trajectory.layout.device)

    def value(flat: Tensor, upper: Params) -> Tensor:
        with replaying(drawn):
            return scalar(upper_loss(trajectory.named(flat), upper, batch), "the upper loss")

    return value


def joint_gradient(
    function: Callable[[Tensor, Params], Tensor], flat: Tensor, upper: Params
) -> tuple[Tensor, Tensor, Params]:
    """Return the value of `function` and its gradients in the flat lower and in `upper`, from one backward pass."""
    if not by_autograd():
        (lower_grad, upper_grad), value = torch.func.grad_and_value(function, argnums=(0, 1))(flat, upper)
        return value, lower_grad, upper_grad
    with torch.enable_grad():
        point, leaves = leaf(flat), as_leaves(upper)
        value = function(point, leaves)
        if not is_connected(value):
            return value.detach(), torch.zeros_like(flat), {}
        slope, *others = grads([value], [point, *leaves.values()])
    return value.detach(), torch.zeros_like(flat) if slope is None else slope, named(leaves, others)


def require_dependence(upper: Params, grad: Params) -> None:
    """Raise a ValueError if no gradient in `upper` was found."""
    if not grad:
        raise ValueError(
            f"nothing depends on upper={list(upper)}: neither the upper loss nor the lower level reads it. Use the "
            "`upper` argument inside the losses, and do not detach it."
        )


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
    norm = trajectory.layout.norm(signed)
    unit = signed / torch.where(norm > 0, norm, 1.0)
    ahead = loss_gradient(trajectory, trajectory.end_flat + epsilon * unit, upper)
    behind = loss_gradient(trajectory, trajectory.end_flat - epsilon * unit, upper)
    scale = norm / (2 * epsilon)
    quotient = {name: (ahead[name] - behind[name]) * scale for name in ahead if name in behind}
    quotient = over_ranks(minimized(trajectory), quotient, upper)
    return add(quotient, decay_gradient(trajectory, upper, direction))


def run_start(trajectory: Trajectory, upper: Params) -> Tensor:
    """Return where the run begins as a function of `upper`, flat."""
    assert trajectory.start is not None
    return trajectory.layout.ravel(trajectory.start(upper))


def pull_start(trajectory: Trajectory, upper: Params, cotangent: Tensor) -> Params:
    """Return the cotangent of `upper` from one of the run's start."""
    if not by_autograd():
        _, pullback = vjp(lambda u: run_start(trajectory, u), upper)
        pulled: Params = pullback(cotangent)[0]
        return pulled
    with torch.enable_grad():
        leaves = as_leaves(upper)
        begun = run_start(trajectory, leaves)
        if not is_connected(begun):
            return {}
        return named(leaves, grads([begun], list(leaves.values()), [cotangent]))
