"""The published settings: each "paper" preset takes two steps on tiny inputs; with its ResNet-50 under `slow`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ssl_tasks import cli
from ssl_tasks.datasets import load
from ssl_tasks.guided import Guide
from ssl_tasks.maml import Maml
from ssl_tasks.pipeline import pretrain, start, views
from ssl_tasks.recipes import Pretraining
from ssl_tasks.system import Trial

SHORT = Guide(method=("damped",), steps=2, lower_steps=1, upper_batch=10, products=1)
TWO_STEPS: dict[str, dict[str, Any]] = {
    "conventional": {"steps": 2, "cost": 2},
    "bissl": {"alternations": 1, "lower_steps": 1, "upper_steps": 2, "warm_up": 1, "upper_batch": 10, "products": 1},
    "bmssl": {"steps": 2, "tasks": 1, "ways": 2, "inner_steps": 1, "target_steps": 1},
    "maxl": {"steps": 2, "subclasses": 2, "batch_size": 4, "cost": 1.0},
    "umtra": {"maml": Maml(method=("unrolled",), steps=2, tasks=1, ways=2, inner_steps=1)},
    "cactus": {
        "maml": Maml(method=("unrolled",), steps=2, tasks=1, ways=2, inner_steps=1),
        "embedding": "pixels",
        "partitions": 1,
        "clusters": 2,
        "queries": 1,
    },
    "learned-pretext": {"guide": SHORT},
    "sources": {"guide": SHORT, "count": 2},
    "masked": {"guide": SHORT, "patch": 4},
    "gessl": {"steps": 2, "tasks": 1, "ways": 2, "inner_steps": 1, "lead": 1},
}
"""What makes a method's stage two steps long; its optimizers, schedules and losses stay as published."""

PRESETS = [(name, preset) for name, own in cli.systems().items() for preset in own.presets() if "paper" in preset]
NETWORKS = {"umtra": "convnet", "cactus": "convnet"}
"""Published networks that are no ResNet-50."""
LEFT_TO_SLOW = [("conventional", "paper"), ("bissl", "paper-byol")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_the_published_network_takes_two_steps(name: str, preset: str) -> None:
    system: Any = cli.systems()[name].presets()[preset]
    assert system.pretraining.encoder == NETWORKS.get(name, "resnet50")
    _two_steps(name, system, system.pretraining)


@pytest.mark.parametrize(("name", "preset"), [pair for pair in PRESETS if pair not in LEFT_TO_SLOW])
def test_the_published_setting_takes_two_steps(name: str, preset: str) -> None:
    system: Any = cli.systems()[name].presets()[preset]
    _two_steps(name, system, replace(system.pretraining, encoder="resnet18", widths=(4,)))


def _two_steps(name: str, system: Any, recipe: Pretraining) -> None:
    recipe = replace(recipe, batch_size=2, steps=2, warm_up=1)
    small = replace(system, pretraining=recipe, **TWO_STEPS.get(name, {}))
    data = load("digits", size=8, shift=None, num_labels=10, num_validation=10, num_pretext=8)
    experiment = small.experiment()
    begun = start(recipe, data, seed=0)
    assert len(pretrain(begun, views(recipe, data, seed=0), recipe)) == 2
    counted: list[int] = []
    arm = list(experiment.arms.values())[-1]
    trained = arm.train(Trial(begun, data, 0, lambda *_: counted.append(1)))
    assert all(bool(p.isfinite().all()) for p in trained.parameters())
