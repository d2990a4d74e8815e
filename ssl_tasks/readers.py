"""Where images come from: the package, scikit-learn, files in a folder, torchvision if it is asked for."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DataName = Literal["fashion", "digits", "fashion-full", "cifar10", "cifar100", "stl10", "folder"]
NAMES: tuple[DataName, ...] = get_args(DataName)
"""What `read` knows; all but the first two want a folder."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Raw:
    """Images, (n, channels, height, width), float in [0, 1] or uint8; labels int64, (n,)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    unlabelled: Tensor | None = None


def read(name: str, folder: str | Path | None, size: int | None) -> Raw:
    """Return the named data, averaged down to `size` pixels a side where that is given.

    Raises:
        ValueError: for an unknown name, a folder that is missing or not wanted, images of different sizes, missing
            labels, a size that enlarges.
        FileNotFoundError: if a file is missing.
        ImportError: if torchvision is wanted and absent or broken.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data {name!r}; expected one of {', '.join(NAMES)}.")
    if name in ("fashion", "digits"):
        if folder is not None:
            raise ValueError(f"folder={str(folder)!r} is not read for {name!r}; drop it.")
        return _resized(name, _digits() if name == "digits" else _embedded(), size)
    if folder is None:
        holds = {"fashion-full": f"holds {', '.join(IDX)}", "folder": "holds train/CLASS/*.png and test/CLASS/*.png"}
        what = holds.get(name, "torchvision once downloaded it to")
        raise ValueError(f"{name!r} needs the folder that {what}; pass folder=... (--folder).")
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder; {name!r} is read from --folder.")
    if name == "fashion-full":
        return _resized(name, _fashion_full(Path(folder)), size)
    if name == "folder":
        return _resized(name, _folder(Path(folder), size), size)
    return _resized(name, _torchvision(name, Path(folder)), size)


