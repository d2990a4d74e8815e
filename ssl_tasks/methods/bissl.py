r"""BiSSL: align a pretrained backbone with its downstream task, as a bilevel problem on `hypergrad`.

Two backbones of one architecture, theta_P below with the pretext head phi_P, theta_D above with the downstream head
phi_D, tied by a proximal term only [abs, code]:

    min_{theta_D, phi_D}  L_D(theta_P*(theta_D), phi_D) + gamma L_D(theta_D, phi_D)
    s.t. theta_P*(theta_D), phi_P* = argmin L_P(theta_P, phi_P) + lambda/2 ||theta_P - theta_D||^2

With H the Hessian of L_P in theta_P the response is lambda (H + lambda I)^-1. The released code solves with lambda +
delta wherever lambda stands in it, (I + H/(lambda + delta)) x = v: an *effective lambda* [code], which `response` says
here; plain damping, lambda (H + (lambda + delta) I)^-1 v, is the method "damped". The Hessian ranges over the backbone,
phi_P held fixed, and one fresh pretext batch serves all products between two runs of the lower level [code]. The
released solve is per tensor, the method "layerwise-cg"; "cg" is one solve over the whole backbone.

Reference: G. Zakarias, L. Hansen, Z.-H. Tan, "BiSSL: Enhancing the Alignment Between Self-Supervised Pretraining and
Downstream Fine-Tuning via Bilevel Optimization", arXiv 2410.02387.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.controls import CONTROLS, CONVENTIONAL, controls
from ssl_tasks.hypergradients import MethodName, method_of
from ssl_tasks.optimizers import OptimizerName, cosine, optimizer_of
from ssl_tasks.pipeline import linear_head, views
from ssl_tasks.pretext import FollowTarget, Pretext, Tower
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.streams import Labelled
from ssl_tasks.system import Arm, Experiment, System, Trial


@dataclass(frozen=True, kw_only=True)
class BiSSL(System):
    """BiSSL's stage between pretraining and fine-tuning, in the letters of docs/bissl.md.

    Attributes:
        source: the data.
        pretraining: of the backbone; its pretext and views are the lower level's too.
        evaluation: downstream.
        method: hypergradient methods, an arm each. cg: conjugate gradients with the effective lambda = lambda + delta;
            layerwise-cg: as released, tensor by tensor; damped: delta as plain damping; one-step: the inverse curvature
            replaced by the identity; no-implicit: the same alternation with the implicit term left out; unrolled and
            forward want --upper-steps 1.
        alternations: T, how often the two levels take turns.
        lower_steps: N_L pretext steps a turn.
        upper_steps: N_U downstream steps a turn.
        proximal: lambda of the proximal term.
        delta: added to lambda: the effective lambda is lambda + delta. It has to exceed the pretext's negative
            curvature, about 1.1 after pretraining by `small`.
        gamma: weight of the direct downstream loss.
        backbone_only: whether the backbone alone responds, phi_P held fixed [code]; otherwise phi_P responds too.
        products: conjugate-gradient steps, or Neumann terms, for each upper step: 5 as released, 3 leave a relative
            residual of about .2 here.
        lower_optimizer: of the lower level.
        lower_rate: its first learning rate, cosine schedule to zero.
        upper_rate: first SGD learning rate of the upper level, cosine schedule to zero.
        upper_momentum: zero by default, against .9 as released: the cotangent at the lower backbone stands still for
            `upper_steps` steps, and momentum over so late a signal overshoots until the lower level breaks.
        upper_batch: labelled images an upper step.
        warm_up: steps that train the downstream head on the frozen backbone first.
        clip: largest gradient norm at both levels.
    """

    name: ClassVar[str] = "bissl"
    about: ClassVar[str] = "BiSSL: align a pretrained backbone with its downstream task (arXiv 2410.02387)"

    source: SourceOptions = field(default_factory=Source)
    pretraining: Pretraining = field(default_factory=Pretraining)
    evaluation: Evaluation = field(default_factory=Evaluation)
    method: tuple[MethodName, ...] = ("cg", "layerwise-cg", "one-step", "no-implicit")
    alternations: int = 50
    lower_steps: int = 10
    upper_steps: int = 8
    proximal: float = 1.0
    delta: float = 1.0
    gamma: float = 1.0
    backbone_only: bool = True
    products: int = 3
    lower_optimizer: OptimizerName = "sgd"
    lower_rate: float = 0.03
    upper_rate: float = 0.1
    upper_momentum: float = 0.0
    upper_batch: int = 128
    warm_up: int = 50
    clip: float = 10.0

    @classmethod
    def presets(cls) -> Mapping[str, BiSSL]:
        """Return the named settings; "paper" is the published setting of ImageNet at 96 pixels [code]."""
        tiny = cls(**TINY, alternations=2, lower_steps=4, upper_steps=2, warm_up=5, upper_batch=50)
        paper = cls(
            **LARGE,
            method=("layerwise-cg",),
            alternations=500,
            lower_steps=20,
            proximal=1e-3,
            delta=10.0,
            products=5,
            lower_optimizer="lars",
            lower_rate=1.0,
            upper_rate=0.03,
            upper_momentum=0.9,
            upper_batch=256,
            warm_up=20 * 16,
        )
        with_byol = replace(LARGE["pretraining"], pretext=Pretext(loss="byol", decay=0.9995, hidden=256, out=256))
        return {"tiny": tiny, "small": cls(), "paper": paper, "paper-byol": replace(paper, pretraining=with_byol)}

    def experiment(self) -> Experiment:
        """Return the controls and an arm for each hypergradient method.

        The control of the same cost counts gradients, a Hessian product as two: a turn takes N_L lower gradients, the
        tape (two), and for each upper step its products and two downstream gradients.
        """
        turn = self.lower_steps + 2 + self.upper_steps * (2 * self.products + 2)
        steps = self.alternations * self.lower_steps
        arms = controls(self.pretraining, steps=steps, cost=self.alternations * turn)
        for name in dict.fromkeys(self.method):
            arms[f"BiSSL {name}"] = self._arm(name)
        return Experiment(
            title="BiSSL",
            source=self.source,
            pretraining=self.pretraining,
            evaluation=self.evaluation,
            arms=arms,
            over=CONVENTIONAL,
            controls=CONTROLS,
        )

    def _arm(self, name: MethodName) -> Arm:
        """Return the arm that runs the stage with one hypergradient method and keeps the *lower* backbone [code]."""

        def align(trial: Trial) -> nn.Module:
            pretext = trial.backbone.tower
            head = linear_head(
                pretext.encoder, self._labelled(trial), trial.data, rate=self.upper_rate, steps=self.warm_up
            )
            downstream = Tower(copy.deepcopy(pretext.encoder), head)
            engine = self.graph(downstream, trial, name)
            task = self.pretraining.pretext  # BYOL's target moves once a turn and stands still in products [code]
            follow = FollowTarget(task, trial.backbone, every=self.upper_steps, steps=self.lower_steps)
            with warnings.catch_warnings():  # counted below instead: a few steps may meet negative curvature
                warnings.filterwarnings("ignore", "hypergradient of problem", RuntimeWarning)
                history = engine.run(
                    self.alternations * self.upper_steps,
                    callbacks=[*trial.callbacks, follow],
                )
            codes = history["downstream.result"] if "downstream.result" in history.keys() else []
            trial.noted["breakdowns"] = sum(hg.Result(int(code)).is_breakdown for code in codes)
            return pretext.encoder

        def check(trial: Trial) -> None:
            encoder = copy.deepcopy(trial.backbone.encoder)
            head = nn.Linear(int(encoder.dim), trial.data.num_classes).to(trial.data.device)  # type: ignore[arg-type]
            self.graph(Tower(encoder, head), trial, name)

        return Arm(align, self.alternations * self.upper_steps, check)

    def graph(self, downstream: Tower, trial: Trial, name: MethodName) -> hg.Engine:
        """Return the engine of the two levels.

        Args:
            downstream: theta_D and phi_D, trained in place, as theta_P and phi_P of the trial's backbone are.
            trial: data and seed.
            name: the hypergradient method.
        """
        pretext, target, task = trial.backbone.tower, trial.backbone.target, self.pretraining.pretext

        def tied(strength: float) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
            def loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
                pairs = zip(models.pretext.encoder.parameters(), models.downstream.encoder.parameters(), strict=True)
                distance = sum(((p - q) ** 2).sum() for p, q in pairs)
                return task(models.pretext, batch, target) + strength / 2 * distance

            return loss

        def downstream_loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = batch
            below = models.downstream.head(models.pretext.encoder(images))
            here = models.downstream(images)
            return nn.functional.cross_entropy(below, labels) + self.gamma * nn.functional.cross_entropy(here, labels)

        effective = self.proximal + self.delta
        method = method_of(
            name,
            products=self.products,
            damping=self.delta,
            step_size=1 / effective,
            over=["encoder."] if self.backbone_only else None,
            fresh=True,
            num_upper=sum(p.numel() for p in downstream.parameters()),
            sizes=[p.numel() for p in (pretext.encoder if self.backbone_only else pretext).parameters()],
        )
        differentiates_run = isinstance(method, (hg.Unrolled, hg.ForwardUnrolled, hg.Reptile))
        below = optimizer_of(self.lower_optimizer, pretext, lr=self.lower_rate)
        lower = hg.Problem(
            "pretext",
            module=pretext,
            loss=tied(self.proximal),
            response=None if method is None or name == "damped" or differentiates_run else tied(effective),
            optimizer=below,
            scheduler=cosine(below, self.alternations * self.lower_steps),
            data=views(self.pretraining, trial.data, seed=trial.seed + 20_000),
            steps=self.lower_steps,
            every=self.upper_steps,
            clip_norm=self.clip,
            method=method,
            detach=method is None,
        )
        above = torch.optim.SGD(downstream.parameters(), lr=self.upper_rate, momentum=self.upper_momentum)
        upper = hg.Problem(
            "downstream",
            module=downstream,
            loss=downstream_loss,
            optimizer=above,
            scheduler=cosine(above, self.alternations * self.upper_steps),
            data=self._labelled(trial),
            clip_norm=self.clip,
        )
        return hg.Engine([lower, upper], on_breakdown="warn")

    def _labelled(self, trial: Trial) -> Labelled:
        size = min(self.upper_batch, len(trial.data.train))
        return Labelled(split=trial.data.train, batch_size=size, seed=trial.seed + 30_000)
