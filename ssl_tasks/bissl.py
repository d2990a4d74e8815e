r"""BiSSL: align a pretrained backbone with its downstream task, as a bilevel problem on `hypergrad`.

Two backbones of one architecture, theta_P below with the pretext head phi_P, theta_D above with the downstream head
phi_D, tied by a proximal term only [abs, code]:

    min_{theta_D, phi_D}  L_D(theta_P*(theta_D), phi_D) + gamma L_D(theta_D, phi_D)
    s.t. theta_P*(theta_D), phi_P* = argmin L_P(theta_P, phi_P) + lambda/2 ||theta_P - theta_D||^2

With H the Hessian of L_P in theta_P the response is lambda (H + lambda I)^-1. The released code solves with lambda +
delta wherever lambda stands in it, (I + H/(lambda + delta)) x = v: an *effective lambda* [code], which `response` says
here; plain damping, lambda (H + (lambda + delta) I)^-1 v, is an arm of its own. The Hessian ranges over the backbone,
phi_P held fixed, and one fresh pretext batch serves all products between two runs of the lower level [code]. The
released solve is per tensor; here it is one CG over the whole backbone.

Reference: G. Zakarias, L. Hansen, Z.-H. Tan, "BiSSL: Enhancing the Alignment Between Self-Supervised Pretraining and
Downstream Fine-Tuning via Bilevel Optimization", arXiv 2410.02387.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.experiment import Arm, Trial
from ssl_tasks.losses import nt_xent
from ssl_tasks.pipeline import views
from ssl_tasks.recipes import Alignment
from ssl_tasks.streams import Labelled


class Tower(nn.Module):
    """A backbone and the head of its task."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the head's outputs on the backbone's features."""
        return self.head(self.encoder(images))


def method_of(name: str, own: Alignment) -> hg.Method | None:
    """Return the hypergradient method of an arm; None for the alternation without the implicit term.

    Args:
        name: "cg", "damped", "neumann", "first-order" or "no-implicit".
        own: lambda, delta and the number of products.
    """
    effective = own.proximal + own.delta
    shared: dict[str, Any] = {"over": ["encoder."], "fresh": True}
    methods: dict[str, hg.Method | None] = {
        "cg": hg.Implicit(hg.CG(own.products), **shared),
        "damped": hg.Implicit(hg.CG(own.products), damping=own.delta, **shared),
        "neumann": hg.Implicit(hg.Neumann(own.products), **shared),
        "first-order": hg.OneStep(step_size=1 / effective),
        "no-implicit": None,
    }
    return methods[name]


def graph(pretext: Tower, downstream: Tower, trial: Trial, name: str) -> hg.Engine:
    """Return the engine of BiSSL's two levels.

    Args:
        pretext: theta_P and phi_P, trained in place.
        downstream: theta_D and phi_D, trained in place.
        trial: data, recipe and seed.
        name: the arm: see `method_of`.
    """
    recipe, own = trial.recipe, trial.recipe.alignment
    temperature = recipe.pretraining.temperature

    def tied(strength: float) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
        def loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
            one, other = models.pretext(torch.cat(batch)).chunk(2)
            anchors = models.downstream.encoder.parameters()
            distance = sum(
                ((p - q) ** 2).sum() for p, q in zip(models.pretext.encoder.parameters(), anchors, strict=True)
            )
            return nt_xent(one, other, temperature=temperature) + strength / 2 * distance

        return loss

    def downstream_loss(models: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        below = models.downstream.head(models.pretext.encoder(images))
        here = models.downstream(images)
        return nn.functional.cross_entropy(below, labels) + own.gamma * nn.functional.cross_entropy(here, labels)

    effective = name in ("cg", "neumann", "first-order")
    method = method_of(name, own)
    below = torch.optim.SGD(pretext.parameters(), lr=own.lower_rate, momentum=0.9)
    lower = hg.Problem(
        "pretext",
        module=pretext,
        loss=tied(own.proximal),
        response=tied(own.proximal + own.delta) if effective else None,
        optimizer=below,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(below, own.alternations * own.lower_steps),
        data=views(recipe.pretraining, trial.data, seed=trial.seed + 20_000),
        steps=own.lower_steps,
        every=own.upper_steps,
        clip_norm=own.clip,
        method=method,
        detach=method is None,
    )
    optimizer = torch.optim.SGD(downstream.parameters(), lr=own.upper_rate, momentum=own.upper_momentum)
    total = own.alternations * own.upper_steps
    upper = hg.Problem(
        "downstream",
        module=downstream,
        loss=downstream_loss,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
        data=downstream_batches(trial),
        clip_norm=own.clip,
    )
    return hg.Engine([lower, upper], on_breakdown="warn")


def downstream_batches(trial: Trial) -> Labelled:
    """Return the labelled batches of the upper level."""
    size = min(trial.recipe.alignment.upper_batch, len(trial.data.train))
    return Labelled(split=trial.data.train, batch_size=size, seed=trial.seed + 30_000)


def warmed_head(encoder: nn.Module, trial: Trial) -> nn.Linear:
    """Return a downstream head trained on the frozen backbone's features."""
    own = trial.recipe.alignment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed + 40_000)
        head = nn.Linear(int(encoder.dim), trial.data.num_classes).to(trial.data.pretext.device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(head.parameters(), lr=own.upper_rate, momentum=0.9)
    for _, (images, labels) in zip(range(own.warm_up), downstream_batches(trial), strict=False):
        with torch.no_grad():
            features = encoder(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return head


class _Advance(hg.callbacks.Callback):
    """Moves the progress bar by the lower steps that were taken."""

    def __init__(self, own: Alignment, advance: Callable[[], None]) -> None:
        self.own, self.advance, self.count = own, advance, 0

    def on_step(self, engine: Any, record: Any) -> None:  # noqa: ARG002
        if self.count % self.own.upper_steps == 0:
            for _ in range(self.own.lower_steps):
                self.advance()
        self.count += 1


def arm(name: str) -> Arm:
    """Return the arm that runs BiSSL's stage with one hypergradient method and keeps the lower backbone."""

    def align(trial: Trial) -> nn.Module:
        own = trial.recipe.alignment
        pretext = Tower(trial.backbone.encoder, trial.backbone.head)
        downstream = Tower(copy.deepcopy(trial.backbone.encoder), warmed_head(trial.backbone.encoder, trial))
        engine = graph(pretext, downstream, trial, name)
        with warnings.catch_warnings():  # counted below instead: a few steps of a run may meet negative curvature
            warnings.filterwarnings("ignore", "hypergradient of problem", RuntimeWarning)
            history = engine.run(own.alternations * own.upper_steps, callbacks=[_Advance(own, trial.advance)])
        codes = history["downstream.result"] if "downstream.result" in history.keys() else []
        trial.noted["breakdowns"] = sum(hg.Result(int(code)).is_breakdown for code in codes)
        return pretext.encoder

    return align


def arms(names: Sequence[str]) -> dict[str, Arm]:
    """Return BiSSL with each of the named methods, as arms of an experiment."""
    return {f"BiSSL {name}": arm(name) for name in names}
