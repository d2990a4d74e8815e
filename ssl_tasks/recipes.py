"""What every run has, as values: its data, its pretraining, how encoders are measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from ssl_tasks.augment import Augmentation
from ssl_tasks.datasets import Data, Shift, load
from ssl_tasks.encoders import EncoderName
from ssl_tasks.optimizers import OptimizerName
from ssl_tasks.pretext import Pretext
from ssl_tasks.readers import DataName
from ssl_tasks.resnet import Norm


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which images, and how they are split.

    Attributes:
        data: fashion: the images of the package; digits: scikit-learn's; fashion-full: Fashion-MNIST's four idx.gz
            files in --folder; cifar10, cifar100, stl10: torchvision's, from --folder; folder: images in --folder, as
            train/CLASS/*.png, test/CLASS/*.png and, if there are any, unlabelled/*.png.
        folder: where the files of the data are.
        size: side of the images in pixels, averaged down; None leaves them as they are.
        shifted: whether the downstream domain is shifted against the pretext's, as `shift` says.
        shift: how the downstream domain differs.
        num_labels: labelled downstream training images.
        num_validation: labelled validation images.
        num_pretext: unlabelled images; None takes all that are left.
        num_unseen: classes, drawn from the seed, of which no unlabelled image is.
    """

    data: DataName = "fashion"
    folder: str | None = None
    size: int | None = 14
    shifted: bool = True
    shift: Shift = field(default_factory=lambda: Shift(translation=0.3, light=0.5))
    num_labels: int = 1000
    num_validation: int = 500
    num_pretext: int | None = None
    num_unseen: int = 0

    def load(self, seed: int) -> Data:
        """Return the data of one seed; the digits, of which there are few, get smaller labelled splits."""
        few = self.data == "digits"
        return load(
            self.data,
            seed=seed,
            folder=self.folder,
            size=self.size,
            shift=self.shift if self.shifted else None,
            num_labels=min(self.num_labels, 300) if few else self.num_labels,
            num_validation=min(self.num_validation, 200) if few else self.num_validation,
            num_pretext=self.num_pretext,
            num_unseen=self.num_unseen,
        )


SourceOptions = Annotated[Source, tyro.conf.arg(name="")]
"""The data's options, on the command line without a prefix: `--data`, not `--source.data`."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Self-supervised pretraining of an encoder, with a cosine schedule.

    Attributes:
        encoder: the backbone.
        widths: of the encoder: see `ssl_tasks.encoders.encoder`; empty for its own.
        norm: of convolutional encoders: group, batch (as published) or none.
        pretext: the loss.
        augment: of the views.
        batch_size: images a step, each in two views.
        steps: how many.
        optimizer: adam, sgd (momentum .9) or lars.
        learning_rate: of the first step after the warm-up.
        weight_decay: of the optimizer.
        warm_up: steps in which the learning rate rises.
    """

    encoder: EncoderName = "mlp"
    widths: tuple[int, ...] = (256, 64)
    norm: Norm = "group"
    pretext: Pretext = field(default_factory=Pretext)
    augment: Augmentation = field(default_factory=lambda: Augmentation(contrast=0.6, brightness=0.3))
    batch_size: int = 64
    steps: int = 1000
    optimizer: OptimizerName = "adam"
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warm_up: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a trained encoder is measured on the downstream task.

    Attributes:
        penalties: of the linear probe; the validation split chooses.
        rates: learning rates of fine-tuning; the validation split chooses.
        decays: weight decays of fine-tuning; likewise.
        draws: how many pairs of them are tried, drawn at random; None for all.
        steps: of fine-tuning.
        batch_size: labelled images a step of fine-tuning.
        episodes: few-shot tasks drawn from the test split.
        ways: classes of each.
        shots: labelled images of each class.
    """

    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    decays: tuple[float, ...] = (1e-4,)
    draws: int | None = None
    steps: int = 300
    batch_size: int = 100
    episodes: int = 100
    ways: int = 5
    shots: int = 1


TINY: dict[str, Any] = {
    "source": Source(data="digits", num_labels=100, num_validation=100),
    "pretraining": Pretraining(widths=(64, 32), batch_size=64, steps=20),
    "evaluation": Evaluation(penalties=(0.01,), rates=(0.03,), steps=20, episodes=10),
}
"""What the tests run, in seconds."""

LARGE: dict[str, Any] = {
    "source": Source(data="folder", size=96, shifted=False, num_labels=4000, num_validation=1000),
    "pretraining": Pretraining(
        encoder="resnet50",
        widths=(),
        norm="batch",
        pretext=Pretext(hidden=256, out=256),
        augment=Augmentation(min_scale=0.28, brightness=0.4, contrast=0.4, saturation=0.4, grayscale=0.2),
        batch_size=1024,
        steps=500 * 1250,
        optimizer="lars",
        learning_rate=4.8,
        weight_decay=1e-6,
        warm_up=10 * 1250,
    ),
    "evaluation": Evaluation(
        rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
        decays=(0.0, 1e-6, 1e-5, 1e-4, 1e-3),
        draws=100,
        steps=400 * 16,
        batch_size=256,
    ),
}
"""BiSSL's published setting [code]: ImageNet at 96 pixels, ResNet-50, SimCLR, LARS 4.8, batch 1024, 500 epochs;
fine-tuning by SGD with momentum .9, cosine, 400 epochs, 100 random draws of learning rate and weight decay (here from a
grid [ours]). Two-layer projector where the published one has three [ours]."""
