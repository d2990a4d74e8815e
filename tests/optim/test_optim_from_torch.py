"""What is taken from a torch optimizer: which parameter is in which group, its options, its state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad.optim import (
    SGD,
    Adam,
    AdamW,
    Decay,
    bind,
    decay_of,
    from_torch,
    read_options,
    read_state,
    replace_options,
)

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Biases first, without decay."""
    named = dict(net.named_parameters())
    return [
        {"params": [named["0.bias"], named["1.bias"]], "weight_decay": 0.0},
        {"params": [named["0.weight"], named["1.weight"]], "lr": 0.5},
    ]


def step(net: nn.Module, optimizer: torch.optim.Optimizer, skip: tuple[str, ...] = ()) -> None:
    for name, parameter in net.named_parameters():
        parameter.grad = None if name in skip else torch.full_like(parameter, 0.1 + 0.1 * len(name))
    optimizer.step()


def test_every_option_of_a_group_is_taken(net: nn.Module) -> None:
    taken = from_torch(torch.optim.AdamW(groups(net), lr=0.1, betas=(0.5, 0.6), eps=0.1, maximize=True, amsgrad=True))
    expected = AdamW(0.1, betas=(0.5, 0.6), eps=0.1, maximize=True, amsgrad=True, weight_decay=0.0)
    assert taken.optimizers[0] == expected
    assert taken.optimizers[1] == AdamW(0.5, betas=(0.5, 0.6), eps=0.1, maximize=True, amsgrad=True, weight_decay=0.01)


def test_a_rate_in_a_tensor_is_copied_unless_it_is_to_be_differentiated(net: nn.Module) -> None:
    rate = torch.tensor([0.1])
    (optimizer,) = from_torch(torch.optim.SGD(net.parameters(), lr=rate)).optimizers
    rate.fill_(9.0)
    assert isinstance(optimizer.lr, Tensor) and optimizer.lr.shape == () and optimizer.lr == 0.1
    learned = torch.tensor(0.1, requires_grad=True)
    (optimizer,) = from_torch(torch.optim.SGD(net.parameters(), lr=learned)).optimizers
    assert isinstance(optimizer.lr, Tensor) and optimizer.lr.requires_grad


def test_names_come_from_the_parameters_given(net: nn.Module) -> None:
    optimizer, named = torch.optim.SGD(groups(net), lr=0.1), dict(net.named_parameters())
    bound = bind(from_torch(optimizer, named), {name: value.detach() for name, value in named.items()})
    assert bound.names == ("0.bias", "1.bias", "0.weight", "1.weight")
    assert [names for _, names in bound.groups] == [("0.bias", "1.bias"), ("0.weight", "1.weight")]


def test_names_come_from_torch_where_it_recorded_them(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(reversed(list(net.named_parameters())), lr=0.1)
    copies = {name: value.detach().clone() for name, value in net.named_parameters()}
    assert bind(from_torch(optimizer), copies).names == NAMES[::-1]


def test_names_come_from_the_tensors_bound(net: nn.Module) -> None:
    bound = bind(torch.optim.SGD(groups(net), lr=0.1), dict(net.named_parameters()))
    assert bound.names == ("0.bias", "1.bias", "0.weight", "1.weight")


def test_a_single_group_takes_copies_of_its_tensors(net: nn.Module) -> None:
    other = {f"other.{name}": value.detach().clone() for name, value in reversed(list(net.named_parameters()))}
    assert bind(torch.optim.SGD(net.parameters(), lr=0.1), other).names == tuple(other)


def test_a_single_group_of_other_shapes_is_refused(net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"holds tensors of shapes .* Optimize exactly these parameters"):
        bind(torch.optim.SGD(net.parameters(), lr=0.1), {"a": torch.zeros(2)})


def test_names_come_from_position_where_all_shapes_agree(net: nn.Module) -> None:
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in net.children()], lr=0.1)
    copies = {name: value.detach().clone() for name, value in net.named_parameters()}
    bound = bind(from_torch(optimizer), copies)
    assert [names for _, names in bound.groups] == [NAMES[:2], NAMES[2:]]


