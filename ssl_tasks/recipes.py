"""What a run does, as values: sizes, steps, learning rates; and the named presets."""

from __future__ import annotations

from dataclasses import dataclass, field

from ssl_tasks.augment import Augmentation
from ssl_tasks.datasets import Shift


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Contrastive pretraining of an encoder: Adam, a cosine schedule, NT-Xent."""

    encoder: str = "mlp"
    widths: tuple[int, ...] = (256, 64)
    batch_size: int = 128
    steps: int = 300
    learning_rate: float = 3e-3
    temperature: float = 0.5
    augment: Augmentation = field(default_factory=lambda: Augmentation(contrast=0.6, brightness=0.3))


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """BiSSL's stage between pretraining and fine-tuning, in the letters of docs/bissl.md.

    Attributes:
        alternations: T, how often the two levels take turns.
        lower_steps: N_L pretext steps a turn.
        upper_steps: N_U downstream steps a turn.
        proximal: lambda of the proximal term.
        delta: added to lambda: the effective lambda is lambda + delta.
        gamma: weight of the direct downstream loss.
        products: conjugate-gradient steps, or Neumann terms, for each upper step.
        lower_rate: SGD learning rate of the lower level, momentum .9.
        upper_rate: SGD learning rate of the upper level, momentum .9.
        upper_batch: labelled images an upper step.
        warm_up: steps that train the downstream head on the frozen backbone first.
        clip: largest gradient norm at both levels.
    """

    alternations: int = 20
    lower_steps: int = 20
    upper_steps: int = 4
    proximal: float = 0.3
    delta: float = 1.0
    gamma: float = 1.0
    products: int = 5
    lower_rate: float = 0.03
    upper_rate: float = 0.05
    upper_batch: int = 128
    warm_up: int = 50
    clip: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: data, pretraining, the BiSSL stage, fine-tuning."""

    size: int | None = 14
    shift: Shift = field(default_factory=Shift)
    num_labels: int = 500
    num_validation: int = 500
    num_pretext: int | None = None
    pretraining: Pretraining = field(default_factory=Pretraining)
    alignment: Alignment = field(default_factory=Alignment)
    fine_tune_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    fine_tune_steps: int = 200


PRESETS: dict[str, Recipe] = {
    "tiny": Recipe(
        num_labels=100,
        num_validation=100,
        pretraining=Pretraining(widths=(64, 32), batch_size=64, steps=20),
        alignment=Alignment(alternations=2, lower_steps=4, upper_steps=2, warm_up=5, upper_batch=50),
        fine_tune_rates=(0.03,),
        fine_tune_steps=20,
    ),
    "small": Recipe(),
    "large": Recipe(
        size=None,
        pretraining=Pretraining(widths=(512, 128), batch_size=256, steps=2000),
        alignment=Alignment(alternations=60, lower_steps=20, upper_steps=8),
        fine_tune_steps=500,
    ),
}
"""`tiny` shows in seconds that everything runs; `small` is the demo's; `large` wants a longer wait."""
