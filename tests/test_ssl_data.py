"""Data, augmentation and streams of the SSL systems: what comes is what was asked, and nothing is drawn twice."""

from __future__ import annotations

import gzip
import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_tasks.augment import Augmentation, blurred, two_views
from ssl_tasks.datasets import Shift, Split, load
from ssl_tasks.streams import Labelled, Views

STILL = dict(min_scale=1.0, flip=False, brightness=0.0, contrast=0.0, blur=0.0)


def test_the_embedded_images_are_those_that_the_readme_names() -> None:
    folder = resources.files("ssl_tasks") / "data"
    readme = (folder / "README.md").read_text()
    with (folder / "fashion-mnist-subset.npz").open("rb") as file:
        stored = np.load(file)
        for name in stored.files:
            assert f"| `{name}` |" in readme
            assert hashlib.sha256(stored[name].tobytes()).hexdigest() in readme
    assert "MIT License" in (folder / "LICENSE.fashion-mnist").read_text()


@pytest.mark.parametrize(("name", "shape"), [("fashion", (1, 28, 28)), ("digits", (1, 16, 16))])
def test_splits_are_disjoint_balanced_and_in_range(name: str, shape: tuple[int, ...]) -> None:
    data = load(name, seed=3, shift=None, num_labels=200, num_validation=100)
    assert data.image_shape == shape and data.num_classes == 10
    assert torch.bincount(data.train.labels).tolist() == [20] * 10
    assert torch.bincount(data.validation.labels).tolist() == [10] * 10
    parts = [data.pretext, data.train.images, data.validation.images]
    seen = torch.cat([part.flatten(1) for part in parts])
    everything = load(name, seed=0, shift=None, num_labels=10, num_validation=10)
    whole = len(everything.pretext) + 20
    assert len(seen) == whole
    rows = {row.tobytes() for row in seen.numpy()}
    other = [everything.pretext, everything.train.images, everything.validation.images]
    assert rows == {row.tobytes() for part in other for row in part.flatten(1).numpy()}
    for part in (*parts, data.test.images):
        assert 0 <= part.min() and part.max() <= 1 and part.dtype == torch.float32


def test_one_seed_one_domain() -> None:
    once, again, other = load("fashion", seed=1, size=14), load("fashion", seed=1, size=14), load("fashion", seed=2)
    assert torch.equal(once.train.images, again.train.images) and torch.equal(once.test.images, again.test.images)
    assert torch.equal(once.test.labels, other.test.labels)
    assert not torch.equal(once.train.labels, other.train.labels)


def test_the_shift_turns_and_inverts() -> None:
    images = torch.rand(3, 1, 8, 8)
    shift = Shift(quarter_turns=1, invert=True, contrast=1.0, translation=0.0, light=0.0, noise=0.0)
    expected = 1 - images.rot90(1, (2, 3))
    torch.testing.assert_close(shift(images, torch.Generator()), expected, rtol=0, atol=1e-6)


def test_fashion_full_is_read_from_the_four_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    data = load("fashion-full", folder=tmp_path, num_labels=10, num_validation=10)
    assert len(data.pretext) == 40 and len(data.test) == 20
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x14abc"))
    with pytest.raises(ValueError, match="cut short"):
        load("fashion-full", folder=tmp_path, num_labels=10, num_validation=10)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"no"))
    with pytest.raises(ValueError, match="no idx file"):
        load("fashion-full", folder=tmp_path, num_labels=10, num_validation=10)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks t10k-labels-idx1-ubyte\.gz"):
        load("fashion-full", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, "unknown data 'mnist'; expected one of fashion, digits, fashion-full, cifar10"),
        ("fashion", {"folder": "x"}, "folder='x' is not read for 'fashion'"),
        ("fashion-full", {}, "needs the folder that holds train-images-idx3-ubyte.gz"),
        ("digits", {"size": 40}, "size must lie between 1 and 16"),
        ("digits", {"num_labels": 5}, "num_labels=5 is less than one image for each of 10 classes"),
        ("digits", {"num_validation": 5000}, "num_validation=5000 wants 500 images of class 0"),
        ("fashion", {"num_pretext": 5001}, "5000 images of 'fashion' are left"),
    ],
)
def test_bad_data_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **options)  # type: ignore[arg-type]


def test_an_augmentation_with_everything_off_is_the_identity() -> None:
    images = torch.rand(5, 2, 9, 9)
    out = Augmentation(**STILL)(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, images, rtol=0, atol=1e-6)


def test_augmentations_draw_from_their_generator_only() -> None:
    images, augment = torch.rand(6, 1, 12, 12), Augmentation(rotation=10, cutout=0.3, noise=0.05)
    before = torch.get_rng_state()
    first = augment(images, torch.Generator().manual_seed(1))
    torch.rand(3)
    second = augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(first, second) and 0 <= first.min() and first.max() <= 1
    torch.set_rng_state(before)
    augment(images, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_sample_has_its_own_draw() -> None:
    images = torch.rand(1, 1, 12, 12).expand(4, 1, 12, 12)
    for options in ({"min_scale": 0.5}, {"rotation": 30.0}, {"brightness": 0.5}, {"contrast": 0.9}, {"cutout": 0.4}):
        out = Augmentation(**{**STILL, **options})(images, torch.Generator().manual_seed(0))
        assert len({sample.numpy().tobytes() for sample in out}) == 4, options


def test_flip_mirrors_whole_samples() -> None:
    images = torch.rand(40, 1, 6, 6)
    out = Augmentation(**{**STILL, "flip": True})(images, torch.Generator().manual_seed(0))
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(out, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-6) for a, b in zip(out, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 8 < sum(mirrored) < 32


def test_blur_keeps_constants_and_the_mean_of_the_inside() -> None:
    torch.testing.assert_close(blurred(torch.full((1, 2, 5, 5), 0.3)), torch.full((1, 2, 5, 5), 0.3))
    spike = torch.zeros(1, 1, 7, 7)
    spike[0, 0, 3, 3] = 1
    assert blurred(spike)[0, 0, 3, 3] == 0.25 and blurred(spike).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_scale": 0}, r"min_scale must lie in \(0, 1\], got 0"),
        ({"blur": 1.5}, r"blur must lie in \[0, 1\]"),
        ({"noise": -1}, r"noise must lie in \[0, inf\]"),
    ],
)
def test_bad_augmentations_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)  # type: ignore[arg-type]


