"""Few-shot classification tasks: from unlabelled images, from partitions of them, from labels; and how they are solved.

A batch is {"support": (images, labels), "query": (images, labels)}, every tensor led by the tasks; labels count the
classes of their own task, 0 to ways - 1, in a random order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ssl_tasks.instances import InstanceTasks, Pair
from ssl_tasks.readers import to_float


@dataclass(frozen=True, kw_only=True)
class CopyTasks:
    """Tasks without labels and without clusters: N images are N classes, augmented copies of them are the query.

    Attributes:
        instances: where images and copies come from; with `still=True` the support is the images as they are.
    """

    instances: InstanceTasks

    def __iter__(self) -> Iterator[dict[str, Pair]]:
        for batch in self.instances:
            support, query = batch["support"][0], torch.cat(batch["query"], 1)
            yield {"support": (support, _counted(support, 1)), "query": (query, _counted(query, 2))}


@dataclass(frozen=True, kw_only=True)
class ClassTasks:
    """Tasks from partitions of the images into classes: labels, or clusters; without end, the same when iterated again.

    A task takes one of the partitions, `ways` of its classes, and `shots` + `queries` images of each, all drawn alike.

    Attributes:
        images: all of them.
        partitions: each the class of every image, (n,); negative: in none.
        tasks: tasks a batch.
        ways: classes a task.
        shots: support images a class.
        queries: query images a class.
        seed: draws everything.

    Raises:
        ValueError: if a partition has fewer than `ways` classes of `shots` + `queries` images; smaller ones are left
            out.
    """

    images: Tensor
    partitions: Sequence[Tensor]
    tasks: int
    ways: int
    shots: int
    queries: int
    seed: int

    def __post_init__(self) -> None:
        for k in range(len(self.partitions)):
            usable = len(self._classes(k))
            if not 2 <= self.ways <= usable:
                raise ValueError(
                    f"tasks of {self.ways} classes with {self.shots} + {self.queries} images each want at least 2 and "
                    f"as many classes that large; partition {k} has {usable}. Ask for fewer classes or images."
                )

    def __iter__(self) -> Iterator[dict[str, Pair]]:
        generator = torch.Generator().manual_seed(self.seed)
        classes = [self._classes(k) for k in range(len(self.partitions))]
        size = self.shots + self.queries

        def drawn(count: int, most: int) -> Tensor:
            return torch.randperm(most, generator=generator)[:count]

        while True:
            rows = []
            for _ in range(self.tasks):
                own = classes[int(drawn(1, len(classes)))]
                chosen = [own[c] for c in drawn(self.ways, len(own)).tolist()]
                rows.append(torch.stack([index[drawn(size, len(index))] for index in chosen], 1))  # (size, ways)
            index = torch.stack(rows).to(self.images.device)
            images = to_float(self.images[index.flatten()]).view(self.tasks, size, self.ways, *self.images.shape[1:])
            support, query = images[:, : self.shots].flatten(1, 2), images[:, self.shots :].flatten(1, 2)
            yield {
                "support": (support, _counted(support, self.shots)),
                "query": (query, _counted(query, self.queries)),
            }

    def _classes(self, k: int) -> list[Tensor]:
        """Return the images of every class of a partition that has enough of them."""
        labels = self.partitions[k].cpu()
        found = [torch.nonzero(labels == c).flatten() for c in labels.unique().tolist() if c >= 0]
        return [index for index in found if len(index) >= self.shots + self.queries]


def only(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the labels with -1 in place of all but `classes`.

    Example:
        >>> import torch
        >>> only(torch.tensor([0, 1, 2, 1]), (1, 2)).tolist()
        [-1, 1, 2, 1]
    """
    kept = torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype, device=labels.device))
    return torch.where(kept, labels, -1)


def adapted_accuracy(net: nn.Module, batch: dict[str, Pair], *, steps: int, rate: float, chunk: int | None) -> float:
    """Return the mean query accuracy in percent after plain gradient descent on each task's support, from `net`.

    Args:
        net: images -> logits; left as it is.
        batch: tasks.
        steps: of the descent.
        rate: of the descent.
        chunk: tasks at a time.
    """
    begun = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (images,)), labels)

    def one(support: Any, labels: Tensor, query: Tensor, expected: Tensor) -> Tensor:
        params = begun
        for _ in range(steps):
            slope = grad(loss)(params, support, labels)
            params = {name: p - rate * slope[name] for name, p in params.items()}
        return (functional_call(net, params, (query,)).argmax(1) == expected).double().mean()

    return 100 * float(vmap(one, chunk_size=chunk)(*batch["support"], *batch["query"]).mean())


def _counted(images: Tensor, repeats: int) -> Tensor:
    """Return labels for images that lie class by class, `repeats` times over, in every task."""
    ways = images.shape[1] // repeats
    return torch.arange(ways, device=images.device).repeat(len(images), repeats)
