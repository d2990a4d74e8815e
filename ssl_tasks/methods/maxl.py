r"""MAXL: a network makes up the auxiliary labels that help another network most.

A multi-task network f (lower) learns its primary classes y and, inside each of them, `subclasses` auxiliary ones, whose
soft labels a label generator g (upper) gives by a softmax over the subclasses of y alone, the *masked softmax* [abs]:

    q(x, y) = softmax of the entries of g(x) that belong to y
    lower:  f+ = f - alpha d_f mean [ CE(f_primary(x), y) + weight L_aux(f_auxiliary(x), q(x, y)) ]
    upper:  min_g  mean CE(f+_primary(x), y) + entropy sum_k m_k log m_k,    m = mean of q over the batch

    L_aux = -sum_k q_k (1 - p_k)^focus log p_k,  p the softmax of f_auxiliary(x) over all subclasses of all classes

That g is judged by the primary loss of the network that its labels trained, and kept from giving every image one
subclass by the entropy of the labels, is [abs]; the formulas, `focus` and the weights are our reconstruction [rec].

Reference: S. Liu, A. J. Davison, E. Johns, "Self-supervised generalisation with meta auxiliary learning", NeurIPS 2019,
arXiv 1901.08933.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.auxiliary import Generator, MultiTask, auxiliary_loss, negative_entropy, primary_accuracy
from ssl_tasks.controls import CONVENTIONAL
from ssl_tasks.datasets import Split
from ssl_tasks.encoders import encoder
from ssl_tasks.hypergradients import MethodName, method_of
from ssl_tasks.optimizers import cosine, optimizer_of
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.streams import Labelled
from ssl_tasks.system import COLUMNS, Arm, Experiment, System, Trial

SINGLE, RANDOM, LONGER = "single task", "random auxiliary labels", "single task, same time"
Train = Callable[[MultiTask, float], Mapping[str, list[float]]]
"""(network, learning rate) -> curves; trains the network in place."""


@dataclass(frozen=True, kw_only=True)
class MAXL(System):
    """Meta auxiliary learning, in the letters of docs/maxl.md.

    Attributes:
        source: the data; the labelled training images are what all arms learn from.
        pretraining: of the common start; no step by default, as published: networks begin at random.
        evaluation: of the encoders.
        method: hypergradient methods, an arm each. unrolled: through all lower steps since the last upper step;
            one-step, finite-difference: with the identity in place of the inverse curvature; cg, damped, neumann: as if
            the lower level were solved.
        steps: upper steps.
        lower_steps: lower steps before each upper step.
        subclasses: auxiliary classes inside each primary class.
        weight: of the auxiliary loss.
        focus: the exponent of the focal loss; 0 for the cross-entropy.
        entropy: weight of the labels' negative entropy, against one subclass for all.
        rates: learning rates of the lower level, SGD with momentum, cosine to zero; the validation split chooses for
            each arm.
        upper_rate: Adam's learning rate of the generator.
        batch_size: labelled images a step, at both levels.
        products: Hessian products, in implicit methods.
        damping: of "damped".
        cost: single-task steps that take the time of one upper step, for the control of the same time; measured on CPU.
    """

    name: ClassVar[str] = "maxl"
    about: ClassVar[str] = "MAXL: a generator of auxiliary labels (arXiv 1901.08933)"

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False, num_labels=500))
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=0))
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(steps=150))
    method: tuple[MethodName, ...] = ("unrolled",)
    steps: int = 200
    lower_steps: int = 1
    subclasses: int = 5
    weight: float = 1.0
    focus: float = 2.0
    entropy: float = 0.2
    rates: tuple[float, ...] = (0.03, 0.1)
    upper_rate: float = 1e-3
    batch_size: int = 64
    products: int = 5
    damping: float = 1.0
    cost: float = 12.0

    def __post_init__(self) -> None:
        if self.subclasses < 2:
            raise ValueError(f"subclasses must be at least 2 for labels to say anything, got {self.subclasses}.")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates needs at least one learning rate, all positive; got {self.rates}.")

    @classmethod
    def presets(cls) -> Mapping[str, MAXL]:
        """Return the named settings; of "paper" the comparison is published [abs], the scale is [rec]."""
        tiny = {**TINY, "source": replace(TINY["source"], shifted=False)}
        large = {"source": replace(LARGE["source"], num_labels=50_000)}
        large["pretraining"] = replace(LARGE["pretraining"], steps=0)
        return {
            "tiny": cls(**tiny, steps=3, rates=(0.03,), batch_size=32),
            "small": cls(),
            "paper": cls(**{**LARGE, **large}, steps=100_000, rates=(0.01,)),
        }

    def experiment(self) -> Experiment:
        """Return the start, the single task, random subclasses, the single task for longer, and an arm a method."""
        steps = self.steps * self.lower_steps
        arms = {
            CONVENTIONAL: Arm(lambda trial: trial.backbone.encoder),
            SINGLE: self._plain(steps, random=False),
            RANDOM: self._plain(steps, random=True),
            LONGER: self._plain(round(self.cost * self.steps), random=False),
        }
        arms |= {f"MAXL {name}": self._arm(name) for name in dict.fromkeys(self.method)}
        return Experiment(
            title="MAXL",
            source=self.source,
            pretraining=self.pretraining,
            evaluation=self.evaluation,
            arms=arms,
            over=SINGLE,
            controls=(RANDOM, LONGER),
            columns={"accuracy": "primary %", **COLUMNS},
            paired="accuracy",
            panels={"accuracy": "primary task, %", "probe": "linear probe, %"},
            curves={"entropy": "negative entropy of the labels", "auxiliary": "auxiliary loss"},
        )

    def network(self, trial: Trial) -> MultiTask:
        """Return the multi-task network around the trial's encoder, heads drawn from the global generator."""
        return MultiTask(trial.backbone.encoder, trial.data.num_classes, self.subclasses).to(trial.data.device)

    def loss(self, network: Any, images: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
        """Return the lower loss: the primary cross-entropy and, with labels to learn, the auxiliary loss."""
        z = network.encoder(images)
        primary = F.cross_entropy(network.primary(z), labels)
        if target is None:
            return primary
        return primary + self.weight * auxiliary_loss(network.auxiliary(z), target, focus=self.focus)

    def _plain(self, steps: int, *, random: bool) -> Arm:
        """Return the arm without a generator: one task, or subclasses drawn once for each image."""

        def train(trial: Trial) -> nn.Module:
            split, count = trial.data.train, self.subclasses
            if random:
                drawn = torch.randint(count, split.labels.shape, generator=torch.Generator().manual_seed(trial.seed))
                split = Split(split.images, split.labels * count + drawn.to(split.labels.device))

            def fit(network: MultiTask, rate: float) -> Mapping[str, list[float]]:
                optimizer = optimizer_of("sgd", network, lr=rate)
                schedule = cosine(optimizer, steps)
                stream = iter(self._labelled(split, trial.seed + 20_000))
                for _ in range(steps):
                    images, labels = next(stream)
                    target = F.one_hot(labels, count * trial.data.num_classes).float() if random else None
                    optimizer.zero_grad()
                    self.loss(network, images, labels // count if random else labels, target).backward()
                    optimizer.step()
                    schedule.step()
                    trial.advance()
                return {}

            return self._chosen(trial, fit)

        return Arm(train, steps * len(self.rates))

    def _arm(self, name: MethodName) -> Arm:
        def train(trial: Trial) -> nn.Module:
            def fit(network: MultiTask, rate: float) -> Mapping[str, list[float]]:
                history = self.graph(network, trial, name, rate).run(self.steps, callbacks=trial.callbacks)
                return {curve: history[f"generator.{curve}"] for curve in ("entropy", "auxiliary")}

            return self._chosen(trial, fit)

        steps, rate = self.steps * len(self.rates), self.rates[0]
        return Arm(train, steps, lambda trial: self.graph(self.network(trial), trial, name, rate))

    def _chosen(self, trial: Trial, fit: Train) -> nn.Module:
        """Return the encoder of the learning rate that validation chooses; its test accuracy is noted."""
        begun, best = self.network(trial), -1.0
        chosen: nn.Module = begun.encoder
        for rate in self.rates:
            network = copy.deepcopy(begun)
            curves = fit(network, rate)
            found = {part: primary_accuracy(network, getattr(trial.data, part)) for part in ("validation", "test")}
            if found["validation"] > best:
                best, chosen = found["validation"], network.encoder
                trial.noted.update(accuracy=found["test"], rate=rate)
                trial.curves.update(curves)
        return chosen

    def graph(self, network: MultiTask, trial: Trial, name: MethodName, rate: float) -> hg.Engine:
        """Return the engine of the two levels; it trains `network` in place.

        Args:
            network: the lower level.
            trial: data and seed.
            name: the hypergradient method.
            rate: first learning rate of the lower level.
        """
        own = self.pretraining
        drawn = encoder(
            own.encoder, trial.data.image_shape, widths=own.widths or None, norm=own.norm, seed=trial.seed + 2
        )
        first = next(network.parameters())
        generator = Generator(drawn, trial.data.num_classes, self.subclasses).to(first.device, first.dtype)

        def lower_loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            return self.loss(models.network, *batch, models.generator(*batch))

        def upper_loss(models: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            images, labels = batch
            target = models.generator(images, labels)
            z, collapse = models.network.encoder(images), negative_entropy(target)
            auxiliary = auxiliary_loss(models.network.auxiliary(z), target, focus=self.focus).detach()
            primary = F.cross_entropy(models.network.primary(z), labels)
            return primary + self.entropy * collapse, {"entropy": collapse, "auxiliary": auxiliary}

        below = optimizer_of("sgd", network, lr=rate)
        lower = hg.Problem(
            "network",
            module=network,
            loss=lower_loss,
            optimizer=below,
            scheduler=cosine(below, self.steps * self.lower_steps),
            data=self._labelled(trial.data.train, trial.seed + 20_000),
            steps=self.lower_steps,
            method=method_of(
                name,
                products=self.products,
                damping=self.damping,
                sizes=[p.numel() for p in network.parameters()],
                num_upper=sum(p.numel() for p in generator.parameters()),
                alone=True,
            ),
        )
        upper = hg.Problem(
            "generator",
            module=generator,
            loss=upper_loss,
            optimizer=torch.optim.Adam(generator.parameters(), lr=self.upper_rate),
            data=self._labelled(trial.data.train, trial.seed + 30_000),
        )
        return hg.Engine([lower, upper], on_breakdown="warn")

    def _labelled(self, split: Split, seed: int) -> Labelled:
        return Labelled(split=split, batch_size=min(self.batch_size, len(split)), seed=seed)
