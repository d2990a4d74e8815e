r"""MAML on a stream of few-shot tasks: the part that all unsupervised meta-learners here share.

    theta_0 = theta,  theta_{k+1} = theta_k - alpha d CE(theta_k; support),  k < K
    min_theta  mean over tasks of CE(theta_K; query)

On `hypergrad` that is two problems: `learner` (tasks under one vmap, begun at `meta`) and `meta` above. Evaluated on
labelled episodes of classes that no training image shows, after the same kind of descent.

Reference: C. Finn, P. Abbeel, S. Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML
2017, arXiv 1703.03400.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.controls import controls
from ssl_tasks.encoders import classifier_head
from ssl_tasks.fewshot import ClassTasks, adapted_accuracy, only
from ssl_tasks.hypergradients import MethodName, method_of
from ssl_tasks.instances import Pair
from ssl_tasks.optimizers import OptimizerName, cosine, optimizer_of
from ssl_tasks.pretext import Tower
from ssl_tasks.recipes import Pretraining
from ssl_tasks.system import Arm, Trial

SUPERVISED = "supervised MAML"
MEASURES: Mapping[str, str] = {"one_shot": "1-shot unseen %", "five_shot": "5-shot unseen %"}
"""Columns that `Maml.measure` fills."""
Tasks = Callable[[Trial], Iterable[dict[str, Pair]]]


@dataclass(frozen=True, kw_only=True)
class Maml:
    """MAML and its evaluation.

    Attributes:
        method: hypergradient methods, an arm each. unrolled: through all K steps; truncated: through the last two;
            first-order: through none (FOMAML). Implicit ones want --proximal > 0 (iMAML).
        steps: meta-steps.
        tasks: tasks a meta-step, under one vmap.
        ways: N, classes of a task, and of an evaluation episode.
        inner_steps: K.
        inner_rate: alpha.
        proximal: weight of half the squared distance to the initial network in the inner loss.
        rate: first learning rate of the meta-level, cosine schedule to zero.
        optimizer: of the meta-level.
        chunk: tasks at a time under one vmap; None measures whether all or one at a time are faster.
        cost: pretext steps that take the time of one meta-step, for the control of the same time; as measured on CPU.
        adapt_steps: steps of gradient descent on an evaluation episode's support.
        adapt_rates: their learning rates; episodes of the validation split choose.
        episodes: evaluation episodes.
        episode_queries: query images a class in them.
    """

    method: tuple[MethodName, ...] = ("unrolled", "first-order")
    steps: int = 150
    tasks: int = 8
    ways: int = 5
    inner_steps: int = 3
    inner_rate: float = 0.1
    proximal: float = 0.0
    rate: float = 1e-3
    optimizer: OptimizerName = "adam"
    chunk: int | None = None
    cost: float = 10.0
    adapt_steps: int = 5
    adapt_rates: tuple[float, ...] = (0.01, 0.1, 0.5)
    episodes: int = 100
    episode_queries: int = 15

    def __post_init__(self) -> None:
        if not self.adapt_rates or min(self.adapt_rates) <= 0:
            raise ValueError(f"adapt_rates needs at least one learning rate, all positive; got {self.adapt_rates}.")

    def arms(
        self, title: str, tasks: Tasks, pretraining: Pretraining, *, shots: int, queries: int, per_step: int
    ) -> dict[str, Arm]:
        """Return the controls with a fresh head, MAML on the seen classes' labels, and an arm for each method.

        Args:
            title: of the method's arms.
            tasks: what the method trains on.
            pretraining: the controls' recipe.
            shots: support images a class of the labelled tasks.
            queries: query images a class of them.
            per_step: images of the pretext control's step: as many as the method's step sees.
        """
        own = controls(pretraining, steps=self.steps, cost=round(self.cost * self.steps), batch_size=per_step)
        arms = {name: Arm(self._with_head(arm), arm.steps) for name, arm in own.items()}

        def labelled(trial: Trial) -> ClassTasks:
            seen = [c for c in range(trial.data.num_classes) if c not in trial.data.unseen]
            split = trial.data.train
            partition = (only(split.labels, seen),)
            return self._tasks(split.images, partition, self.tasks, shots, queries, seed=trial.seed + 30_000)

        arms[SUPERVISED] = self._arm(labelled, self.method[0])
        return arms | {f"{title} {name}": self._arm(tasks, name) for name in dict.fromkeys(self.method)}

    def _tasks(
        self, images: Tensor, partitions: tuple[Tensor, ...], tasks: int, shots: int, queries: int, *, seed: int
    ) -> ClassTasks:
        return ClassTasks(
            images=images,
            partitions=partitions,
            tasks=tasks,
            ways=self.ways,
            shots=shots,
            queries=queries,
            seed=seed,
        )

    def _head(self, trial: Trial) -> Tower:
        """Return the trial's tower, an N-way head that starts at zero in place of the pretext's."""
        tower = trial.backbone.tower
        first = next(tower.parameters())
        head = classifier_head(int(tower.encoder.dim), self.ways)  # type: ignore[arg-type]
        tower.head, tower.predictor = head.to(first.device, first.dtype), nn.Identity()
        return tower

    def _with_head(self, arm: Arm) -> Callable[[Trial], nn.Module]:
        def train(trial: Trial) -> nn.Module:
            trained = arm.train(trial)
            self._head(trial)
            return trained

        return train

    def _arm(self, tasks: Tasks, name: MethodName) -> Arm:
        def train(trial: Trial) -> nn.Module:
            stream = tasks(trial)
            history = self.graph(self._head(trial), stream, name).run(self.steps, callbacks=trial.callbacks)
            trial.curves["accuracy"] = [100 * share for share in history["meta.accuracy"]]
            return trial.backbone.encoder

        return Arm(train, self.steps, lambda trial: self.graph(self._head(trial), tasks(trial), name))

    def graph(self, meta: Tower, tasks: Iterable[dict[str, Pair]], name: MethodName) -> hg.Engine:
        """Return the engine of the two problems; `meta` is trained in place.

        Args:
            meta: the initial network, encoder and N-way head.
            tasks: batches of them.
            name: the hypergradient method.
        """
        learner = copy.deepcopy(meta)

        def inner(models: Any, batch: Pair) -> Tensor:
            loss = F.cross_entropy(models.learner(batch[0]), batch[1])
            if self.proximal:
                pairs = zip(models.learner.parameters(), models.meta.parameters(), strict=True)
                loss = loss + self.proximal / 2 * sum(((p - q) ** 2).sum() for p, q in pairs)
            return loss

        def outer(models: Any, batch: dict[str, Pair]) -> tuple[Tensor, dict[str, Tensor]]:
            images, labels = batch["query"]
            logits = models.learner(images)
            hits = (logits.argmax(1) == labels).to(logits.dtype).mean()
            return F.cross_entropy(logits, labels), {"accuracy": hits}

        lower = hg.Problem(
            "learner",
            module=learner,
            loss=inner,
            optimizer=torch.optim.SGD(learner.parameters(), lr=self.inner_rate),
            steps=self.inner_steps,
            start=lambda models: dict(models.meta.named_parameters()),
            select=lambda batch, step: batch["support"],  # noqa: ARG005
            method=method_of(name, alone=True, num_upper=sum(p.numel() for p in meta.parameters())),
            tasks=self.tasks,
            chunk=self.chunk,
        )
        above = optimizer_of(self.optimizer, meta, lr=self.rate)
        schedule = cosine(above, self.steps)
        upper = hg.Problem("meta", module=meta, loss=outer, optimizer=above, scheduler=schedule, data=tasks)
        return hg.Engine([lower, upper])

    def measure(self, trial: Trial) -> dict[str, float]:
        """Return accuracies on labelled 1-shot and 5-shot episodes of unseen classes; validation chooses the rate."""
        out = {}
        for shots, name in zip((1, 5), MEASURES, strict=True):
            batches = {part: self._episodes(trial, part, shots) for part in ("validation", "test")}

            def accuracy(part: str, rate: float, batches: Any = batches) -> float:
                tower, chunk = trial.backbone.tower, min(self.episodes, 50)
                return adapted_accuracy(tower, batches[part], steps=self.adapt_steps, rate=rate, chunk=chunk)

            chosen = max(sorted(self.adapt_rates), key=lambda rate, accuracy=accuracy: accuracy("validation", rate))
            out[name] = accuracy("test", chosen)
            trial.noted[f"{name}_rate"] = chosen
        return out

    def _episodes(self, trial: Trial, part: str, shots: int) -> dict[str, Pair]:
        split = trial.data.test if part == "test" else trial.data.validation
        partition, queries = (only(split.labels, trial.data.unseen),), self.episode_queries
        stream = self._tasks(split.images, partition, self.episodes, shots, queries, seed=trial.seed + 50_000)
        return next(iter(stream))


MamlOptions = Annotated[Maml, tyro.conf.arg(name="")]
"""MAML's options, on the command line without a prefix."""