def test_streams_repeat_themselves_and_cover_an_epoch() -> None:
    images = torch.rand(10, 1, 8, 8)
    stream = Views(images=images, augment=Augmentation(), batch_size=4, seed=0)
    one, two = iter(stream), iter(stream)
    for _ in range(5):
        for a, b in zip(next(one), next(two), strict=True):
            assert torch.equal(a, b)
    labelled = iter(Labelled(split=Split(images, torch.arange(10)), batch_size=5, seed=0))
    epochs = [torch.cat([next(labelled)[1], next(labelled)[1]]) for _ in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(10))
    assert epochs[0].tolist() != epochs[1].tolist()
    first, second = two_views(images, Augmentation(), torch.Generator().manual_seed(0))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="batch_size must lie between 1 and the number of images, 10; got 11"):
        Views(images=images, augment=Augmentation(), batch_size=11, seed=0)


def test_colours_are_drawn_to_grey_and_back() -> None:
    images = torch.rand(30, 3, 6, 6)
    half = Augmentation(**{**STILL, "grayscale": 0.5})(images, torch.Generator().manual_seed(0))
    grey = [bool((sample - sample[:1]).abs().max() < 1e-6) for sample in half]
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(half, images, strict=True)]
    assert all(a != b for a, b in zip(grey, same, strict=True)) and 5 < sum(grey) < 25
    faded = Augmentation(**{**STILL, "saturation": 0.5})(images, torch.Generator().manual_seed(0))
    torch.testing.assert_close(faded.mean(1), images.mean(1), rtol=0, atol=0.2)
    assert not torch.allclose(faded, images, atol=1e-3)


def _write(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 200 if mode == "L" else (200, 100, 0)).save(path)


def test_a_folder_of_images_is_data(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for k in range(4):
            _write(tmp_path / "train" / label / f"{k}.png", (12, 10))
            _write(tmp_path / "test" / label / f"{k}.png", (12, 10))
    _write(tmp_path / "unlabelled" / "a.png", (12, 10))
    data = load("folder", folder=tmp_path, num_labels=2, num_validation=2, size=8)
    assert data.image_shape == (3, 8, 8) and data.num_classes == 2 and len(data.test) == 8
    assert len(data.pretext) == 1 + 8 - 4 and data.pretext.dtype == torch.uint8
    view, _ = next(iter(Views(images=data.pretext, augment=Augmentation(**STILL), batch_size=2, seed=0)))
    torch.testing.assert_close(view[0, :, 4, 4], torch.tensor([200.0, 100.0, 0.0]) / 255)
    _write(tmp_path / "test" / "cat" / "9.png", (5, 5))
    with pytest.raises(ValueError, match=r"9\.png has 5 x 5 pixels, 0\.png 12 x 10; pass --size"):
        load("folder", folder=tmp_path, num_labels=2, num_validation=2)
    (tmp_path / "test" / "cat" / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"9\.png cannot be read as an image"):
        load("folder", folder=tmp_path, num_labels=2, num_validation=2)
    _write(tmp_path / "test" / "bird" / "0.png", (12, 10))
    with pytest.raises(ValueError, match="has classes that train/ lacks: bird"):
        load("folder", folder=tmp_path)


def test_a_folder_without_labels_or_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lacks train and test"):
        load("folder", folder=tmp_path)
    _write(tmp_path / "train" / "a.png", (4, 4))
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="labels are missing: .*train has 0 class folders and 1 loose images"):
        load("folder", folder=tmp_path)
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        load("folder", folder=tmp_path)


def test_torchvision_is_asked_for_lazily_and_missed_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="'cifar10' is read by torchvision, which does not import here"):
        load("cifar10", folder=tmp_path)
    with pytest.raises(ValueError, match="'stl10' needs the folder that torchvision once downloaded it to"):
        load("stl10")
    fake = type(sys)("torchvision")

    def absent(folder: Path, **_: object) -> None:
        raise RuntimeError("Dataset not found")

    fake.datasets = type("datasets", (), {"CIFAR10": absent, "CIFAR100": absent, "STL10": absent})  # type: ignore
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    with pytest.raises(FileNotFoundError, match="does not hold 'cifar100' as torchvision stores it"):
        load("cifar100", folder=tmp_path)
    arrays = np.zeros((20, 8, 8, 3), np.uint8)

    def present(folder: Path, train: bool) -> object:
        return type("Set", (), {"data": arrays, "targets": list(np.arange(20) % 2)})

    fake.datasets.CIFAR10 = staticmethod(present)  # type: ignore
    assert load("cifar10", folder=tmp_path, num_labels=4, num_validation=4).image_shape == (3, 8, 8)