def _state_in_another_order(net: nn.Module) -> Any:
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer)
    params = {name: value.detach().clone() for name, value in reversed(list(net.named_parameters()))}
    return bind(from_torch(optimizer), params)


@pytest.mark.parametrize(
    ("attempt", "pattern"),
    [
        (
            lambda net: bind(
                torch.optim.SGD(groups(net), lr=0.1),
                {name: value.detach().clone() for name, value in net.named_parameters()},
            ),
            r"has 2 param groups, and which parameter .* from_torch\(optimizer, dict\(net.named_parameters",
        ),
        (
            lambda net: from_torch(torch.optim.SGD(net.parameters()), {"w": torch.zeros(2)}),
            r"holds 4 tensors that are not among the named parameters, of shapes \[\(2, 3\), .* very tensors",
        ),
        (
            lambda net: bind(
                from_torch(torch.optim.SGD(net[0].parameters()), dict(net.named_parameters())),
                dict(net[1].named_parameters()),
            ),
            r"the optimizer also has \['0.weight', '0.bias'\], the parameters also have \['weight', 'bias'\]",
        ),
        (_state_in_another_order, r"Adam optimizer has state, but the shapes .* order of the names"),
        (lambda net: from_torch(SGD(0.1)), r"takes a torch.optim.Optimizer, got SGD"),  # type: ignore[arg-type]
    ],
    ids=["groups", "unnamed", "others", "order", "no optimizer"],
)
def test_a_match_that_cannot_be_told_is_refused_with_the_remedy(net: nn.Module, attempt: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        attempt(net)


class Renamed(torch.optim.Adam):
    """A subclass that steps as Adam does."""


class Doubled(torch.optim.SGD):
    """A subclass that steps otherwise."""

    def step(self, closure: Any = None) -> Any:
        """Step twice."""
        super().step(closure)
        return super().step(closure)


def test_a_subclass_that_keeps_step_is_taken_as_its_base(net: nn.Module) -> None:
    optimizer = Renamed(net.parameters(), lr=0.2)
    step(net, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    assert from_torch(optimizer).optimizers == (Adam(0.2),)
    del scheduler


@pytest.mark.parametrize(
    "kind", [torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Rprop, torch.optim.ASGD, Doubled]
)
def test_a_class_without_a_counterpart_is_refused(net: nn.Module, kind: Any) -> None:
    pattern = rf"{kind.__name__} cannot be differentiated: .* SGD, Adam, .* e.g. Implicit, which takes any"
    with pytest.raises(ValueError, match=pattern):
        from_torch(kind(net.parameters()))
    with pytest.raises(ValueError, match=pattern):
        read_options(kind(net.parameters()))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (torch.optim.LBFGS, {}, Decay()),
        (torch.optim.ASGD, {"weight_decay": 0.3}, Decay(coupled=0.3)),
        (torch.optim.SGD, {"weight_decay": 0.3}, Decay(coupled=0.3)),
        (torch.optim.Adafactor, {"weight_decay": 0.3}, Decay(decoupled=0.3)),
        (torch.optim.AdamW, {"weight_decay": 0.3}, Decay(decoupled=0.3)),
        (torch.optim.RAdam, {"weight_decay": 0.3, "decoupled_weight_decay": True}, Decay(decoupled=0.3)),
        (Doubled, {"weight_decay": 0.3, "lr": 0.1}, Decay(coupled=0.3)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_decay_of_any_optimizer_is_known(net: nn.Module, kind: Any, options: Any, expected: Decay) -> None:
    named = {**dict(net.named_parameters()), "more": torch.zeros(2)}
    bound = decay_of(kind(net.parameters(), **options), named)
    assert bound.names == NAMES
    assert bound.decay() == expected
    assert bound.sign() == 1.0
    params = torch.zeros(bound.layout.size)
    with pytest.raises(ValueError, match=rf"The update of {kind.__name__} is not known"):
        bound.update(params, params, bound.init(params))


def test_decay_of_tells_groups_apart(net: nn.Module) -> None:
    first, second = groups(net)
    optimizer = torch.optim.Rprop([{**first, "weight_decay": 0.1, "maximize": True}, second])
    bound = decay_of(optimizer, dict(net.named_parameters()))
    decay, sign = bound.decay().coupled, bound.sign()
    assert isinstance(decay, Tensor) and isinstance(sign, Tensor)
    torch.testing.assert_close(decay, torch.tensor([0.1] * 3 + [0.0] * 8))
    assert sign.tolist() == [-1.0] * 3 + [1.0] * 8


def test_options_are_read_again_after_a_scheduler(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(groups(net), lr=0.1)
    bound = bind(optimizer, dict(net.named_parameters()))
    assert replace_options(optimizer, bound) is bound
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(net, optimizer)
    scheduler.step()
    again = replace_options(optimizer, bound)
    assert again.layout is bound.layout
    assert [rule.lr for rule, _ in again.groups] == [0.05, 0.25]
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(ValueError, match=r"SGD now has 3 param groups, but was bound with 2"):
        replace_options(optimizer, bound)


def stateful() -> Iterator[Any]:
    yield lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    yield lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True)
    yield lambda params: torch.optim.NAdam(params, lr=0.1)
    yield lambda params: torch.optim.RAdam(params, lr=0.1, betas=(0.9, 0.9))
    yield lambda params: torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.5, lr_decay=0.2)


@pytest.mark.usefixtures("default_float64")
@pytest.mark.parametrize("make", list(stateful()))
def test_parameters_that_joined_later_keep_their_own_step_count(net: nn.Module, make: Any) -> None:
    net.double()
    optimizer, named = make(net.parameters()), dict(net.named_parameters())
    for _ in range(5):
        step(net, optimizer, skip=("0.bias",))
    bound = bind(optimizer, named)
    params = bound.layout.ravel({name: value.detach() for name, value in named.items()})
    states = bound.init(params)
    for _ in range(6):
        step(net, optimizer)
        grad = bound.layout.ravel({name: value.grad for name, value in named.items() if value.grad is not None})
        params, states = bound.update(params, grad, states)
        end = bound.layout.ravel({name: value.detach() for name, value in named.items()})
        torch.testing.assert_close(params, end, rtol=0.0, atol=1e-10)


def test_the_state_read_is_a_copy_and_reading_leaves_torchs_alone(net: nn.Module) -> None:
    optimizer = torch.optim.Adam([net.get_parameter("0.weight")])
    named = {"w": net.get_parameter("0.weight")}
    bound = bind(from_torch(optimizer, named), named)
    (first,) = read_state(optimizer, bound, named)
    assert first["step"] == 0 and not optimizer.state
    step(net, optimizer)
    (before,) = read_state(optimizer, bound, named)
    (again,), (fresh,) = bound.init(torch.zeros(6)), bound.fresh(torch.zeros(6))
    torch.testing.assert_close(again, before)
    torch.testing.assert_close(fresh, first)
    kept = {key: value.clone() for key, value in before.items() if isinstance(value, Tensor)}
    step(net, optimizer)
    assert before["step"] == 1
    assert all(torch.equal(before[key], value) for key, value in kept.items())


def test_half_precision_parameters_are_read_as_floats() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (state,) = bind(optimizer, {"w": parameter}).init(torch.ones(3))
    assert all(value.dtype == torch.float32 for value in state.values() if isinstance(value, Tensor))


def test_a_step_count_on_a_device_is_not_read_back() -> None:
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.Adam([parameter], foreach=False)
    parameter.grad = torch.empty_like(parameter)
    optimizer.state[parameter] = {
        "step": torch.empty((), device="meta"),
        "exp_avg": torch.empty(3, device="meta"),
        "exp_avg_sq": torch.empty(3, device="meta"),
    }
    (state,) = bind(optimizer, {"w": parameter}).init(torch.empty(3, device="meta"))
    assert isinstance(state["step"], Tensor)
