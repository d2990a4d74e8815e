"""What an engine saves of each to go on later."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hypergrad._random import random_state, restore_random_state
from hypergrad.losses import Surrounded
from hypergrad.runner import Runner
from hypergrad.source import load_random, save_random
from hypergrad.start import Beginning, StartAgain
from hypergrad.step import Step
from hypergrad.trajectory import Trajectory


def save_all(runners: Mapping[str, Runner]) -> dict[str, Any]:
    """Return what these problems, all of an engine's, need to go on: views of what is in use, not copies."""
    return {
        "random": save_random(random_state(_device(runners), anew=True)),
        "problems": {name: save(runner) for name, runner in runners.items()},
    }


def load_all(runners: Mapping[str, Runner], state: Mapping[str, Any]) -> None:
    """Go on from `state`, which `save_all` returned for the same problems.

    Raises:
        ValueError: if the problems differ; nothing is changed then.
    """
    ours, theirs = set(runners), set(state["problems"])
    if ours != theirs:
        raise ValueError(
            f"this engine has the problems {sorted(ours)}, the state has {sorted(theirs)}. Build the engine from "
            "the same problems as the one that was saved."
        )
    for name, runner in runners.items():
        check(runner, state["problems"][name])
    sources = {name: runner.source for name, runner in runners.items() if runner.source is not None}
    with ExitStack() as unless_all:  # one of them may find that its data differ
        for name, source in sources.items():
            unless_all.enter_context(source.kept())
            source.load_state_dict(state["problems"][name]["data"])
    for name, runner in runners.items():
        load(runner, state["problems"][name], runners)
    restore_random_state(load_random(state["random"], _device(runners)))


def _device(runners: Mapping[str, Runner]) -> torch.device:
    return next(iter(runners.values())).layout.device


def save(runner: Runner) -> dict[str, Any]:
    """Return what this problem needs to go on."""
    module = runner.problem.module
    saved = module.state_dict()
    return {
        "module": saved,
        "buffers": {key: b for key, b in module.named_buffers() if key not in saved},
        "optimizer": _plain(runner.problem.optimizer.state_dict()),
        "schedulers": _plain([s.state_dict() for s in runner.problem.schedulers()]),
        "data": None if runner.source is None else _plain(runner.source.state_dict()),
        "num_steps": runner.num_steps,
        "warm": dict(runner.warm),
        "initial": _plain(runner.initial),
        "snapshot": _plain(runner.snapshot),
        "window": _plain(_saved_window(runner)),
        "loss_scale": None if runner.losses.scale is None else runner.losses.scale.state_dict(),
    }


def _plain(state: Any) -> Any:
    """Return `state` with NumPy's numbers as Python's: a schedule may compute with them, a safe reader refuses them."""

    def plain(entry: Any) -> Any:
        if isinstance(entry, Counter):  # the milestones of a MultiStepLR
            return Counter({plain(key): count for key, count in entry.items()})
        return entry.item() if isinstance(entry, np.generic) else entry

    return pytree.tree_map(plain, state)


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
    _check_optimizer(runner, state["optimizer"])
    if (runner.losses.scale is None) != (state["loss_scale"] is None):
        raise ValueError(
            f"problem {runner.name!r}: one of this problem and the saved one has a loss_scale and the other none. Give "
            "it the same."
        )
    source, data = runner.source, state["data"]
    fits = data is None if source is None else data is not None and source.fits(data)
    if not fits or len(runner.stepper.schedulers) != len(state["schedulers"]):
        raise ValueError(
            f"problem {runner.name!r}: the state was saved from a problem with other data or schedulers. Give it "
            "the same."
        )


def _check_optimizer(runner: Runner, state: Mapping[str, Any]) -> None:
    """Raise a ValueError unless `state` is of an optimizer like this problem's: its groups and their options."""
    optimizer = runner.problem.optimizer
    present = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (present, state["param_groups"])]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"problem {runner.name!r}: the state was saved from an optimizer with {sizes[1]} parameters in its groups, "
            f"and this one has {sizes[0]}. Give it the same groups."
        )
    known = {key for group in present for key in group}
    saved = {key for group in state["param_groups"] for key in group}
    if known - saved and saved - known:  # one of the two alone: other versions of torch know other options
        raise ValueError(
            f"problem {runner.name!r}: the state was saved from another optimizer than {type(optimizer).__name__}: it "
            f"has {sorted(saved - known)} and lacks {sorted(known - saved)}. Give it the same."
        )


