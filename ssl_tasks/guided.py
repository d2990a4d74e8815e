"""A pretext whose few free numbers follow a probe: the upper level and the arms that such methods share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
import tyro
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.datasets import Data
from ssl_tasks.hypergradients import MethodName, method_of
from ssl_tasks.optimizers import cosine, optimizer_of
from ssl_tasks.pipeline import descend
from ssl_tasks.recipes import Evaluation, Pretraining, Source
from ssl_tasks.ridge import ridge_probe
from ssl_tasks.streams import Labelled
from ssl_tasks.system import COLUMNS, Arm, Experiment, Trial

START, UNIFORM, SAME_COST = "the start", "uniform", "uniform, same cost"
MARKED: Mapping[str, str] = {"probe": COLUMNS["probe"], "planted": "planted", "next": "next", **COLUMNS}
"""Columns of a run in which something is planted: its own number, and that of the nearest other one."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """The upper level, and how the two levels take turns.

    Attributes:
        method: hypergradient methods, an arm each. unrolled: through all K lower steps; truncated: through the last
            two; forward: the same derivative as unrolled, carried along; cg, neumann, one-step and the like: as if the
            lower level had converged, which it has not.
        steps: upper steps.
        lower_steps: K, pretext steps before each upper step.
        rate: Adam's learning rate of the upper level; it moves the arguments of sigmoids and softmaxes.
        clip: largest norm of the hypergradient: the first steps of the lower Adam divide by gradients near zero, and
            their derivative is a hundred times that of later ones.
        upper_batch: labelled images an upper step; half of them fit the probe, half measure it.
        penalty: of the ridge probe.
        products: Hessian products of an implicit method.
        damping: of "damped" and "nystrom".
    """

    method: tuple[MethodName, ...] = ("unrolled",)
    steps: int = 100
    lower_steps: int = 4
    rate: float = 0.1
    clip: float = 0.02
    upper_batch: int = 400
    penalty: float = 0.1
    products: int = 5
    damping: float = 1.0

    @property
    def total(self) -> int:
        """Return how many pretext steps the run has."""
        return self.steps * self.lower_steps

    def engine(
        self,
        name: MethodName,
        trial: Trial,
        *,
        tower: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        choice: nn.Module,
        shown: Callable[[Any], Mapping[str, Tensor]],
        recipe: Pretraining,
    ) -> hg.Engine:
        """Return the engine of two levels: `tower` descends `loss`, `choice` the probe's error at the tower's end.

            min_choice  E( encoder(theta*(choice)); labelled images )   s.t.  theta* = argmin loss(theta, choice)

        Args:
            name: the hypergradient method.
            trial: labelled images and seed.
            tower: has an `encoder`; trained in place; losses read it as `models.tower`.
            loss: of the lower level, (models, batch).
            batches: of the lower level.
            choice: holds the upper variables; losses read it as `models.choice`.
            shown: models -> what each step's record holds beside the error.
            recipe: optimizer and rate of the lower level.
        """
        variables = [p for p in choice.parameters() if p.requires_grad]
        below = optimizer_of(recipe.optimizer, tower, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        lower = hg.Problem(
            "tower",
            module=tower,
            loss=loss,
            optimizer=below,
            scheduler=cosine(below, self.total),
            data=batches,
            steps=self.lower_steps,
            method=method_of(
                name,
                products=self.products,
                damping=self.damping,
                num_upper=sum(p.numel() for p in variables),
                sizes=[p.numel() for p in tower.parameters()],
                alone=True,
            ),
        )

        def probe_error(models: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
            images, labels = batch
            features = models.tower.encoder(images)
            classes = trial.data.num_classes
            error, accuracy = ridge_probe(features, labels, num_classes=classes, penalty=self.penalty)
            return error, {"accuracy": accuracy, **shown(models)}

        split = trial.data.train
        upper = hg.Problem(
            "choice",
            module=choice,
            loss=probe_error,
            optimizer=torch.optim.Adam(variables, lr=self.rate, betas=(0.9, 0.99)),
            clip_norm=self.clip,
            data=Labelled(split=split, batch_size=min(self.upper_batch, len(split)), seed=trial.seed + 30_000),
        )
        return hg.Engine([lower, upper], on_breakdown="warn")


GuideOptions = Annotated[Guide, tyro.conf.arg(name="")]
"""The upper level's options, on the command line without a prefix: `--steps`, not `--guide.steps`."""


