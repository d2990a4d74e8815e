r"""Several unlabelled sources considered jointly, each with a weight that is learned.

The survey (arXiv 2103.00845) asks for it as an open direction [abs]; the graph is ours [rec]. With S sources D_s and
weights w = softmax(a),

    min_a  E( encoder(theta*(a)); labelled images )    s.t.  theta* = argmin_theta  sum_s w_s L_ssl(theta; D_s)

theta is the encoder with its head, L_ssl a pretext loss of two views of a batch from each source, E the held-out error
of a ridge probe on a few labelled images, solved for in closed form (`ssl_tasks.ridge`). K lower steps, then one upper
step taken through them: to first order it moves a_s along the agreement of source s's gradient with the probe's.

*Planted*: the unlabelled images fall into S random parts of one size; part (seed modulo S) is spoilt. shuffled: each of
its images has its pixels permuted, by a permutation of its own: same histogram, nothing to see. noise: uniform noise.
turned: another domain, every image turned upside down and inverted.

Reference: H. Peng, "A Brief Summary of Interactions Between Meta-Learning and Self-Supervised Learning", arXiv
2103.00845.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.augment import Augmentation
from ssl_tasks.datasets import Data
from ssl_tasks.guided import MARKED, Guide, GuideOptions, experiment_of, fixed, mark
from ssl_tasks.hypergradients import MethodName
from ssl_tasks.readers import to_float
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.streams import Views
from ssl_tasks.system import Arm, Experiment, System, Trial

ORACLE = "without the spoilt one"
MILD = Augmentation(brightness=0.1, contrast=0.2)
"""The views: in the stronger light of the other presets a spoilt source's gradient stands out a third as much."""
Views2 = tuple[Tensor, Tensor]


