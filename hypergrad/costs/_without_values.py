"""Computations on tensors that have shapes but no values: nothing is allocated, drawn or changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from hypergrad._random import random_state, restore_random_state
from hypergrad.step import Recording, Step, take
from hypergrad.trajectory import Trajectory

Shapes = FakeTensorMode
"""The mode in which tensors hold no values; tensors from outside lose theirs when they enter it."""


@contextlib.contextmanager
def shapes_only(device: torch.device) -> Iterator[Shapes]:
    """Compute on shapes while the body runs; generators are left as they were found."""
    state = random_state(device)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        restore_random_state(state)


def emptied(mode: Shapes, content: Any) -> Any:
    """Return `content` with its tensors without values; one tensor twice stays one."""
    return pytree.tree_map(lambda x: mode.from_tensor(x.detach()) if isinstance(x, Tensor) else x, content)


def emptied_run(mode: Shapes, trajectory: Trajectory) -> Trajectory:
    """Return the record without values, and without what it keeps of its steps but the batches."""
    batches: dict[int, Any] = {}
    steps = []
    for step in trajectory.steps:
        if id(step.batch) not in batches:
            batches[id(step.batch)] = emptied(mode, step.batch)
        batch = batches[id(step.batch)]
        steps.append(replace(step, batch=batch, random=None, flat=None, states=None, taped=None, leaves=None))
    return replace(
        trajectory,
        end_flat=emptied(mode, trajectory.end_flat),
        end_states=emptied(mode, trajectory.end_states),
        steps=tuple(steps),
        batch=emptied(mode, trajectory.batch),
        random=None,
    )


def run_again(trajectory: Trajectory, upper: dict[str, Tensor], recording: Recording) -> Trajectory:
    """Return a run like that of an emptied record, kept as `recording` says."""
    if not trajectory.steps:
        return trajectory
    flat, states = trajectory.end_flat.clone(), trajectory.end_states
    steps: list[Step] = []
    for step in trajectory.steps:
        taken, flat, states = take(step, flat, states, upper, recording, trajectory.num_steps)
        steps.append(taken)
    return replace(trajectory, steps=tuple(steps), end_flat=flat, end_states=states)


def needs_values(error: Exception) -> bool:
    """Return whether `error` is what code raises that asks a tensor without values for them."""
    text = f"{type(error).__name__}: {error}"
    marks = ("DataDependent", "DynamicOutputShape", "UnsupportedFakeTensor", "FakeTensor", "tensor subclass", "meta")
    return isinstance(error, RuntimeError | TypeError | NotImplementedError) and any(mark in text for mark in marks)
