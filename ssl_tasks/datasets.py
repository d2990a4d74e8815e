"""One experiment's data: an unlabelled pretext set and a downstream task, and a shifted domain for the latter.

The pretext set is unlabelled and unshifted; the downstream training, validation and test sets are labelled
and *shifted*: BiSSL's gain shows where the downstream task differs from what the pretext saw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_tasks.augment import blurred
from ssl_tasks.readers import read, to_float


@dataclass(frozen=True)
class Split:
    """Labelled images, (n, channels, height, width): float in [0, 1], or bytes; labels int64, (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """One experiment's data: an unlabelled pretext set, a downstream task's three labelled splits.

    `unseen` are the classes of which the pretext set has no image.
    """

    name: str
    pretext: Tensor
    train: Split
    validation: Split
    test: Split
    num_classes: int
    unseen: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Return where the images are."""
        return self.pretext.device

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width)."""
        return tuple(self.pretext.shape[1:])

    def to(self, device: torch.device | str) -> Data:
        """Return the data on `device`."""
        splits = {name: getattr(self, name).to(device) for name in ("pretext", "train", "validation", "test")}
        return replace(self, **splits)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How the downstream domain differs from the pretext's: another camera in another light.

    Every image is turned, inverted, flattened and blurred alike; each is framed and lit by its own draw, from
    a generator that `load` seeds, so that the domain is the same in every run with one seed.

    Attributes:
        quarter_turns: rotation by multiples of 90 degrees, which loses no pixel.
        invert: whether bright and dark change places.
        contrast: factor about 1/2; below 1 it flattens the image.
        num_blurs: how many times the 3x3 binomial kernel is applied.
        translation: each image moves by up to this share of half its side, in both directions.
        light: each image's contrast is multiplied by 1 + u and its brightness raised by u'/2, u and u'
            uniform in [-light, light].
        noise: standard deviation of Gaussian noise.
    """

    quarter_turns: int = 1
    invert: bool = True
    contrast: float = 0.6
    num_blurs: int = 0
    translation: float = 0.2
    light: float = 0.4
    noise: float = 0.1

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the shifted images, in [0, 1]."""

        def uniform() -> Tensor:
            return 2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1

        theta = torch.eye(2, 3).repeat(len(images), 1, 1)
        theta[:, 0, 2], theta[:, 1, 2] = (
            self.translation * uniform().flatten(),
            self.translation * uniform().flatten(),
        )
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        out = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        out = torch.rot90(out, self.quarter_turns, (2, 3))
        if self.invert:
            out = 1 - out
        for _ in range(self.num_blurs):
            out = blurred(out)
        out = self.contrast * (1 + self.light * uniform()) * (out - 0.5) + 0.5 + 0.5 * self.light * uniform()
        out = out + self.noise * torch.randn(out.shape, generator=generator)
        return out.clamp(0, 1)


def load(
    name: str,
    *,
    seed: int = 0,
    folder: str | Path | None = None,
    size: int | None = None,
    shift: Shift | None = Shift(),  # noqa: B008 (frozen)
    num_labels: int = 500,
    num_validation: int = 500,
    num_pretext: int | None = None,
    num_unseen: int = 0,
) -> Data:
    """Return one experiment's data; which images land in which split is drawn from `seed`.

    The labelled training and validation images are taken from the official training part, evenly over the
    classes; what is left, after the unlabelled images of data that has some, is the pretext set. The test set is the
    official test part, whole. The digits have none: a fixed quarter of them, every fourth of each class, is the test
    set for all seeds.

    Args:
        name: one of `ssl_tasks.readers.NAMES`.
        seed: draws the splits and the shift's framing, light and noise.
        folder: where the files of data that has some are.
        size: side of the images, averaged down before the shift; None leaves them as they are.
        shift: the downstream domain's shift; None leaves the downstream images as they are.
        num_labels: labelled downstream training images.
        num_validation: labelled validation images.
        num_pretext: how many unlabelled images to keep; None for all that are left.
        num_unseen: how many classes, drawn from `seed`, have no image in the pretext set.

    Returns:
        Data on the CPU.

    Raises:
        ValueError: for an unknown name, a missing folder, a size that enlarges, more images than there are, or unseen
            classes where they cannot be kept out.
        FileNotFoundError: if a file or a folder is missing; the message lists what is expected.
        ImportError: if torchvision is needed and does not import.

    Example:
        >>> data = load("fashion", seed=0, size=14)
        >>> data.image_shape, len(data.pretext), len(data.train), len(data.validation), len(data.test)
        ((1, 14, 14), 5000, 500, 500, 2000)
    """
    raw = read(name, folder, size)
    images, labels = raw.images, raw.labels
    num_classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, rest = _take_evenly(order, labels, num_labels, num_classes, "num_labels")
    validation, rest = _take_evenly(rest, labels, num_validation, num_classes, "num_validation")
    unseen = _unseen(num_unseen, num_classes, seed, named=raw.unlabelled is None)
    rest = rest[~torch.isin(labels[rest], torch.tensor(unseen, dtype=labels.dtype))]
    free = images[rest] if raw.unlabelled is None else torch.cat([raw.unlabelled, images[rest]])
    if len(free) < max(num_pretext or 1, 1):
        raise ValueError(f"num_pretext={num_pretext}, but {len(free)} images of {name!r} are left; ask for fewer.")

    def downstream(chosen: Tensor, labels: Tensor) -> Split:
        return Split(shift(to_float(chosen), generator) if shift else chosen, labels)

    return Data(
        name=name,
        pretext=free[:num_pretext],
        train=downstream(images[train], labels[train]),
        validation=downstream(images[validation], labels[validation]),
        test=downstream(raw.test_images, raw.test_labels),
        num_classes=num_classes,
        unseen=unseen,
    )


def _unseen(count: int, num_classes: int, seed: int, *, named: bool) -> tuple[int, ...]:
    """Return the classes that the pretext set is not to show, drawn from `seed`."""
    if count and not named:
        raise ValueError(
            f"num_unseen={count}, but this data has unlabelled images, of whose classes nobody knows. Leave them out, "
            "or take data without."
        )
    if not 0 <= count < num_classes:
        raise ValueError(f"num_unseen must lie between 0 and one less than the {num_classes} classes, got {count}.")
    drawn = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed + 1))[:count]
    return tuple(sorted(drawn.tolist()))


def _take_evenly(order: Tensor, labels: Tensor, count: int, num_classes: int, what: str) -> tuple[Tensor, Tensor]:
    """Return the first `count` indices of `order`, evenly over the classes, and those that are left."""
    if count < num_classes:
        raise ValueError(f"{what}={count} is less than one image for each of {num_classes} classes; ask for more.")
    taken = torch.zeros(len(order), dtype=torch.bool)
    for label in range(num_classes):
        wanted = count // num_classes + (label < count % num_classes)
        positions = torch.nonzero(labels[order] == label).flatten()
        if len(positions) < wanted:
            raise ValueError(f"{what}={count} wants {wanted} images of class {label}, {len(positions)} are left.")
        taken[positions[:wanted]] = True
    return order[taken], order[~taken]
