"""Tasks made of unlabelled images: every image a class of its own, its views the class's examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_tasks.augment import Augmentation
from ssl_tasks.losses import unit
from ssl_tasks.readers import to_float

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class InstanceTasks:
    """Batches of instance-discrimination tasks without end; iterating twice gives the same tasks twice.

    A batch is {"support": (view, view), "query": (view, view)}, each tensor (tasks, ways, channels, height, width): of
    every task `ways` images, no image twice in a batch, each in four views of their own draws.

    Attributes:
        images: unlabelled.
        augment: of the views.
        tasks: tasks a batch.
        ways: images, that is classes, a task.
        seed: draws images and views.
        split: whether the query views are others than the support's; otherwise they are the same.
        still: whether the support shows the images as they are, twice, and the query alone is augmented.
    """

    images: Tensor
    augment: Augmentation
    tasks: int
    ways: int
    seed: int
    split: bool = True
    still: bool = False

    def __post_init__(self) -> None:
        count = self.tasks * self.ways
        if self.ways < 2 or not 0 < count <= len(self.images):
            raise ValueError(
                f"{self.tasks} tasks of {self.ways} images want at least 2 images each and no more than the "
                f"{len(self.images)} there are."
            )

    def __iter__(self) -> Iterator[dict[str, Pair]]:
        generator = torch.Generator(self.images.device).manual_seed(self.seed)
        count, kinds = self.tasks * self.ways, 4 if self.split and not self.still else 2
        while True:
            order = torch.randperm(len(self.images), generator=generator, device=self.images.device)
            for index in order[: len(order) - len(order) % count].split(count):
                images = to_float(self.images[index])
                views = self.augment(images.repeat(kinds, 1, 1, 1), generator)
                shaped = views.view(kinds, self.tasks, self.ways, *images.shape[1:]).unbind(0)
                plain = images.view(self.tasks, self.ways, *images.shape[1:])
                support = (plain, plain) if self.still else (shaped[0], shaped[1])
                yield {"support": support, "query": (shaped[-2], shaped[-1])}


Embedded = tuple[Tensor, Tensor]
"""Unit-length embeddings of a task's support and query views, each (views, ways, dim)."""


def embedded(tower: Any, support: Sequence[Tensor], query: Sequence[Tensor]) -> Embedded:
    """Return the unit-length embeddings of a task's views, all passed in one batch.

    Args:
        tower: a model, or what a problem's loss sees of it.
        support: views of all instances, (ways, ...) each.
        query: further views, in the same order.
    """
    z = unit(tower(torch.cat([*support, *query])))
    ways = len(support[0])
    return z[: len(support) * ways].view(len(support), ways, -1), z[len(support) * ways :].view(len(query), ways, -1)


def instance_logits(views: Embedded, *, temperature: float) -> Tensor:
    """Return how alike each query view is to each instance, cosines over the temperature, (views x ways, ways).

    pi(f) of a task is their softmax: a query view against the mean support embedding of every instance.

    Args:
        views: of support and query, as `embedded` by f.
        temperature: positive.
    """
    support, query = views
    return query.flatten(0, 1) @ unit(support.mean(0)).T / temperature


def instance_accuracy(logits: Tensor) -> Tensor:
    """Return the share of query views that are nearest to their own instance."""
    ways = logits.shape[1]
    return (logits.argmax(1) == torch.arange(len(logits), device=logits.device) % ways).to(logits.dtype).mean()


def deviation(z: Tensor) -> Tensor:
    """Return the mean standard deviation of unit-length embeddings' coordinates, times sqrt(dim).

    Near 1 for embeddings spread over the sphere, 0 once all are the same: the collapse to watch for.

    Args:
        z: unit-length embeddings, (..., dim).
    """
    rows = z.flatten(0, -2)
    centred = rows - rows.mean(0)
    return (centred.square().mean(0) + 1e-12).sqrt().mean() * z.shape[-1] ** 0.5
