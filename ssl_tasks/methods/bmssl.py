r"""BMSSL: bootstrapped meta self-supervised learning, a model that is its own teacher on tasks of unlabelled images.

The abstract [abs]: tasks are rebuilt from unlabelled data; level 1 solves a task with the present ability; level 2
improves that ability; a target built from the meta-gradient makes the model its own teacher. The rest is our
reconstruction [rec], after the bootstrapped meta-gradient that it names:

    task:    N unlabelled images, each a class, in support and query views
    level 1: theta_0 = theta,  theta_{k+1} = theta_k - alpha dL_task(theta_k; support),  k < K
    target:  from theta_K, L - 1 more steps on the support, one on the query; a constant
    level 2: min_theta  mean over tasks of  D(target, theta_K(theta); query) + mix L_task(theta_K; query)

D is KL(p_target || p_theta_K) of the instances' distribution at the query views, or another matching function. On
`hypergrad` that is a graph of three problems: `learner` (tasks, begun at `meta`), `teacher` (tasks, begun where the
learner ended, read as a constant) and `meta` above.

Reference: J. Li et al., "Bootstrapped meta self-supervised learning", arXiv 2308.14267; S. Flennerhag et al.,
"Bootstrapped meta-learning", ICLR 2022, arXiv 2109.04504.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.controls import CONTROLS, SAME_STEPS, controls
from ssl_tasks.heldout import MEASURES, held_out
from ssl_tasks.hypergradients import MethodName, method_of
from ssl_tasks.instances import InstanceTasks, deviation, embedded, instance_accuracy, instance_logits
from ssl_tasks.losses import byol, divergence
from ssl_tasks.optimizers import OptimizerName, cosine, optimizer_of
from ssl_tasks.pretext import FollowTarget
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.system import COLUMNS, Arm, Experiment, System, Trial

Matching = Literal["kl", "reverse-kl", "embedding", "parameters"]


@dataclass(frozen=True, kw_only=True)
class BMSSL(System):
    """Bootstrapped meta self-supervised learning, in the letters of docs/bmssl.md.

    Attributes:
        source: the data; not shifted by default, since the tasks are about the pretext's own domain.
        pretraining: of the common start; its pretext is the tasks' loss, its views are theirs.
        evaluation: downstream.
        method: hypergradient methods, an arm each. unrolled: through all K steps; truncated: through the last two;
            first-order: through none (FOMAML). Implicit ones want --proximal > 0 (iMAML).
        steps: meta-steps, of level 2.
        tasks: tasks a meta-step, under one vmap.
        ways: N, images of a task.
        inner_steps: K.
        inner_rate: alpha of the inner SGD.
        target_steps: L: the target is L steps ahead, the last of them on the query.
        matching: D. kl: KL(target || student); reverse-kl: KL(student || target); embedding: 2 - 2 cos of the query
            embeddings; parameters: half the squared distance of the parameters.
        temperature: of the instances' distribution in the KL; low, since a blunt distribution matches anything.
        mix: weight of the tasks' own loss on the query, at level 2: the KL alone can agree on nothing.
        guard: weight of max(0, 1/2 - deviation) of the query embeddings: a guard against collapse.
        proximal: weight of half the squared distance to theta in level 1.
        rate: first learning rate of the meta-level, Adam's or the chosen optimizer's, cosine schedule to zero.
        optimizer: of the meta-level.
        chunk: tasks at a time under one vmap; None measures whether all or one at a time are faster.
        cost: pretext steps that take the time of one meta-step, for the control of the same cost; as measured on CPU.
    """

    name: ClassVar[str] = "bmssl"
    about: ClassVar[str] = "BMSSL: bootstrapped targets on tasks of unlabelled images (arXiv 2308.14267)"

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False))
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=300))
    evaluation: Evaluation = field(default_factory=Evaluation)
    method: tuple[MethodName, ...] = ("unrolled", "first-order")
    steps: int = 120
    tasks: int = 8
    ways: int = 16
    inner_steps: int = 3
    inner_rate: float = 0.1
    target_steps: int = 3
    matching: Matching = "kl"
    temperature: float = 0.1
    mix: float = 1.0
    guard: float = 0.0
    proximal: float = 0.0
    rate: float = 5e-4
    optimizer: OptimizerName = "adam"
    chunk: int | None = None
    cost: float = 16.0

    @classmethod
    def presets(cls) -> Mapping[str, BMSSL]:
        """Return the named settings; of "paper" only the scale is published, the rest is [rec]."""
        tiny = {**TINY, "source": replace(TINY["source"], shifted=False)}
        return {
            "tiny": cls(**tiny, steps=3, tasks=4, ways=8),
            "small": cls(),
            "paper": cls(**LARGE, steps=100_000, tasks=16, ways=64, optimizer="lars", rate=1.0, chunk=1),
        }

    def experiment(self) -> Experiment:
        """Return the controls, which see as many images a step, and an arm for each hypergradient method."""
        size = self.tasks * self.ways
        arms = controls(self.pretraining, steps=self.steps, cost=round(self.cost * self.steps), batch_size=size)
        for name in dict.fromkeys(self.method):
            arms[f"BMSSL {name}"] = self._arm(name)
        return Experiment(
            title="BMSSL",
            source=self.source,
            pretraining=self.pretraining,
            evaluation=self.evaluation,
            arms=arms,
            over=SAME_STEPS,
            controls=CONTROLS,
            extra=lambda _, trial: held_out(trial, self.pretraining, ways=self.ways, rate=self.inner_rate),
            columns={**COLUMNS, **MEASURES},
            panels={"probe": "linear probe, %", "task_accuracy": "held-out tasks, %"},
            curves={"matching": "distance to the target", "deviation": "deviation of embeddings (0: collapse)"},
        )

    def _arm(self, name: MethodName) -> Arm:
        def train(trial: Trial) -> nn.Module:
            engine = self.graph(trial, name)
            follow = FollowTarget(self.pretraining.pretext, trial.backbone)
            history = engine.run(self.steps, callbacks=[*trial.callbacks, follow])
            for curve in ("matching", "deviation"):
                trial.curves[curve] = history[f"meta.{curve}"]
            return trial.backbone.encoder

        return Arm(train, self.steps, lambda trial: self.graph(trial, name))

    def graph(self, trial: Trial, name: MethodName) -> hg.Engine:
        """Return the engine of the three problems; `meta` trains the trial's tower in place.

        Args:
            trial: backbone, data and seed.
            name: the hypergradient method.
        """
        meta, target, pretext = trial.backbone.tower, trial.backbone.target, self.pretraining.pretext
        learner, teacher = copy.deepcopy(meta), copy.deepcopy(meta)

        def task_loss(models: Any, views: tuple[Tensor, Tensor]) -> Tensor:
            loss = pretext(models.learner, views, target)
            if self.proximal:
                pairs = zip(models.learner.parameters(), models.meta.parameters(), strict=True)
                loss = loss + self.proximal / 2 * sum(((p - q) ** 2).sum() for p, q in pairs)
            return loss

        def meta_loss(models: Any, batch: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
            views = embedded(models.learner, batch["support"], batch["query"])
            logits, spread = instance_logits(views, temperature=self.temperature), deviation(views[1])
            loss = matching = self._matching(models, logits, batch)
            if self.guard:
                loss = loss + self.guard * torch.relu(0.5 - spread)
            if self.mix:
                loss = loss + self.mix * pretext(models.learner, batch["query"], target)
            return loss, {"matching": matching, "deviation": spread, "accuracy": instance_accuracy(logits)}

        method = method_of(name, alone=True, num_upper=sum(p.numel() for p in meta.parameters()))
        shared: dict[str, Any] = {"tasks": self.tasks, "chunk": self.chunk}
        level_one = hg.Problem(
            "learner",
            module=learner,
            loss=task_loss,
            optimizer=torch.optim.SGD(learner.parameters(), lr=self.inner_rate),
            steps=self.inner_steps,
            start=lambda models: dict(models.meta.named_parameters()),
            select=lambda batch, step: batch["support"],  # noqa: ARG005
            method=method,
            **shared,
        )
        bootstrap = hg.Problem(
            "teacher",
            module=teacher,
            loss=lambda models, views: pretext(models.teacher, views, target),
            optimizer=torch.optim.SGD(teacher.parameters(), lr=self.inner_rate),
            steps=self.target_steps,
            start=lambda models: dict(hg.detach(models.learner).named_parameters()),
            select=lambda batch, step: batch["query" if step == self.target_steps - 1 else "support"],
            detach=True,
            **shared,
        )
        above = optimizer_of(self.optimizer, meta, lr=self.rate)
        level_two = hg.Problem(
            "meta",
            module=meta,
            loss=meta_loss,
            optimizer=above,
            scheduler=cosine(above, self.steps),
            data=InstanceTasks(
                images=trial.data.pretext,
                augment=self.pretraining.augment,
                tasks=self.tasks,
                ways=self.ways,
                seed=trial.seed + 20_000,
            ),
        )
        return hg.Engine([[level_one, bootstrap], level_two])

    def _matching(self, models: Any, logits: Tensor, batch: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Return D(teacher, student) on one task, of which these are the student's logits."""
        student, teacher = models.learner, models.teacher
        if self.matching == "parameters":
            pairs = zip(student.parameters(), teacher.parameters(), strict=True)
            return torch.stack([((p - q) ** 2).sum() for p, q in pairs]).sum() / 2
        if self.matching == "embedding":
            query = torch.cat(batch["query"])
            return byol(student(query), teacher(query))
        ahead = instance_logits(embedded(teacher, batch["support"], batch["query"]), temperature=self.temperature)
        return divergence(ahead, logits, reverse=self.matching == "reverse-kl")