def load(runner: Runner, state: Mapping[str, Any], runners: Mapping[str, Runner]) -> None:
    """Go on from `state`."""
    module = runner.problem.module
    module.load_state_dict(state["module"])
    with torch.no_grad():
        for key, buffer in module.named_buffers():
            if key in state["buffers"]:
                buffer.copy_(state["buffers"][key])
    runner.problem.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch keeps what it is given
    for scheduler, saved in zip(runner.problem.schedulers(), state["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(saved))
    runner.num_steps = state["num_steps"]
    runner.warm = {name: v.to(runner.layout.device) for name, v in state["warm"].items()}
    runner.initial, runner.snapshot = copy.deepcopy(state["initial"]), copy.deepcopy(state["snapshot"])
    _load_window(runner, state["window"], runners)
    if runner.losses.scale is not None:
        runner.losses.scale = runner.losses.scale.at(state["loss_scale"])


def _outlives_a_step(runner: Runner) -> bool:
    """Return whether the record of the last window is read again in a later step of the top level."""
    levels = runner.graph.levels[runner.graph.level_of[runner.name] :]
    return any(problem.every > 1 for level in levels for problem in level)


def _saved_window(runner: Runner) -> dict[str, Any]:
    """Return the record of the last window, where steps of the levels above are still to be taken with it."""
    steps = [_saved_step(step) for step in runner.window] if _outlives_a_step(runner) else []
    return {
        "steps": steps,
        "size": runner.window_size,
        "beginning": _saved_beginning(runner.beginning),
        "fresh": list(runner.fresh),
    }


def _saved_step(step: Step) -> dict[str, Any]:
    around = step.batch if isinstance(step.batch, Surrounded) else None
    return {
        "batch": step.batch if around is None else around.batch,
        "records": None if around is None else {name: _saved_record(r) for name, r in around.records.items()},
        "constants": None if around is None else dict(around.constants),
        "index": step.index,
        "taken": step.taken,
        "random": save_random(step.random),
        "flat": step.flat,
        "states": step.states,
        "options": [asdict(option) for option, _ in step.recipe.optimizer.groups],
    }


def _saved_record(record: Trajectory) -> dict[str, Any]:
    """Return the record of a lower level's run that went with a step of a window."""
    return {
        "steps": [_saved_step(step) for step in record.steps],
        "end": record.end_flat,
        "states": record.end_states,
        "beginning": _saved_beginning(record.start.beginning if isinstance(record.start, StartAgain) else None),
    }


def _saved_beginning(beginning: Beginning | None) -> dict[str, Any] | None:
    if beginning is None:
        return None
    return {"random": save_random(beginning.random), "constants": dict(beginning.constants)}


def _loaded_beginning(saved: Mapping[str, Any] | None, device: torch.device) -> Beginning | None:
    return None if saved is None else Beginning(load_random(saved["random"], device), dict(saved["constants"]))


def _load_window(runner: Runner, saved: Mapping[str, Any], runners: Mapping[str, Runner]) -> None:
    runner.forget_options()
    runner.window_size, runner.fresh = saved["size"], list(saved["fresh"])
    runner.beginning = _loaded_beginning(saved["beginning"], runner.layout.device)
    runner.window = [_loaded_step(runner, entry, runners) for entry in saved["steps"]]


def _loaded_step(runner: Runner, saved: Mapping[str, Any], runners: Mapping[str, Runner]) -> Step:
    bound = runner.bind()
    options = zip(bound.groups, saved["options"], strict=True)
    groups = tuple((replace(option, **values), names) for (option, names), values in options)
    batch = saved["batch"]
    if saved["records"] is not None:
        records = {name: _loaded_record(runners[name], r, runners) for name, r in saved["records"].items()}
        batch = Surrounded(batch, records, saved["constants"])
    random = load_random(saved["random"], runner.layout.device)
    recipe = runner.recipe(replace(bound, groups=groups), saved["constants"] or {})
    return Step(recipe, batch, saved["index"], random, saved["flat"], saved["states"], taken=saved["taken"])


def _loaded_record(runner: Runner, saved: Mapping[str, Any], runners: Mapping[str, Runner]) -> Trajectory:
    steps = tuple(_loaded_step(runner, entry, runners) for entry in saved["steps"])
    beginning = _loaded_beginning(saved["beginning"], runner.layout.device)
    return runner.record_of(steps, saved["end"], saved["states"], beginning)
