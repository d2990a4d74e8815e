"""Every optimizer and flag takes the steps of its namesake in torch.optim."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_cases import CASES, Case, case_id, gradient, ours, start, torchs
from torch import Tensor

from hypergrad.optim import State, bind, from_torch, read_state

EXACT = {"rtol": 0.0, "atol": 1e-10}


pytestmark = pytest.mark.usefixtures("default_float64")


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("recording", [False, True], ids=["untaped", "taped"])
def test_25_steps_equal_torch(case: Case, recording: bool) -> None:
    parameter = torch.nn.Parameter(start())
    theirs = torchs((case[0], {**case[1], "foreach": recording}), [parameter])
    optimizer, params = ours(case), start()
    state = optimizer.init(params)
    for _ in range(25):
        parameter.grad = gradient(parameter.detach())
        theirs.step()
        with torch.set_grad_enabled(recording):  # without a tape the updates leave out what guards derivatives
            params, state = optimizer.update(params, gradient(params), state)
        torch.testing.assert_close(params, parameter.detach(), **EXACT)
    assert state["step"] == 25


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_an_optimizer_taken_from_torch_goes_on_where_it_was(case: Case) -> None:
    first, second = torch.nn.Parameter(start(4).reshape(2, 2)), torch.nn.Parameter(start(5))
    groups = [{"params": [first]}, {"params": [second], "lr": 0.05, "weight_decay": 0.4}]
    theirs = torchs(case, groups)
    named = {"a": first, "b": second}

    def step() -> None:
        for parameter in (first, second):
            parameter.grad = gradient(parameter.detach().reshape(-1)).reshape(parameter.shape)
        theirs.step()

    for _ in range(3):
        step()
    bound = bind(from_torch(theirs, named), named)
    assert bound.names == ("a", "b")
    params = bound.layout.ravel({name: tensor.detach() for name, tensor in named.items()})
    states = bound.init(params)
    _assert_same(case[0], copy.deepcopy(states), read_state(theirs, bound, named))
    for _ in range(5):
        step()
        grad = torch.cat([gradient(piece) for piece in params.split(bound.sizes)])
        params, states = bound.update(params, grad, states)
        torch.testing.assert_close(params, torch.cat([first.detach().reshape(-1), second.detach()]), **EXACT)
        _assert_same(case[0], copy.deepcopy(states), read_state(theirs, bound, named))


def _assert_same(name: str, ours: tuple[State, ...], theirs: tuple[State, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for state in (mine, other) if name == "SGD" else ():
            state.pop("step")  # torch's SGD counts no steps
        torch.testing.assert_close(dict(mine), dict(other), **EXACT)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_step_count_held_in_a_tensor_gives_the_same_steps(case: Case) -> None:
    optimizer, params = ours(case), start()
    state = optimizer.init(params)
    for _ in range(8):
        for step in (torch.tensor(float(state["step"])), torch.full((5,), float(state["step"]))):
            other, after = optimizer.update(params, gradient(params), {**state, "step": step})
            expected, expected_after = optimizer.update(params, gradient(params), state)
            torch.testing.assert_close(other, expected, **EXACT)
            for key, value in expected_after.items():
                torch.testing.assert_close(
                    after[key], torch.as_tensor(value, dtype=torch.float64).expand(after[key].shape), **EXACT
                )
        params, state = optimizer.update(params, gradient(params), state)


@pytest.mark.parametrize("recording", [False, True], ids=["untaped", "taped"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_an_update_changes_nothing_in_place_and_keeps_the_dtype(case: Case, recording: bool) -> None:
    optimizer, params = ours(case), start().float()
    state = optimizer.init(params)
    for _ in range(2):
        grad = gradient(params)
        tensors = [params, grad, *(value for value in state.values() if isinstance(value, Tensor))]
        versions = [tensor._version for tensor in tensors]
        with torch.set_grad_enabled(recording):
            params, state = optimizer.update(params, grad, state)
        assert [tensor._version for tensor in tensors] == versions
        assert params.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in state.values() if isinstance(value, Tensor))