class Weights(nn.Module):
    """The upper variables: `forward` returns the sources' weights, which add up to one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(count))

    def forward(self) -> Tensor:
        """Return softmax(logit)."""
        return torch.softmax(self.logit, 0)


@dataclass(frozen=True)
class Together:
    """Batches with a pair of views from every source, without end."""

    streams: tuple[Views, ...]

    def __iter__(self) -> Iterator[tuple[Views2, ...]]:
        return zip(*self.streams, strict=True)


@dataclass(frozen=True, kw_only=True)
class Sources(System):
    """Weighted sources, in the letters of docs/sources.md.

    Attributes:
        source: the data.
        count: S, sources that the unlabelled images are dealt out to.
        spoilt: what is planted in one of them: shuffled, noise, turned, none.
        guide: the upper level.
        pretraining: the lower level: encoder, pretext, views, images of each source a step, optimizer, rate; its steps
            (none) come before all arms.
        evaluation: downstream.
        cost: pretext steps that take the time of one of the K, for the control of the same cost; as measured on CPU.
    """

    name: ClassVar[str] = "sources"
    about: ClassVar[str] = (
        "learned weights of several unlabelled sources, one of them spoilt (survey, arXiv 2103.00845)"
    )

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False))
    count: int = 4
    spoilt: Literal["shuffled", "noise", "turned", "none"] = "shuffled"
    guide: GuideOptions = field(default_factory=lambda: Guide(steps=60, upper_batch=1000, clip=1e-3))
    pretraining: Pretraining = field(
        default_factory=lambda: Pretraining(steps=0, batch_size=32, learning_rate=1e-3, augment=MILD)
    )
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(rates=(0.03, 0.1), steps=100, episodes=50))
    cost: float = 2.6

    def __post_init__(self) -> None:
        """Refuse a single source, and a pretext with a moving target."""
        if self.count < 2:
            raise ValueError(f"--count: weights say something from two sources on, got {self.count}.")
        if self.pretraining.pretext.loss == "byol":
            raise ValueError("--pretraining.pretext.loss byol follows one target, not one a source; choose another.")

    @classmethod
    def presets(cls) -> Mapping[str, Sources]:
        """Return the named settings; nothing of "paper" but the scale is published."""
        tiny = {**TINY, "source": replace(TINY["source"], shifted=False)}
        tiny["pretraining"] = replace(tiny["pretraining"], steps=0, batch_size=16)
        large = {**LARGE, "pretraining": replace(LARGE["pretraining"], steps=0)}
        guide = Guide(method=("damped",), steps=125_000, upper_batch=1024, rate=0.01)
        return {
            "tiny": cls(**tiny, guide=Guide(steps=3, upper_batch=60)),
            "small": cls(),
            "paper": cls(**large, spoilt="none", guide=guide),
        }

    def experiment(self) -> Experiment:
        """Return the uniform arms, the one that knows what is spoilt, and an arm for each hypergradient method."""
        return experiment_of(
            self,
            title=f"sources, one {self.spoilt}",
            columns=MARKED,
            curves={"planted": "weight of the spoilt source", "next": "smallest other weight"},
            oracle={} if self.spoilt == "none" else {ORACLE: self._fixed(self.guide.total, knowing=True)},
            prepare=self.plant,
        )

    def plant(self, data: Data, seed: int) -> Data:
        """Return the data with one part of its unlabelled images spoilt; they are in random order already."""
        images = to_float(data.pretext).clone()
        size = len(images) // self.count
        if size < self.pretraining.batch_size:
            raise ValueError(
                f"--count {self.count} leaves {size} images a source, and a step takes {self.pretraining.batch_size} "
                "of each; ask for fewer sources or a smaller --pretraining.batch-size."
            )
        generator = torch.Generator(images.device).manual_seed(seed + 60_000)
        part = images[seed % self.count * size :][:size]
        noise = torch.rand(part.shape, device=part.device, dtype=part.dtype, generator=generator)
        if self.spoilt == "shuffled":
            order = noise.flatten(1).argsort(1)
            part.copy_(part.flatten(1).gather(1, order).view_as(part))
        elif self.spoilt == "noise":
            part.copy_(noise)
        elif self.spoilt == "turned":
            part.copy_(1 - part.rot90(2, (2, 3)))
        return replace(data, pretext=images)

    def loss(self, tower: Any, batch: tuple[Views2, ...], weights: Tensor) -> Tensor:
        """Return sum_s w_s L_ssl of the sources' views."""
        own = [self.pretraining.pretext(tower, views) for views in batch]
        return (weights * torch.stack(own)).sum()

    def batches(self, trial: Trial) -> Together:
        """Return the stream of the lower level, a batch of views from every source."""
        recipe, size = self.pretraining, len(trial.data.pretext) // self.count
        parts = trial.data.pretext[: size * self.count].split(size)
        seed = trial.seed + 20_000
        return Together(
            tuple(
                Views(images=part, augment=recipe.augment, batch_size=recipe.batch_size, seed=seed + 1_000_000 * k)
                for k, part in enumerate(parts)
            )
        )

    def uniform(self, steps: int) -> Arm:
        """Return the control in which every source weighs the same."""
        return self._fixed(steps, knowing=False)

    def _fixed(self, steps: int, *, knowing: bool) -> Arm:
        def batches(trial: Trial) -> Iterator[tuple[Views2, ...]]:
            bad = trial.seed % self.count if knowing else self.count
            return (tuple(views for k, views in enumerate(batch) if k != bad) for batch in self.batches(trial))

        def loss(tower: nn.Module, batch: tuple[Views2, ...]) -> Tensor:
            return self.loss(tower, batch, batch[0][0].new_full((len(batch),), 1 / len(batch)))

        return fixed(loss, batches, self.pretraining, steps=steps)

    def note(self, trial: Trial, history: hg.History) -> None:
        """Leave the weights in the trial, as they end."""
        weights = [history[f"choice.w_{k}"] for k in range(self.count)]
        trial.noted.update({f"w_{k}": values[-1] for k, values in enumerate(weights)})
        if self.spoilt != "none":
            planted = weights.pop(trial.seed % self.count)
            mark(trial, planted, [min(values) for values in zip(*weights, strict=True)])

    def graph(self, trial: Trial, name: MethodName) -> hg.Engine:
        """Return the engine of the two levels; it trains the trial's tower in place."""
        tower = trial.backbone.tower
        return self.guide.engine(
            name,
            trial,
            tower=tower,
            loss=lambda models, batch: self.loss(models.tower, batch, models.choice()),
            batches=self.batches(trial),
            choice=Weights(self.count).to(next(tower.parameters())),
            shown=lambda models: {f"w_{k}": weight for k, weight in enumerate(models.choice())},
            recipe=self.pretraining,
        )
