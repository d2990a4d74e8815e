"""What a run does, as values: sizes, steps, learning rates; and the named presets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ssl_tasks.augment import Augmentation
from ssl_tasks.datasets import Shift


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Contrastive pretraining of an encoder: Adam, a cosine schedule, NT-Xent."""

    encoder: str = "mlp"
    widths: tuple[int, ...] = (256, 64)
    batch_size: int = 64
    steps: int = 1000
    learning_rate: float = 2e-3
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
        delta: added to lambda: the effective lambda is lambda + delta. It has to exceed the pretext's negative
            curvature, about 1.1 after pretraining by `small`.
        gamma: weight of the direct downstream loss.
        products: conjugate-gradient steps, or Neumann terms, for each upper step: 5 as released, 3 leave a relative
            residual of about .2 here.
        lower_rate: first SGD learning rate of the lower level, momentum .9, cosine schedule to zero.
        upper_rate: first SGD learning rate of the upper level, cosine schedule to zero.
        upper_momentum: zero by default, against .9 as released: the cotangent at the lower backbone stands still for
            `upper_steps` steps, and momentum over so late a signal overshoots until the lower level breaks.
        upper_batch: labelled images an upper step.
        warm_up: steps that train the downstream head on the frozen backbone first.
        clip: largest gradient norm at both levels.
    """

    alternations: int = 50
    lower_steps: int = 10
    upper_steps: int = 8
    proximal: float = 1.0
    delta: float = 1.0
    gamma: float = 1.0
    products: int = 3
    lower_rate: float = 0.03
    upper_rate: float = 0.1
    upper_momentum: float = 0.0
    upper_batch: int = 128
    warm_up: int = 50
    clip: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: data, pretraining, the BiSSL stage, fine-tuning."""

    size: int | None = 14
    shift: Shift = field(default_factory=lambda: Shift(translation=0.3, light=0.5))
    num_labels: int = 1000
    num_validation: int = 500
    num_pretext: int | None = None
    pretraining: Pretraining = field(default_factory=Pretraining)
    alignment: Alignment = field(default_factory=Alignment)
    fine_tune_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    fine_tune_steps: int = 300

    def fitted(self, data: str) -> Recipe:
        """Return the recipe with labelled splits that leave `data` a pretext set; the digits want smaller ones."""
        if data != "digits":
            return self
        return replace(self, num_labels=min(self.num_labels, 300), num_validation=min(self.num_validation, 200))


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
        pretraining=Pretraining(widths=(512, 128), batch_size=256, steps=4000),
        alignment=Alignment(alternations=120),
        fine_tune_steps=1000,
    ),
}
"""`tiny` shows in seconds that everything runs; `small` is the demo's; `large` wants a longer wait."""
