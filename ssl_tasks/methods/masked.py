r"""A masked autoencoder whose masking, or whose loss, is learned patch by patch.

The survey (arXiv 2103.00845) counts autoencoders among the pretexts that a meta-learner can guide [abs]; the graph is
ours [rec]. The image falls into P patches. With masks m in [0, 1]^P, drawn for every image, and patch weights omega,

    min  E( encoder(theta*); labelled images )
    s.t. theta* = argmin_theta  sum_p m_p omega_p |d(e((1 - m) x))_p - x_p|^2 / sum_p m_p omega_p

theta = (e, d) are encoder and decoder, E the held-out error of a ridge probe on a few labelled images, solved for in
closed form (`ssl_tasks.ridge`). The upper variables are the masking's, the weights', or both:

    mask:     m_p = sigmoid( (a_p + log u_p - log(1 - u_p)) / tau ), u uniform: a relaxed Bernoulli variable whose
              probability of more than 1/2 is pi_p = sigmoid(a_p); `hard` rounds it and keeps its slope
    weights:  omega = P softmax(b); the masking stays as it begins

u comes with the batch, so that the loss is a smooth function of a, and its mixed derivative exact for the relaxed mask.
K lower steps, then one upper step, taken through them.

Reference: H. Peng, "A Brief Summary of Interactions Between Meta-Learning and Self-Supervised Learning", arXiv
2103.00845; C. Maddison, A. Mnih, Y. W. Teh, "The Concrete Distribution", ICLR 2017, arXiv 1611.00712 (the relaxation);
K. He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377 (the pretext).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.encoders import projection_head
from ssl_tasks.guided import Guide, GuideOptions, experiment_of, fixed
from ssl_tasks.hypergradients import MethodName
from ssl_tasks.losses import reconstruction
from ssl_tasks.pretext import Tower
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.streams import Drawn
from ssl_tasks.system import COLUMNS, Arm, Experiment, System, Trial

Batch = tuple[Tensor, Tensor]


class Patches(nn.Module):
    """The upper variables: `forward` returns the masking's logits, and the patches' weights, one on average."""

    def __init__(self, count: int, ratio: float, learn: Literal["mask", "weights", "both"]) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.full((count,), math.log(ratio / (1 - ratio))), requires_grad=learn != "weights")
        self.weight = nn.Parameter(torch.zeros(count), requires_grad=learn != "mask")

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (a, omega)."""
        return self.mask, len(self.weight) * torch.softmax(self.weight, 0)


