"""Copies of a problem as it stands, to return to."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hypergrad.problem import Problem


def snapshot(problem: Problem) -> dict[str, Any]:
    """Return a copy of the problem's variables, buffers, optimizer and schedulers."""
    optimizer = problem.optimizer.state_dict()
    return copy.deepcopy(
        {
            "parameters": {key: p.detach() for key, p in problem.variables().items()},
            "buffers": dict(problem.module.named_buffers()),
            "optimizer": optimizer["state"],
            "groups": optimizer["param_groups"],
            "schedulers": [scheduler.state_dict() for scheduler in problem.schedulers()],
        }
    )


def restore(problem: Problem, found: dict[str, Any]) -> None:
    """Put the problem back to a snapshot, which stays good for another time."""
    with torch.no_grad():
        for key, parameter in problem.variables().items():
            parameter.copy_(found["parameters"][key])
        for key, buffer in problem.module.named_buffers():
            if key in found["buffers"]:
                buffer.copy_(found["buffers"][key])
    optimizer, schedulers = problem.optimizer, problem.schedulers()
    # without a scheduler, options are the user's to change, and stay
    groups = found["groups"] if schedulers else optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(copy.deepcopy({"state": found["optimizer"], "param_groups": groups}))
    for scheduler, state in zip(schedulers, found["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(state))
