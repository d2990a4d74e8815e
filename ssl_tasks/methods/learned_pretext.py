r"""A learned pretext: strengths of augmentations and weights of pretext losses as the upper variables.

The survey (arXiv 2103.00845) names the idea, self-supervision guided by a meta-learner [abs]; the graph is ours [rec].
With strengths s_k = sigmoid(a_k) in (0, 1) of the augmentations T_k, and weights w = softmax(b) of the losses L_j,

    min_{a, b}  E( encoder(theta*(a, b)); labelled images )
    s.t. theta* = argmin_theta  sum_j w_j L_j( theta; v_1, v_2 ),   v = T_1(s_1) o ... o T_6(s_6) (x)

theta is the encoder with its head, E the held-out error of a ridge probe on a few labelled images, solved for in closed
form (`ssl_tasks.ridge`). Every T_k is reparametrised: its random numbers come with the batch and s_k scales them, so
the views are smooth in s. The lower level never begins anew: K of its steps, then one upper step, taken through them.

*Planted*: to every image of every split a draw of its own is added that says nothing about its class. light: x + u, one
u ~ U(-1, 1) an image; shade: x + u r, a linear ramp r of random direction, values in [-1, 1]. Both views of an image
carry the same draw, so the pretext can tell images apart by it alone and forget the rest; the candidate of that name
adds a new draw in each view. noise and half (one side of a random line through the centre) take information away.

Reference: H. Peng, "A Brief Summary of Interactions Between Meta-Learning and Self-Supervised Learning", arXiv
2103.00845.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.augment import blurred
from ssl_tasks.datasets import Data, Split
from ssl_tasks.guided import MARKED, Guide, GuideOptions, experiment_of, fixed, mark
from ssl_tasks.hypergradients import MethodName
from ssl_tasks.pretext import PretextName
from ssl_tasks.readers import to_float
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.streams import Drawn
from ssl_tasks.system import Arm, Experiment, System, Trial

AUGMENTATIONS = ("light", "shade", "contrast", "blur", "noise", "half")
ORACLE = "planted one at .95"
Batch = dict[str, Tensor]


class Choice(nn.Module):
    """The upper variables: `forward` returns the strengths in (0, 1) and the losses' weights, which add up to one."""

    def __init__(self, num_losses: int, strength: float) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.full((len(AUGMENTATIONS),), math.log(strength / (1 - strength))))
        self.weight = nn.Parameter(torch.zeros(num_losses))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (strengths, weights)."""
        return torch.sigmoid(self.strength), torch.softmax(self.weight, 0)


@dataclass(frozen=True, kw_only=True)
class LearnedPretext(System):
    """A learned pretext, in the letters of docs/learned_pretext.md.

    Attributes:
        source: the data.
        nuisance: what is planted: light (a brightness of its own for each image), shade (a ramp), none.
        amount: how strong it is, in units of the images' range.
        pretraining: the lower level: encoder, batch, optimizer, rate; its steps (none) come before all arms.
        losses: the pretext losses that are weighed.
        evaluation: downstream.
        guide: the upper level.
        strength: where every strength starts, and where the uniform arms leave it.
        cost: pretext steps that take the time of one of the K, for the control of the same cost; as measured on CPU.
    """

    name: ClassVar[str] = "learned-pretext"
    about: ClassVar[str] = "a learned pretext: strengths of augmentations, weights of losses (survey, arXiv 2103.00845)"

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False))
    nuisance: Literal["light", "shade", "none"] = "light"
    amount: float = 1.0
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=0, learning_rate=1e-3))
    losses: tuple[PretextName, ...] = ("simclr", "barlow-twins")
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(rates=(0.03, 0.1), steps=200, episodes=50))
    guide: GuideOptions = field(default_factory=Guide)
    strength: float = 0.3
    cost: float = 4.3

    def __post_init__(self) -> None:
        """Refuse losses that cannot be weighed, and strengths outside (0, 1)."""
        if not self.losses or "byol" in self.losses:
            raise ValueError(
                f"--losses weighs losses of the same two embeddings, at least one; got {self.losses}. byol regresses "
                "on a moving average of itself: leave it out."
            )
        if not 0 < self.strength < 1:
            raise ValueError(f"--strength is a start between 0 and 1, both excluded; got {self.strength}.")

    @classmethod
    def presets(cls) -> Mapping[str, LearnedPretext]:
        """Return the named settings; nothing of "paper" but the scale is published."""
        tiny = {**TINY, "source": replace(TINY["source"], shifted=False)}
        tiny["pretraining"] = replace(tiny["pretraining"], steps=0)
        large = {**LARGE, "pretraining": replace(LARGE["pretraining"], steps=0)}
        guide = Guide(method=("damped",), steps=125_000, upper_batch=1024, rate=0.01)
        return {
            "tiny": cls(**tiny, guide=Guide(steps=3, upper_batch=60)),
            "small": cls(),
            "paper": cls(**large, nuisance="none", guide=guide),
        }

    def experiment(self) -> Experiment:
        """Return the uniform arms, the one that knows what is planted, and an arm for each hypergradient method."""
        known = [0.95 if k == self.nuisance else self.strength for k in AUGMENTATIONS]
        return experiment_of(
            self,
            title=f"learned pretext, planted: {self.nuisance}",
            columns=MARKED,
            curves={"planted": "strength of the planted augmentation", "next": "largest other strength"},
            oracle={} if self.nuisance == "none" else {ORACLE: self._fixed(known, self.guide.total)},
            prepare=self.plant,
        )

    def plant(self, data: Data, seed: int) -> Data:
        """Return the data with the nuisance in every image, one draw each."""
        if self.nuisance == "none":
            return data
        generator = torch.Generator(data.device).manual_seed(seed + 60_000)

        def planted(images: Tensor) -> Tensor:
            drawn = self.draws(to_float(images), generator)
            return to_float(images) + self.amount * drawn[self.nuisance]

        train, validation, test = (
            Split(planted(split.images), split.labels) for split in (data.train, data.validation, data.test)
        )
        return replace(data, pretext=planted(data.pretext), train=train, validation=validation, test=test)

    @staticmethod
    def draws(images: Tensor, generator: torch.Generator) -> Batch:
        """Return the images and the random numbers of their augmentations, all of one image's its own."""
        n, _, height, width = images.shape

        def uniform(*shape: int) -> Tensor:
            return torch.empty(n, *shape, device=images.device, dtype=images.dtype).uniform_(-1, 1, generator=generator)

        y, x = (torch.linspace(-1, 1, size, device=images.device, dtype=images.dtype) for size in (height, width))
        turn, other = math.pi * uniform(1, 1, 1), math.pi * uniform(1, 1, 1)
        ramp, edge = (y[:, None] * torch.cos(t) + x * torch.sin(t) for t in (turn, other))
        normal = torch.randn(images.shape, device=images.device, dtype=images.dtype, generator=generator)
        return {
            "images": images,
            "light": uniform(1, 1, 1),
            "shade": uniform(1, 1, 1) * ramp / math.sqrt(2),
            "contrast": uniform(1, 1, 1),
            "noise": normal / 2,
            "blur": (uniform(1, 1, 1) + 1) / 2,
            "half": (edge > 0).to(images.dtype),
            "fill": (uniform(*images.shape[1:]) + 1) / 2,
        }

    @staticmethod
    def augmented(batch: Batch, strength: Tensor) -> Tensor:
        """Return the views: contrast about the mean, noise on the centre and on a half, and three sums."""
        s = dict(zip(AUGMENTATIONS, strength, strict=True))
        x = batch["images"]
        mean = x.mean((1, 2, 3), keepdim=True)
        x = mean + (1 + s["contrast"] * batch["contrast"]) * (x - mean)
        x = x + s["blur"] * batch["blur"] * (blurred(x) - x)
        x = x + s["half"] * batch["half"] * (batch["fill"] - x)
        return x + sum(s[added] * batch[added] for added in ("light", "shade", "noise"))

    def loss(self, tower: Any, batch: Batch, strength: Tensor, weight: Tensor) -> Tensor:
        """Return sum_j w_j L_j of the views' embeddings; the first half of the batch are first views."""
        embeddings = tower(self.augmented(batch, strength))
        views = (batch["images"], batch["images"])  # taken for their embeddings, which are there already
        own = [replace(self.pretraining.pretext, loss=name)(lambda _: embeddings, views) for name in self.losses]
        return (weight * torch.stack(own)).sum()

    def batches(self, trial: Trial) -> Drawn:
        """Return the stream of the lower level: each image twice, with draws of its own."""
        recipe, images = self.pretraining, trial.data.pretext

        def twice(images: Tensor, generator: torch.Generator) -> Batch:
            return self.draws(torch.cat([images, images]), generator)

        return Drawn(images=images, draw=twice, batch_size=recipe.batch_size, seed=trial.seed + 20_000)

    def uniform(self, steps: int) -> Arm:
        """Return the control that leaves every strength and weight at its start."""
        return self._fixed([self.strength] * len(AUGMENTATIONS), steps)

    def _fixed(self, strengths: list[float], steps: int) -> Arm:
        def loss(tower: nn.Module, batch: Batch) -> Tensor:
            like = batch["images"]
            weight = like.new_full((len(self.losses),), 1 / len(self.losses))
            return self.loss(tower, batch, like.new_tensor(strengths), weight)

        return fixed(loss, self.batches, self.pretraining, steps=steps)

    def note(self, trial: Trial, history: hg.History) -> None:
        """Leave strengths and weights in the trial, as they end."""
        keys = [*(f"s_{k}" for k in AUGMENTATIONS), *(f"w_{k}" for k in self.losses)]
        trial.noted.update({key: history[f"choice.{key}"][-1] for key in keys})
        if self.nuisance != "none":
            others = [history[f"choice.s_{k}"] for k in AUGMENTATIONS if k != self.nuisance]
            mark(trial, history[f"choice.s_{self.nuisance}"], [max(values) for values in zip(*others, strict=True)])

    def graph(self, trial: Trial, name: MethodName) -> hg.Engine:
        """Return the engine of the two levels; it trains the trial's tower in place."""
        tower = trial.backbone.tower

        def shown(models: Any) -> dict[str, Tensor]:
            strength, weight = models.choice()
            named = {f"s_{k}": s for k, s in zip(AUGMENTATIONS, strength, strict=True)}
            return named | {f"w_{k}": w for k, w in zip(self.losses, weight, strict=True)}

        return self.guide.engine(
            name,
            trial,
            tower=tower,
            loss=lambda models, batch: self.loss(models.tower, batch, *models.choice()),
            batches=self.batches(trial),
            choice=Choice(len(self.losses), self.strength).to(next(tower.parameters())),
            shown=shown,
            recipe=self.pretraining,
        )
