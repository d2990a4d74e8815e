"""Endless streams of batches, each made anew from its seed: iterating twice gives the same batches twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_tasks.augment import Augmentation, two_views
from ssl_tasks.datasets import Split
from ssl_tasks.readers import to_float


@dataclass(frozen=True, kw_only=True)
class Views:
    """Batches (first view, second view) of unlabelled images, each epoch in a new order, without end."""

    images: Tensor
    augment: Augmentation
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        _check(self.batch_size, len(self.images))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(self.images.device).manual_seed(self.seed)
        for index in _batches(len(self.images), self.batch_size, generator):
            yield two_views(to_float(self.images[index]), self.augment, generator)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Batches of unlabelled images as `draw(images, generator)` makes them, without end.

    A loss whose random numbers come with its batch is a plain function: it can be differentiated in what scales them.
    """

    images: Tensor
    draw: Callable[[Tensor, torch.Generator], Any]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        _check(self.batch_size, len(self.images))

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator(self.images.device).manual_seed(self.seed)
        for index in _batches(len(self.images), self.batch_size, generator):
            yield self.draw(to_float(self.images[index]), generator)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Batches (images, labels), epoch after epoch in a new order, without end; augmented where asked."""

    split: Split
    batch_size: int
    seed: int
    augment: Augmentation | None = None

    def __post_init__(self) -> None:
        _check(self.batch_size, len(self.split))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(self.split.images.device).manual_seed(self.seed)
        for index in _batches(len(self.split), self.batch_size, generator):
            images = to_float(self.split.images[index])
            yield self.augment(images, generator) if self.augment else images, self.split.labels[index]


def _check(batch_size: int, size: int) -> None:
    if not 0 < batch_size <= size:
        raise ValueError(f"batch_size must lie between 1 and the number of images, {size}; got {batch_size}.")


def _batches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield indices without end; what is left over at the end of an epoch is dropped."""
    while True:
        order = torch.randperm(size, generator=generator, device=generator.device)
        yield from order[: size - size % batch_size].split(batch_size)
