r"""GeSSL: towards a universal self-supervised model, one that its tasks' specialists do not leave far behind.

Every mini-batch is a task whose images are the classes [abs]. The *sigma-measurement* is the gap between the model f
and the tasks' own best models f*_l, sigma(f) = sum_l KL(pi(f*_l) || pi(f_l)) [abs for the idea, rec for the formula];
pi is the instances' distribution at query views. Two variants:

    target (versions 1-4) [rec]: f_l^K = K steps from f on task l, and its own state s updates later is the target,
        min_f  1/M sum_l KL( pi(stop f_l^{K+s}) || pi(f_l^K) ) + mix L_ssl(f_l^K; Q_l)
    threshold (version 5) [abs]: the inner loop is guided by an auxiliary network g, the outer one trains f and g,
        f'_l = f - alpha d_f [ L_ssl(f; S_l) + eta L_disc(f, g; S_l) ],   min_{f, g}  1/M sum_l L_ssl(f'_l; Q_l)

L_disc's published formula is not known. Ours [rec]: g gives each view a threshold t_i = tanh g(z_i), which the cosine
of its other view is to exceed and those of all other views are to stay under, by a softplus at temperature tau. Only
the inner loss reads g, so that its gradient is a second derivative throughout.

Reference: J. Li et al., GeSSL, arXiv 2405.01053 (versions differ).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypergrad as hg
from ssl_tasks.controls import CONTROLS, SAME_STEPS, controls
from ssl_tasks.cost import Clock, peak_bytes
from ssl_tasks.heldout import MEASURES, held_out, sigma
from ssl_tasks.hypergradients import MethodName, method_of
from ssl_tasks.instances import InstanceTasks, Pair, deviation, embedded, instance_accuracy, instance_logits
from ssl_tasks.losses import unit
from ssl_tasks.optimizers import OptimizerName, cosine, optimizer_of
from ssl_tasks.pretext import FollowTarget, Tower
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.system import COLUMNS, Arm, Experiment, System, Trial

COST: Mapping[str, str] = {"step_ms": "ms a step", "megabytes": "MB a step"}


class Universal(nn.Module):
    """What the outer level trains: the model f, and in the threshold variant the auxiliary network g."""

    def __init__(self, model: Tower, auxiliary: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.auxiliary = auxiliary


@dataclass(frozen=True, kw_only=True)
class GeSSL(System):
    """GeSSL, in the letters of docs/gessl.md.

    Attributes:
        source: the data; not shifted by default, since the tasks are about the pretext's own domain.
        pretraining: of the common start; its pretext is L_ssl: simclr, byol, barlow-twins or vicreg.
        evaluation: downstream.
        variant: target: a model some updates ahead is the target (v1-v4); threshold: an auxiliary network (v5).
        method: hypergradient methods, an arm each. unrolled: through all K steps; truncated: through the last two;
            first-order: through none. Implicit ones want --proximal > 0.
        ablate: instead of an arm for each method, the ablations that reviewers asked for: inner depth, order of the
            derivative, support and query apart or not; with time and memory a step.
        steps: outer steps.
        tasks: M, tasks an outer step, under one vmap.
        ways: images of a task.
        inner_steps: K.
        inner_rate: alpha of the inner SGD.
        lead: s, how many updates the target is ahead.
        split: whether query views are others than the support's.
        temperature: of pi, and of the softplus in L_disc.
        mix: weight of L_ssl on the query in the target variant: sigma alone is smallest for a collapsed model. 5 was
            better than 1 on held-out tasks of seeds 0 and 1.
        guidance: eta, weight of L_disc.
        width: of the auxiliary network's hidden layer.
        proximal: weight of half the squared distance to f in the inner loss.
        rate: first learning rate of the outer level, cosine schedule to zero.
        optimizer: of the outer level.
        chunk: tasks at a time under one vmap; None measures whether all or one at a time are faster.
        cost: pretext steps that take the time of one outer step, for the control of the same cost; as measured on CPU.
    """

    name: ClassVar[str] = "gessl"
    about: ClassVar[str] = "GeSSL: a universal model by the sigma-measurement (arXiv 2405.01053)"

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False))
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=300))
    evaluation: Evaluation = field(default_factory=Evaluation)
    variant: Literal["target", "threshold"] = "target"
    method: tuple[MethodName, ...] = ("unrolled", "first-order")
    ablate: bool = False
    steps: int = 120
    tasks: int = 8
    ways: int = 16
    inner_steps: int = 2
    inner_rate: float = 0.1
    lead: int = 3
    split: bool = True
    temperature: float = 0.1
    mix: float = 5.0
    guidance: float = 1.0
    width: int = 32
    proximal: float = 0.0
    rate: float = 3e-3
    optimizer: OptimizerName = "adam"
    chunk: int | None = None
    cost: float = 16.0

    @classmethod
    def presets(cls) -> Mapping[str, GeSSL]:
        """Return the named settings; of "paper" the scale and the base are published [abs], the rest is [rec]."""
        tiny = {**TINY, "source": replace(TINY["source"], shifted=False)}
        base = replace(LARGE["pretraining"], pretext=replace(LARGE["pretraining"].pretext, loss="barlow-twins"))
        large = {**LARGE, "pretraining": base}
        return {
            "tiny": cls(**tiny, steps=3, tasks=4, ways=8),
            "small": cls(),
            "paper": cls(**large, steps=100_000, tasks=16, ways=64, optimizer="lars", rate=1.0, chunk=1),
        }

    def experiment(self) -> Experiment:
        """Return the controls, which see as many images a step, and an arm for each method or each ablation."""
        size = self.tasks * self.ways
        arms = controls(self.pretraining, steps=self.steps, cost=round(self.cost * self.steps), batch_size=size)
        if self.ablate:
            arms |= {f"depth {k}": replace(self, inner_steps=k).arm("unrolled") for k in (1, 2, 4)}
            arms["last two of 4"] = replace(self, inner_steps=4).arm("truncated")
            arms["first order"] = self.arm("first-order")
            arms["query = support"] = replace(self, split=False).arm("unrolled")
        else:
            arms |= {f"GeSSL {name}": self.arm(name) for name in dict.fromkeys(self.method)}
        return Experiment(
            title=f"GeSSL, {self.variant}",
            source=self.source,
            pretraining=self.pretraining,
            evaluation=self.evaluation,
            arms=arms,
            over=SAME_STEPS,
            controls=CONTROLS,
            extra=lambda _, trial: held_out(trial, self.pretraining, ways=self.ways, rate=self.inner_rate),
            columns={**COLUMNS, **MEASURES, **(COST if self.ablate else {})},
            panels={"sigma": "sigma on held-out tasks", "task_accuracy": "held-out tasks, %", "probe": "probe, %"},
            curves={"sigma": "sigma of training tasks", "deviation": "deviation of embeddings (0: collapse)"},
        )

    def arm(self, name: MethodName) -> Arm:
        """Return the arm that trains f with one hypergradient method; under `ablate` it notes time and memory too."""

        def train(trial: Trial) -> nn.Module:
            if self.ablate:
                rehearsal = self.graph(replace(trial, backbone=copy.deepcopy(trial.backbone)), name)
                trial.noted["megabytes"] = peak_bytes(rehearsal.step) / 1e6
            engine = self.graph(trial, name)
            clock = Clock()
            follow = FollowTarget(self.pretraining.pretext, trial.backbone)
            history = engine.run(self.steps, callbacks=[*trial.callbacks, follow, clock])
            if self.ablate:
                trial.noted["step_ms"] = clock.milliseconds()
            for curve in ("sigma", "deviation"):
                trial.curves[curve] = history[f"universal.{curve}"]
            return trial.backbone.encoder

        return Arm(train, self.steps, lambda trial: self.graph(trial, name))

    def graph(self, trial: Trial, name: MethodName) -> hg.Engine:
        """Return the engine; `universal` holds f, the trial's tower, trained in place, and g where there is one."""
        model, target, pretext = trial.backbone.tower, trial.backbone.target, self.pretraining.pretext
        learner, ahead, threshold = copy.deepcopy(model), copy.deepcopy(model), self.variant == "threshold"
        auxiliary = nn.Sequential(nn.Linear(pretext.out, self.width), nn.SiLU(), nn.Linear(self.width, 1))
        # the target variant has no g; no parameter then
        universal = Universal(model, auxiliary.to(next(model.parameters())) if threshold else nn.Identity())

        def inner(own: Any, models: Any, views: Pair) -> Tensor:
            loss = pretext(own, views, target)
            if threshold:
                loss = loss + self.guidance * self.discrimination(own, models.universal.auxiliary, views)
            if self.proximal:
                pairs = zip(own.parameters(), models.universal.model.parameters(), strict=True)
                loss = loss + self.proximal / 2 * sum(((p - q) ** 2).sum() for p, q in pairs)
            return loss

        def outer(models: Any, batch: dict[str, Pair]) -> tuple[Tensor, dict[str, Tensor]]:
            own, best = (embedded(f, batch["support"], batch["query"]) for f in (models.learner, models.ahead))
            logits = instance_logits(own, temperature=self.temperature)
            gap = sigma(instance_logits(best, temperature=self.temperature), logits)
            metrics = {"sigma": gap, "accuracy": instance_accuracy(logits), "deviation": deviation(own[1])}
            if threshold:
                return pretext(models.learner, batch["query"], target), metrics
            task = pretext(models.learner, batch["query"], target) if self.mix else torch.zeros_like(gap)
            return gap + self.mix * task, metrics

        method = method_of(name, alone=True, num_upper=sum(p.numel() for p in universal.parameters()))
        shared: dict[str, Any] = {"tasks": self.tasks, "chunk": self.chunk}
        shared["select"] = lambda batch, step: batch["support"]  # noqa: ARG005
        adapted = hg.Problem(
            "learner",
            module=learner,
            loss=lambda models, views: inner(models.learner, models, views),
            optimizer=torch.optim.SGD(learner.parameters(), lr=self.inner_rate),
            steps=self.inner_steps,
            start=lambda models: dict(models.universal.model.named_parameters()),
            method=method,
            **shared,
        )
        further = hg.Problem(
            "ahead",
            module=ahead,
            loss=lambda models, views: pretext(models.ahead, views, target),
            optimizer=torch.optim.SGD(ahead.parameters(), lr=self.inner_rate),
            steps=self.lead,
            start=lambda models: dict(hg.detach(models.learner).named_parameters()),
            detach=True,
            **shared,
        )
        above = optimizer_of(self.optimizer, universal, lr=self.rate)
        data = InstanceTasks(
            images=trial.data.pretext,
            augment=self.pretraining.augment,
            tasks=self.tasks,
            ways=self.ways,
            seed=trial.seed + 20_000,
            split=self.split,
        )
        schedule = cosine(above, self.steps)
        top = hg.Problem("universal", module=universal, loss=outer, optimizer=above, scheduler=schedule, data=data)
        return hg.Engine([[adapted, further], top])

    def discrimination(self, own: Any, auxiliary: Any, views: Pair) -> Tensor:
        """Return L_disc(f, g; S): each view's threshold between its other view and everything else [rec]."""
        z = unit(own(torch.cat(views)))
        count = len(z)
        thresholds = torch.tanh(auxiliary(z))
        cosines, itself = z @ z.T, torch.eye(count, dtype=torch.bool, device=z.device)
        other = itself.roll(count // 2, 0)
        over = F.softplus((thresholds - cosines) / self.temperature)
        under = F.softplus((cosines - thresholds) / self.temperature)
        rest = ~(itself | other)
        return (over * other).sum() / count + (under * rest).sum() / (count * (count - 2))
