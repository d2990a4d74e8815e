"""The generators' states: taken, put back, and compared, also where a draw leaves no mark on the generator."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hypergrad._random import random_state, replaying, restore_random_state, same_state

HOST = torch.device("cpu")
DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "random": random.random,
    "random.gauss": lambda: random.gauss(0.0, 1.0),
    "numpy": lambda: float(np.random.rand()),
    "numpy's normal": lambda: float(np.random.randn()),
}


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_put_back_is_drawn_again(name: str, before: int) -> None:
    """NumPy makes normal draws in pairs and keeps the second: handing that out does not move the generator."""
    draw = DRAWS[name]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    for _ in range(before):
        draw()
    state = random_state(HOST)
    assert same_state(state, random_state(HOST))
    drawn = [draw() for _ in range(3)]
    assert not same_state(state, random_state(HOST))
    restore_random_state(state)
    assert [draw() for _ in range(3)] == drawn
    with replaying(state):
        assert draw() == drawn[0]
    after = random_state(HOST)
    restore_random_state(state)
    assert draw() == drawn[0]
    assert not same_state(after, random_state(HOST))


def test_one_stored_normal_draw_counts() -> None:
    np.random.seed(0)
    np.random.randn()
    stored = random_state(HOST, anew=True)
    second = np.random.randn()
    assert not same_state(stored, random_state(HOST))
    restore_random_state(stored)
    assert np.random.randn() == second


def test_states_that_cannot_be_taken() -> None:
    assert same_state(None, None)
    assert not same_state(None, random_state(HOST))
