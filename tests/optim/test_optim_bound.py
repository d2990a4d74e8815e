"""A bound optimizer: groups over one vector, hyperparameters by group and by parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad._flat import Layout
from hypergrad.optim import SGD, Adam, AdamW, Bound, Decay, Opaque, RMSprop, bind

PARAMS = {"w": torch.arange(4.0).reshape(2, 2) - 1.3, "b": torch.tensor([0.5, -2.0]), "s": torch.tensor(3.0)}
GRAD = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0])


def two_groups(first: Any = SGD(0.1), second: Any = SGD(0.5, maximize=True)) -> Bound:  # noqa: B008
    return Bound(((first, ("w",)), (second, ("b", "s"))), Layout.of(PARAMS))


def step(bound: Bound, hyper: Any = None) -> Tensor:
    params = bound.layout.ravel(PARAMS)
    return bound.update(params, GRAD, bound.init(params), hyper)[0] - params


def test_one_group_is_the_optimizer_itself() -> None:
    bound = bind(Adam(0.1), PARAMS)
    assert (bound.names, bound.sizes, bound.group_sizes) == (("w", "b", "s"), (4, 2, 1), (7,))
    params = bound.layout.ravel(PARAMS)
    end, (state,) = bound.update(params, GRAD, bound.init(params))
    expected, expected_state = Adam(0.1).update(params, GRAD, Adam(0.1).init(params))
    assert torch.equal(end, expected)
    assert state.keys() == expected_state.keys()


def test_groups_step_by_their_own_rules() -> None:
    moved = step(two_groups())
    torch.testing.assert_close(moved, torch.cat([-0.1 * GRAD[:4], 0.5 * GRAD[4:]]))


@pytest.mark.parametrize(
    ("lr", "rates"),
    [
        (0.2, [0.2] * 7),
        (torch.tensor(0.2), [0.2] * 7),
        (torch.tensor([0.2]), [0.2] * 7),
        (torch.linspace(0.1, 0.7, 7), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ([0.2, torch.tensor(0.3)], [0.2] * 4 + [0.3] * 3),
        ((0.2, 0.3), [0.2] * 4 + [0.3] * 3),
        (
            {"w": torch.tensor([[0.1], [0.2]]), "b": 0.3, "s": torch.tensor(0.4, dtype=torch.float64)},
            [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4],
        ),
    ],
    ids=["float", "tensor", "one", "flat", "list", "tuple", "dict"],
)
def test_a_hyperparameter_reaches_its_part_of_the_vector(lr: Any, rates: list[float]) -> None:
    torch.testing.assert_close(step(two_groups(SGD(), SGD()), {"lr": lr}), -torch.tensor(rates) * GRAD)
    if not isinstance(lr, list | tuple):
        torch.testing.assert_close(step(bind(SGD(), PARAMS), {"lr": lr}), -torch.tensor(rates) * GRAD)


def test_rates_learned_per_parameter_receive_their_gradient() -> None:
    rates = {name: torch.full_like(value, 0.1).requires_grad_() for name, value in PARAMS.items()}
    weights = torch.arange(1.0, 8.0)
    (weights * step(two_groups(SGD(), SGD()), {"lr": rates})).sum().backward()
    gradients = {name: rate.grad for name, rate in rates.items() if rate.grad is not None}
    torch.testing.assert_close(Layout.of(PARAMS).ravel(gradients), -weights * GRAD)


def test_rates_by_parameter_and_by_group_may_be_batched() -> None:
    scales = torch.tensor([0.1, 0.4])
    for make in (
        lambda s: {"w": s, "b": s * torch.tensor([1.0, 2.0]), "s": 0.2},
        lambda s: [s, 0.3],
        lambda s: s,
    ):
        many = torch.vmap(lambda s, make=make: step(two_groups(), {"lr": make(s)}))(scales)
        torch.testing.assert_close(many, torch.stack([step(two_groups(), {"lr": make(s)}) for s in scales]))


@pytest.mark.parametrize(
    ("hyper", "pattern"),
    [
        (
            {"beta1": 0.9},
            r"hyper names \['beta1'\], which SGD does not take; allowed here are \['lr', 'weight_decay'\]",
        ),
        ({"momentum": 0.9}, r"allowed here are .* \['momentum'\] needs SGD\(momentum=...\) above 0"),
        ({"lr": torch.zeros(3)}, r"hyper\['lr'\] has shape \(3,\); .* of shape \(7,\)"),
        ({"lr": {"w": 0.1, "c": 0.1}}, r"missing \['b', 's'\], unexpected \['c'\]"),
        ({"lr": [0.1]}, r"hyper\['lr'\] has 1 values for 2 parameter groups"),
        ({"lr": {"w": torch.zeros(5), "b": 0.1, "s": 0.1}}, r"hyper\['lr'\]\['w'\] has shape \(5,\), .* broadcast to"),
        ({"lr": {"w": 0.1, "b": "0.1", "s": 0.1}}, r"hyper\['lr'\]\['b'\] is '0.1'; expected a number or a tensor"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_hyperparameter_that_has_no_place_is_refused(hyper: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        step(two_groups(), hyper)


def test_what_a_buffer_needs_is_said_for_rmsprop_too() -> None:
    bind(RMSprop(momentum=0.5), PARAMS).check_hyper(["momentum", "alpha"])
    with pytest.raises(ValueError, match=r"\['momentum'\] needs RMSprop\(momentum=...\) above 0"):
        bind(RMSprop(), PARAMS).check_hyper(["momentum"])


def test_decay_and_sign_are_floats_where_groups_agree_and_vectors_where_not() -> None:
    assert bind(SGD(weight_decay=0.3), PARAMS).decay() == Decay(coupled=0.3)
    assert bind(SGD(maximize=True), PARAMS).sign() == -1.0
    assert two_groups(SGD(), Adam()).sign() == 1.0
    assert two_groups(SGD(weight_decay=0.3), Adam(weight_decay=0.3)).decay() == Decay(coupled=0.3)
    mixed = two_groups(SGD(weight_decay=0.3), AdamW(weight_decay=0.2, maximize=True))
    signs, decay = mixed.sign(), mixed.decay()
    assert isinstance(signs, Tensor) and isinstance(decay.coupled, Tensor) and isinstance(decay.decoupled, Tensor)
    assert signs.tolist() == [1.0] * 4 + [-1.0] * 3
    torch.testing.assert_close(decay.coupled, torch.tensor([0.3] * 4 + [0.0] * 3))
    torch.testing.assert_close(decay.decoupled, torch.tensor([0.0] * 4 + [0.2] * 3))


def test_decay_takes_hyperparameters_and_keeps_their_gradient() -> None:
    decays = {name: torch.full_like(value, 0.1).requires_grad_() for name, value in PARAMS.items()}
    for bound in (two_groups(), bind(SGD(), PARAMS)):
        coupled = bound.decay({"weight_decay": decays}).coupled
        assert isinstance(coupled, Tensor) and coupled.shape == (7,)
        torch.testing.assert_close(torch.autograd.grad(coupled.sum(), decays["w"])[0], torch.ones(2, 2))


def test_learning_rate_and_second_moment_are_flat() -> None:
    bound = two_groups(Adam(0.1), Adam(lambda step: 0.5 / (1 + step)))
    params = bound.layout.ravel(PARAMS)
    _, states = bound.update(params, GRAD, bound.init(params))
    rates, moment = bound.learning_rate(states), bound.second_moment(states)
    assert isinstance(rates, Tensor) and isinstance(moment, Tensor)
    torch.testing.assert_close(rates, torch.tensor([0.1] * 4 + [0.25] * 3))
    torch.testing.assert_close(moment, 0.001 * GRAD**2)
    assert two_groups(Adam(), SGD()).second_moment(({"exp_avg_sq": params[:4]}, {"step": 0})) is None
    assert bind(SGD(0.1), PARAMS).learning_rate(({"step": 0},), {"lr": 0.7}) == 0.7


def test_bind_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(ValueError, match=r"one of hypergrad.optim or torch.optim, got float"):
        bind(0.1, PARAMS)  # type: ignore[arg-type]


def test_an_opaque_optimizer_does_not_step() -> None:
    with pytest.raises(ValueError, match=r"The update of LBFGS is not known .* Implicit takes any"):
        step(bind(Opaque(of="LBFGS"), PARAMS))
