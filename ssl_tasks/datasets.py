"""Images that need no download, and a shifted domain made from them.

The pretext set is unlabelled and unshifted; the downstream training, validation and test sets are labelled
and *shifted*: BiSSL's gain shows where the downstream task differs from what the pretext saw.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_tasks.augment import blurred

NAMES = ("fashion", "digits", "fashion-full")
"""What `load` knows: the embedded subset, scikit-learn's digits, Fashion-MNIST's four files in a folder."""


@dataclass(frozen=True)
class Split:
    """Labelled images: float, (n, 1, height, width), in [0, 1]; labels int64, (n,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """One experiment's data: an unlabelled pretext set, and a downstream task's three labelled splits."""

    name: str
    pretext: Tensor
    train: Split
    validation: Split
    test: Split
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Return (channels, height, width)."""
        return tuple(self.pretext.shape[1:])

    def to(self, device: torch.device | str) -> Data:
        """Return the data on `device`."""
        splits = (self.train.to(device), self.validation.to(device), self.test.to(device))
        return Data(self.name, self.pretext.to(device), *splits, self.num_classes)


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
) -> Data:
    """Return one experiment's data; which images land in which split is drawn from `seed`.

    The labelled training and validation images are taken from the official training part, evenly over the
    classes; what is left is the pretext set. The test set is the official test part, whole. The digits have
    none: a fixed quarter of them, every fourth of each class, is the test set for all seeds.

    Args:
        name: one of `NAMES`.
        seed: draws the splits and the shift's framing, light and noise.
        folder: for "fashion-full", where the four idx.gz files are.
        size: side of the images, averaged down before the shift; None leaves them at 28 (digits: 16) pixels.
        shift: the downstream domain's shift; None leaves the downstream images as they are.
        num_labels: labelled downstream training images.
        num_validation: labelled validation images.
        num_pretext: how many unlabelled images to keep; None for all that are left.

    Returns:
        Data on the CPU.

    Raises:
        ValueError: for an unknown name, a missing folder, a size that enlarges, or more images than there
            are.
        FileNotFoundError: if a file of "fashion-full" is missing; the message lists the four.

    Example:
        >>> data = load("fashion", seed=0, size=14)
        >>> data.image_shape, len(data.pretext), len(data.train), len(data.validation), len(data.test)
        ((1, 14, 14), 5000, 500, 500, 2000)
    """
    images, labels, test_images, test_labels = _read(name, folder)
    if size is not None:
        if not 0 < size <= images.shape[-1]:
            raise ValueError(f"size must lie between 1 and {images.shape[-1]} for {name!r}, got {size}.")
        images, test_images = F.adaptive_avg_pool2d(images, size), F.adaptive_avg_pool2d(test_images, size)
    num_classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, rest = _take_evenly(order, labels, num_labels, num_classes, "num_labels")
    validation, rest = _take_evenly(rest, labels, num_validation, num_classes, "num_validation")
    if len(rest) < max(num_pretext or 1, 1):
        raise ValueError(f"num_pretext={num_pretext}, but {len(rest)} images of {name!r} are left; ask for fewer.")

    def downstream(chosen: Tensor, labels: Tensor) -> Split:
        return Split(shift(chosen, generator) if shift else chosen, labels)

    return Data(
        name=name,
        pretext=images[rest[:num_pretext]],
        train=downstream(images[train], labels[train]),
        validation=downstream(images[validation], labels[validation]),
        test=downstream(test_images, test_labels),
        num_classes=num_classes,
    )


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


def _read(name: str, folder: str | Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels."""
    if name not in NAMES:
        raise ValueError(f"unknown data {name!r}; expected one of {', '.join(NAMES)}.")
    if folder is not None and name != "fashion-full":
        raise ValueError(f"folder={str(folder)!r} is read for 'fashion-full' only; drop it for {name!r}.")
    if name == "digits":
        return _digits()
    if name == "fashion-full":
        arrays = _read_folder(folder)
    else:
        with resources.files("ssl_tasks").joinpath("data/fashion-mnist-subset.npz").open("rb") as file:
            stored = np.load(file)
            arrays = [stored[f"{part}_{kind}"] for part in ("train", "test") for kind in ("images", "labels")]
    train_images, train_labels, test_images, test_labels = arrays
    return _images(train_images), _labels(train_labels), _images(test_images), _labels(test_labels)


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scikit-learn's 8x8 digits, enlarged to 16x16, every fourth of each class held out."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = torch.tensor(stored.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False).clamp(0, 1)
    labels = _labels(stored.target)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held_out[torch.nonzero(labels == label).flatten()[::4]] = True
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def _read_folder(folder: str | Path | None) -> list[np.ndarray]:
    """Return the four arrays of Fashion-MNIST's own files."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if folder is None:
        raise ValueError(f"'fashion-full' needs the folder that holds {', '.join(names)}; pass folder=... (--folder).")
    missing = [name for name in names if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; 'fashion-full' needs {', '.join(names)}.")
    return [_read_idx(Path(folder) / name) for name in names]


def _read_idx(path: Path) -> np.ndarray:
    """Return the array of one gzipped idx file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes (its header is {raw[:4]!r}).")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape))
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{path} is cut short: its header promises {shape}, it holds {body.size} bytes.")
    return body.reshape(shape)


def _images(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))[:, None] / 255


def _labels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))
