"""The sigma-measurement and in-task accuracy of a trained tower, on instance tasks of test images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor

from ssl_tasks.instances import InstanceTasks, Pair, deviation, embedded, instance_accuracy, instance_logits
from ssl_tasks.losses import divergence
from ssl_tasks.pretext import Pretext, Tower
from ssl_tasks.recipes import Pretraining
from ssl_tasks.system import Trial

MEASURES: Mapping[str, str] = {"sigma": "sigma", "task_accuracy": "in task %", "deviation": "deviation"}
"""Columns that `held_out` fills."""


def sigma(best: Tensor, own: Tensor) -> Tensor:
    """Return KL(pi(f*) || pi(f)) of one task from both models' logits: >= 0, and 0 where they agree [abs].

    Example:
        >>> import torch
        >>> logits = torch.eye(4)
        >>> float(sigma(logits, logits)), bool(sigma(2 * logits, logits) > 0)
        (0.0, True)
    """
    return divergence(best, own)


def specialist(tower: Tower, views: Pair, pretext: Pretext, target: Tower | None, *, steps: int, rate: float) -> Tower:
    """Return a copy of `tower` trained on one task's support views by plain gradient descent: our f*_l [rec]."""
    own = copy.deepcopy(tower)
    optimizer = torch.optim.SGD(own.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        pretext(own, views, target).backward()
        optimizer.step()
    return own


def held_out(
    trial: Trial,
    recipe: Pretraining,
    *,
    ways: int,
    rate: float,
    steps: int = 30,
    tasks: int = 20,
    temperature: float = 0.1,
) -> dict[str, float]:
    """Return sigma, the in-task accuracies before and after training on the task, and the embeddings' deviation.

    The tasks are of test images, the same for every arm of a seed. sigma falls to 0 for a model that no task's training
    changes, a collapsed one included: read it beside the deviation and the accuracy.

    Args:
        trial: whose tower is measured; left as it is.
        recipe: the tasks' loss and views.
        ways: images a task.
        rate: of the task's training.
        steps: of the task's training.
        tasks: how many.
        temperature: of pi.
    """
    tower, target = trial.backbone.tower, trial.backbone.target
    stream = InstanceTasks(
        images=trial.data.test.images, augment=recipe.augment, tasks=1, ways=ways, seed=trial.seed + 50_000
    )
    totals = dict.fromkeys(("sigma", "task_accuracy", "adapted_accuracy", "deviation"), 0.0)
    for batch in islice(stream, tasks):
        support, query = ((one[0], two[0]) for one, two in (batch["support"], batch["query"]))
        best = specialist(tower, support, recipe.pretext, target, steps=steps, rate=rate)
        with torch.no_grad():
            views = embedded(tower, support, query)
            own = instance_logits(views, temperature=temperature)
            ahead = instance_logits(embedded(best, support, query), temperature=temperature)
            totals["sigma"] += float(sigma(ahead, own)) / tasks
            totals["task_accuracy"] += 100 * float(instance_accuracy(own)) / tasks
            totals["adapted_accuracy"] += 100 * float(instance_accuracy(ahead)) / tasks
            totals["deviation"] += float(deviation(views[1])) / tasks
    return totals