@dataclass(frozen=True, kw_only=True)
class Masked(System):
    """A masked autoencoder, in the letters of docs/masked.md.

    Attributes:
        source: the data.
        learn: what is learned patch by patch: mask (probabilities), weights (of the loss), both.
        patch: side of a patch in pixels; must divide both sides of the image.
        ratio: where every masking probability starts, and where the uniform arms leave it.
        temperature: tau of the relaxed masks; small is nearly binary, with slopes that are rarely not zero.
        hard: whether masks are rounded to 0 or 1, with the relaxed one's slope (straight through: a biased derivative).
        guide: the upper level.
        pretraining: the lower level: encoder, batch, optimizer, rate, and the decoder's hidden width as
            pretext.hidden; its steps (none) come before all arms, on its own pretext.
        evaluation: downstream.
        cost: pretext steps that take the time of one of the K, for the control of the same cost; as measured on CPU.
    """

    name: ClassVar[str] = "masked"
    about: ClassVar[str] = "a masked autoencoder with learned masking or loss weights (survey, arXiv 2103.00845)"

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False))
    learn: Literal["mask", "weights", "both"] = "mask"
    patch: int = 2
    ratio: float = 0.5
    temperature: float = 0.5
    hard: bool = False
    guide: GuideOptions = field(default_factory=lambda: Guide(steps=60, upper_batch=1000, clip=1e-3))
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=0, learning_rate=1e-3))
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(rates=(0.03, 0.1), steps=100, episodes=50))
    cost: float = 5.4

    def __post_init__(self) -> None:
        """Refuse a ratio outside (0, 1), and a temperature that is not positive."""
        if not 0 < self.ratio < 1 or self.temperature <= 0:
            raise ValueError(
                f"--ratio lies between 0 and 1, both excluded, and --temperature is positive; got {self.ratio} and "
                f"{self.temperature}."
            )

    @classmethod
    def presets(cls) -> Mapping[str, Masked]:
        """Return the named settings; nothing of "paper" but the scale, the patch and the ratio is published."""
        tiny = {**TINY, "source": replace(TINY["source"], shifted=False, size=14)}
        tiny["pretraining"] = replace(tiny["pretraining"], steps=0)
        large = {**LARGE, "pretraining": replace(LARGE["pretraining"], steps=0)}
        guide = Guide(method=("damped",), steps=125_000, upper_batch=1024, rate=0.01)
        return {
            "tiny": cls(**tiny, guide=Guide(steps=3, upper_batch=60)),
            "small": cls(),
            "paper": cls(**large, patch=16, ratio=0.75, guide=guide),
        }

    def experiment(self) -> Experiment:
        """Return the uniform arms and an arm for each hypergradient method."""
        return experiment_of(
            self,
            title=f"masked autoencoder, learned: {self.learn}",
            columns={"probe": COLUMNS["probe"], "masked": "masked", "inner": "inner", "outer": "outer", **COLUMNS},
            curves={"inner": f"{self._quantity}, inner half", "outer": f"{self._quantity}, outer half"},
        )

    @property
    def _quantity(self) -> str:
        return "weight" if self.learn == "weights" else "masking probability"

    def start(self, trial: Trial) -> Tower:
        """Return the trial's encoder with a decoder drawn from the seed."""
        shape, encoder = trial.data.image_shape, trial.backbone.encoder
        if shape[1] % self.patch or shape[2] % self.patch:
            raise ValueError(
                f"--patch {self.patch} does not divide images of {shape[1]} x {shape[2]}; choose a side that does."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial.seed + 2)
            hidden, pixels = self.pretraining.pretext.hidden, shape[0] * shape[1] * shape[2]
            decoder = projection_head(int(encoder.dim), hidden=hidden, out=pixels)  # type: ignore[arg-type]
        return Tower(encoder, decoder.to(next(encoder.parameters())))

    def masks(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Return m in [0, 1], (n, patches), from the masking's logits and logistic noise."""
        soft = torch.sigmoid((logits + noise) / self.temperature)
        return soft + ((soft > 0.5).to(soft.dtype) - soft).detach() if self.hard else soft

    def loss(self, tower: Any, batch: Batch, logits: Tensor, weight: Tensor) -> Tensor:
        """Return the weighted squared error on what was masked."""
        images, noise = batch
        rows, columns = (side // self.patch for side in images.shape[2:])

        def spread(patches: Tensor) -> Tensor:
            grid = patches.view(-1, 1, rows, columns)
            return grid.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)

        hidden = self.masks(logits, noise)
        output = tower((1 - spread(hidden)) * images).view_as(images)
        return reconstruction(output, images, spread(hidden * weight))

    def batches(self, trial: Trial) -> Drawn:
        """Return the stream of the lower level: images, and a logistic number for each patch of each."""
        images = trial.data.pretext
        count = (images.shape[2] // self.patch) * (images.shape[3] // self.patch)

        def draw(images: Tensor, generator: torch.Generator) -> Batch:
            uniform = torch.rand(len(images), count, device=images.device, dtype=images.dtype, generator=generator)
            return images, torch.logit(uniform, eps=1e-6)

        return Drawn(images=images, draw=draw, batch_size=self.pretraining.batch_size, seed=trial.seed + 20_000)

    def choice(self, trial: Trial) -> Patches:
        """Return the upper variables as they begin."""
        _, height, width = trial.data.image_shape
        count = (height // self.patch) * (width // self.patch)
        return Patches(count, self.ratio, self.learn).to(next(trial.backbone.encoder.parameters()))

    def uniform(self, steps: int) -> Arm:
        """Return the control with one ratio for all patches."""

        def loss(tower: nn.Module, batch: Batch) -> Tensor:
            logit = math.log(self.ratio / (1 - self.ratio))
            return self.loss(tower, batch, torch.full_like(batch[1][0], logit), torch.ones_like(batch[1][0]))

        return fixed(loss, self.batches, self.pretraining, steps=steps, tower=self.start)

    def note(self, trial: Trial, history: hg.History) -> None:
        """Leave the masking in the trial, as it ends."""
        names = ("masked", "inner", "outer")
        trial.noted.update({name: history[f"choice.{name}"][-1] for name in names})
        trial.curves.update({name: history[f"choice.{name}"] for name in names[1:]})

    def graph(self, trial: Trial, name: MethodName) -> hg.Engine:
        """Return the engine of the two levels; it trains the trial's encoder in place."""
        _, height, width = trial.data.image_shape
        rows, columns = height // self.patch, width // self.patch
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        radius = torch.maximum(y.abs(), x.abs()).flatten()
        inner = (radius <= radius.median()).to(trial.data.device)

        def shown(models: Any) -> dict[str, Tensor]:
            logits, weight = models.choice()
            value = weight if self.learn == "weights" else torch.sigmoid(logits)
            return {"masked": logits.sigmoid().mean(), "inner": value[inner].mean(), "outer": value[~inner].mean()}

        return self.guide.engine(
            name,
            trial,
            tower=self.start(trial),
            loss=lambda models, batch: self.loss(models.tower, batch, *models.choice()),
            batches=self.batches(trial),
            choice=self.choice(trial),
            shown=shown,
            recipe=self.pretraining,
        )