def fixed(
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Callable[[Trial], Iterable[Any]],
    recipe: Pretraining,
    *,
    steps: int,
    tower: Callable[[Trial], nn.Module] = lambda trial: trial.backbone.tower,
) -> Arm:
    """Return the arm that trains `steps` steps on `loss(tower, batch)`, with nothing learned above it."""

    def train(trial: Trial) -> nn.Module:
        descend(tower(trial), loss, batches(trial), recipe, steps=steps, advance=trial.advance)
        return trial.backbone.encoder

    return Arm(train, steps)


def learned(
    graph: Callable[[Trial, MethodName], hg.Engine],
    name: MethodName,
    *,
    steps: int,
    note: Callable[[Trial, hg.History], None],
) -> Arm:
    """Return the arm that runs the graph's engine and lets `note` leave what it found in the trial."""

    def train(trial: Trial) -> nn.Module:
        with warnings.catch_warnings():  # counted below instead: the pretext's Hessian has negative curvature
            warnings.filterwarnings("ignore", "hypergradient of problem", RuntimeWarning)
            history = graph(trial, name).run(steps, callbacks=trial.callbacks)
        codes = history["choice.result"] if "choice.result" in history.keys() else []
        trial.noted["breakdowns"] = sum(hg.Result(int(code)).is_breakdown for code in codes)
        note(trial, history)
        return trial.backbone.encoder

    return Arm(train, steps, lambda trial: graph(trial, name))


class Guided(Protocol):
    """What the methods of this kind have in common, by which their experiment is put together."""

    @property
    def source(self) -> Source:
        """The data."""

    @property
    def pretraining(self) -> Pretraining:
        """The lower level."""

    @property
    def evaluation(self) -> Evaluation:
        """Downstream."""

    @property
    def guide(self) -> Guide:
        """The upper level."""

    @property
    def cost(self) -> float:
        """Pretext steps that take the time of one of the K."""

    def uniform(self, steps: int) -> Arm:
        """Return the control in which nothing is learned above."""

    def graph(self, trial: Trial, name: MethodName) -> hg.Engine:
        """Return the engine of the two levels."""

    def note(self, trial: Trial, history: hg.History) -> None:
        """Leave in the trial what a run found."""


def experiment_of(
    method: Guided,
    *,
    title: str,
    columns: Mapping[str, str],
    curves: Mapping[str, str],
    oracle: Mapping[str, Arm] | None = None,
    prepare: Callable[[Data, int], Data] = lambda data, seed: data,  # noqa: ARG005
) -> Experiment:
    """Return the uniform arms, one that knows what is planted, and an arm for each hypergradient method.

    Args:
        method: whose arms they are.
        title: of the table.
        columns: of the table, name -> heading.
        curves: of a figure, name -> label.
        oracle: the name of the arm that knows what is planted, and that arm.
        prepare: data and seed -> the data in which it is planted.
    """
    guide, known = method.guide, dict(oracle or {})
    arms = {
        START: Arm(lambda trial: trial.backbone.encoder),
        UNIFORM: method.uniform(guide.total),
        SAME_COST: method.uniform(round(method.cost * guide.total)),
        **known,
    }
    for name in dict.fromkeys(guide.method):
        arms[f"learned, {name}"] = learned(method.graph, name, steps=guide.steps, note=method.note)
    return Experiment(
        title=title,
        source=method.source,
        pretraining=method.pretraining,
        evaluation=method.evaluation,
        arms=arms,
        over=UNIFORM,
        controls=(SAME_COST, *known),
        columns=columns,
        panels={"probe": "linear probe, %", "knn": "k-NN, %"},
        curves=curves,
        prepare=prepare,
    )


def mark(trial: Trial, planted: list[float], nearest: list[float]) -> None:
    """Note the planted one's number beside the nearest other's: their curves, and where these end."""
    trial.curves.update(planted=planted, next=nearest)
    trial.noted.update(planted=planted[-1], next=nearest[-1])