def to_float(images: Tensor) -> Tensor:
    """Return images as floats in [0, 1]; large data is kept as bytes until a batch is drawn."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _resized(name: str, raw: Raw, size: int | None) -> Raw:
    height, width = raw.images.shape[-2:]
    if size is None or size == height == width:
        return raw
    if not 0 < size <= min(height, width):
        raise ValueError(f"size must lie between 1 and {min(height, width)} for {name!r}, got {size}.")

    def down(images: Tensor) -> Tensor:
        parts = [F.adaptive_avg_pool2d(to_float(part), size) for part in images.split(4096)]
        return torch.cat([(255 * p).round().byte() if images.dtype == torch.uint8 else p for p in parts])

    rest = None if raw.unlabelled is None else down(raw.unlabelled)
    return Raw(down(raw.images), raw.labels, down(raw.test_images), raw.test_labels, rest)


def _embedded() -> Raw:
    """Return the Fashion-MNIST subset of the package."""
    with resources.files("ssl_tasks").joinpath("data/fashion-mnist-subset.npz").open("rb") as file:
        stored = np.load(file)
        arrays = [stored[f"{part}_{kind}"] for part in ("train", "test") for kind in ("images", "labels")]
    return Raw(_grey(arrays[0]), _labels(arrays[1]), _grey(arrays[2]), _labels(arrays[3]))


def _digits() -> Raw:
    """Return scikit-learn's 8x8 digits, enlarged to 16x16, every fourth of each class held out."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = torch.tensor(stored.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False).clamp(0, 1)
    labels = _labels(stored.target)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held_out[torch.nonzero(labels == label).flatten()[::4]] = True
    return Raw(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


IDX = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def _fashion_full(folder: Path) -> Raw:
    """Return Fashion-MNIST from its own four files."""
    missing = [name for name in IDX if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; 'fashion-full' needs {', '.join(IDX)}.")
    arrays = [_idx(folder / name) for name in IDX]
    return Raw(_grey(arrays[0]), _labels(arrays[1]), _grey(arrays[2]), _labels(arrays[3]))


def _idx(path: Path) -> np.ndarray:
    """Return the array of one gzipped idx file of unsigned bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}.") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes (its header is {raw[:4]!r}).")
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape))
    if body.size != int(np.prod(shape)):
        raise ValueError(f"{path} is cut short: its header promises {shape}, it holds {body.size} bytes.")
    return body.reshape(shape)


def _folder(folder: Path, size: int | None) -> Raw:
    """Return images from train/CLASS/, test/CLASS/ and, where there is one, unlabelled/."""
    parts = [folder / part for part in ("train", "test")]
    missing = [part.name for part in parts if not part.is_dir()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}; a folder holds train/CLASS/ and test/CLASS/.")
    classes = sorted(path.name for path in parts[0].iterdir() if path.is_dir())
    if len(classes) < 2:
        loose = len(_files(parts[0]))
        raise ValueError(
            f"labels are missing: {parts[0]} has {len(classes)} class folders and {loose} loose images. Sort labelled "
            f"images into {parts[0].name}/CLASS/, unlabelled ones into unlabelled/."
        )
    unknown = sorted({path.name for path in parts[1].iterdir() if path.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"{parts[1]} has classes that train/ lacks: {', '.join(unknown)}.")
    found = [[(file, k) for k, name in enumerate(classes) for file in _files(part / name)] for part in parts]
    if not all(found):
        raise ValueError(f"{parts[0] if not found[0] else parts[1]} holds no image ({', '.join(SUFFIXES)}).")
    rest = _files(folder / "unlabelled")
    first = found[0][0][0]
    like = _pixels(first, size, None)
    stacks = [
        torch.stack([_pixels(f, size, (first, like)) for f in files])
        for files in ([f for f, _ in found[0]], [f for f, _ in found[1]], rest)
        if files
    ]
    labels = [torch.tensor([k for _, k in part]) for part in found]
    return Raw(stacks[0], labels[0], stacks[1], labels[1], stacks[2] if rest else None)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _pixels(path: Path, size: int | None, like: tuple[Path, Tensor] | None) -> Tensor:
    """Return one image as bytes; with `size`, its central square scaled to that; else it must be as large as `like`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            grey = opened.mode in ("1", "L", "I;16") if like is None else like[1].shape[0] == 1
            image = opened.convert("L" if grey else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error
    if size is not None:
        image = ImageOps.fit(image, (size, size))
    array = torch.from_numpy(np.array(image))
    pixels = array[None] if array.dim() == 2 else array.permute(2, 0, 1).contiguous()
    if like is not None and pixels.shape != like[1].shape:
        raise ValueError(
            f"{path} has {pixels.shape[2]} x {pixels.shape[1]} pixels, {like[0].name} {like[1].shape[2]} x "
            f"{like[1].shape[1]}; pass --size to bring all to one."
        )
    return pixels


def _torchvision(name: str, folder: Path) -> Raw:
    """Return one of torchvision's data sets, which must lie in `folder` already."""
    try:
        from torchvision import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except Exception as error:  # a torchvision of another torch's build fails with whatever it meets first
        raise ImportError(
            f"{name!r} is read by torchvision, which does not import here ({type(error).__name__}: {error}). Install "
            "the build that goes with this torch, or bring the images as --data folder."
        ) from error
    make: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    try:
        if name == "stl10":
            train, test, rest = (make(folder, split=split) for split in ("train", "test", "unlabeled"))
            images = [torch.from_numpy(part.data) for part in (train, test, rest)]
            return Raw(images[0], _labels(train.labels), images[1], _labels(test.labels), images[2])
        train, test = (make(folder, train=part) for part in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(f"{folder} does not hold {name!r} as torchvision stores it: {error}.") from error
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    return Raw(images[0], _labels(np.array(train.targets)), images[1], _labels(np.array(test.targets)))


def _grey(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))[:, None] / 255


def _labels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array).astype(np.int64))
