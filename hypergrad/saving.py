"""What an engine saves of each to go on later."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from hypergrad.runner import Nested, Runner
from hypergrad.source import load_random, save_random
from hypergrad.step import Step


def save(runner: Runner) -> dict[str, Any]:
    """Return what this problem needs to go on."""
    return {
        "module": runner.problem.module.state_dict(),
        "optimizer": runner.problem.optimizer.state_dict(),
        "schedulers": [s.state_dict() for s in runner.problem.schedulers()],
        "data": None if runner.source is None else runner.source.state_dict(),
        "num_steps": runner.num_steps,
        "warm": dict(runner.warm),
        "initial": runner.initial,
        "snapshot": runner.snapshot,
        "window": _saved_window(runner),
    }


def check(runner: Runner, state: Mapping[str, Any]) -> None:
    """Raise a ValueError unless `state` fits this problem's module."""
    ours = {key: tuple(v.shape) for key, v in runner.problem.module.state_dict().items() if isinstance(v, Tensor)}
    theirs = {key: tuple(v.shape) for key, v in state["module"].items() if isinstance(v, Tensor)}
    if ours != theirs:
        differing = sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
        raise ValueError(
            f"problem {runner.name!r}: the state was saved from another module; they differ in {differing}. Build "
            "the same module as the one that was saved."
        )
    if (runner.source is None) != (state["data"] is None) or len(runner.stepper.schedulers) != len(state["schedulers"]):
        raise ValueError(
            f"problem {runner.name!r}: the state was saved from a problem with other data or schedulers. Give it "
            "the same."
        )


def load(runner: Runner, state: Mapping[str, Any]) -> None:
    """Go on from `state`."""
    runner.problem.module.load_state_dict(state["module"])
    runner.problem.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch keeps what it is given
    for scheduler, saved in zip(runner.problem.schedulers(), state["schedulers"], strict=True):
        scheduler.load_state_dict(saved)
    if runner.source is not None:
        runner.source.load_state_dict(state["data"])
    runner.num_steps, runner.warm = state["num_steps"], dict(state["warm"])
    runner.initial, runner.snapshot = copy.deepcopy(state["initial"]), copy.deepcopy(state["snapshot"])
    _load_window(runner, state["window"])


def _saved_window(runner: Runner) -> dict[str, Any]:
    """Return the record of the last window, where steps of the level above are still to be taken with it."""
    steps = runner.window if runner.problem.every > 1 else []
    if any(isinstance(step.batch, Nested) for step in steps):
        raise ValueError(
            f"problem {runner.name!r} has levels below and every={runner.problem.every}: its run cannot be saved. "
            "Use every=1."
        )
    saved = [
        {
            "batch": step.batch,
            "index": step.index,
            "random": save_random(step.random),
            "flat": step.flat,
            "states": step.states,
            "options": [asdict(option) for option, _ in step.recipe.optimizer.groups],
        }
        for step in steps
    ]
    return {"steps": saved, "size": runner.window_size, "started": runner.began_at_start, "fresh": list(runner.fresh)}


def _load_window(runner: Runner, saved: Mapping[str, Any]) -> None:
    runner.forget_options()
    runner.window_size, runner.began_at_start, runner.fresh = saved["size"], saved["started"], list(saved["fresh"])
    runner.window = []
    for entry in saved["steps"]:
        bound = runner.bind()
        options = zip(bound.groups, entry["options"], strict=True)
        groups = tuple((replace(option, **values), names) for (option, names), values in options)
        recipe = runner.recipe(replace(bound, groups=groups))
        random = load_random(entry["random"], runner.layout.device)
        step = Step(recipe, entry["batch"], entry["index"], random, entry["flat"], entry["states"])
        runner.window.append(step)
