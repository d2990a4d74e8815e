r"""UMTRA: meta-learning without labels, on tasks of random images and their augmented copies.

A task: N random unlabelled images are N classes, one support image each; the query is made of augmentations of them
[abs]. MAML (`ssl_tasks/maml.py`) trains an initial network on them. Two random images may be of one class: among C
equal classes all N differ with probability C! / ((C - N)! C^N), .04 for 5 of 5 classes [ours]; the other tasks ask to
tell images of one class apart.

Reference: S. Khodadadeh, L. Boloni, M. Shah, "Unsupervised meta-learning for few-shot image classification", NeurIPS
2019, arXiv 1811.11819.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ssl_tasks.controls import CONTROLS, SAME_STEPS
from ssl_tasks.fewshot import CopyTasks
from ssl_tasks.instances import InstanceTasks
from ssl_tasks.maml import MEASURES, SUPERVISED, Maml, MamlOptions
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.system import COLUMNS, Experiment, System, Trial


@dataclass(frozen=True, kw_only=True)
class UMTRA(System):
    """UMTRA, in the letters of docs/umtra.md.

    Attributes:
        source: the data; half of the classes are kept out of the unlabelled images, and evaluation is about them.
        pretraining: of the common start, none by default, as published; its views are the tasks' augmentations, and its
            learning rate, of which controls take a third, is the controls'.
        evaluation: downstream, on all classes.
        maml: MAML.
        still: whether the support images are the images as they are, as published; otherwise they are augmented too.
    """

    name: ClassVar[str] = "umtra"
    about: ClassVar[str] = "UMTRA: MAML on random images and their augmented copies (arXiv 1811.11819)"

    source: SourceOptions = field(default_factory=lambda: Source(shifted=False, num_unseen=5))
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=0, learning_rate=6e-3))
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(steps=100))
    maml: MamlOptions = field(default_factory=lambda: Maml(cost=14.0))
    still: bool = True

    @classmethod
    def presets(cls) -> Mapping[str, UMTRA]:
        """Return the named settings; "paper" has a convnet of four blocks and 5 ways, its other numbers are [rec]."""
        source = replace(TINY["source"], shifted=False, num_unseen=5)
        tiny = {**TINY, "source": source}
        convnet = Pretraining(encoder="convnet", widths=(32, 32, 32, 32), augment=LARGE["pretraining"].augment, steps=0)
        large = Source(data="folder", size=84, shifted=False, num_labels=20_000, num_validation=4000, num_unseen=20)
        return {
            "tiny": cls(**tiny, maml=Maml(steps=3, tasks=4, episodes=5, episode_queries=4)),
            "small": cls(),
            "paper": cls(
                source=large,
                pretraining=convnet,
                evaluation=LARGE["evaluation"],
                maml=Maml(steps=60_000, tasks=4, inner_steps=5, inner_rate=0.01, episodes=1000),
            ),
        }

    def experiment(self) -> Experiment:
        """Return the controls, MAML with labels, and an arm for each hypergradient method."""
        size = self.maml.tasks * self.maml.ways
        arms = self.maml.arms("UMTRA", self.tasks, self.pretraining, shots=1, queries=2, per_step=size)
        return Experiment(
            title="UMTRA",
            source=self.source,
            pretraining=self.pretraining,
            evaluation=self.evaluation,
            arms=arms,
            over=SAME_STEPS,
            controls=(*CONTROLS, SUPERVISED),
            extra=lambda _, trial: self.maml.measure(trial),
            columns={**MEASURES, **COLUMNS},
            paired="one_shot",
            panels={"one_shot": "1-shot, unseen classes, %", "five_shot": "5-shot, unseen classes, %"},
            curves={"accuracy": "query accuracy on training tasks, %"},
        )

    def tasks(self, trial: Trial) -> CopyTasks:
        """Return the stream of tasks of one trial."""
        return CopyTasks(
            instances=InstanceTasks(
                images=trial.data.pretext,
                augment=self.pretraining.augment,
                tasks=self.maml.tasks,
                ways=self.maml.ways,
                seed=trial.seed + 20_000,
                still=self.still,
            )
        )
