"""Pretrain, probe, fine-tune: the pipeline that every method is compared with, alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ssl_tasks.controls import CONTROLS, CONVENTIONAL, controls
from ssl_tasks.recipes import LARGE, TINY, Evaluation, Pretraining, Source, SourceOptions
from ssl_tasks.system import Experiment, System


@dataclass(frozen=True, kw_only=True)
class Conventional(System):
    """The conventional pipeline.

    Attributes:
        source: the data.
        pretraining: of the backbone.
        evaluation: downstream.
        steps: pretext steps of the control that goes on.
        cost: pretext steps of the control that goes on for longer.
    """

    name: ClassVar[str] = "conventional"
    about: ClassVar[str] = "pretrain, probe, fine-tune: the pipeline that every method is compared with"

    source: SourceOptions = field(default_factory=Source)
    pretraining: Pretraining = field(default_factory=Pretraining)
    evaluation: Evaluation = field(default_factory=Evaluation)
    steps: int = 500
    cost: int = 3800

    @classmethod
    def presets(cls) -> Mapping[str, Conventional]:
        """Return the named settings."""
        return {
            "tiny": cls(**TINY, steps=4, cost=8),
            "small": cls(),
            "paper": cls(**LARGE),
        }

    def experiment(self) -> Experiment:
        """Return the pipeline and two ways of pretraining for longer."""
        return Experiment(
            title="conventional pipeline",
            source=self.source,
            pretraining=self.pretraining,
            evaluation=self.evaluation,
            arms=controls(self.pretraining, steps=self.steps, cost=self.cost),
            over=CONVENTIONAL,
            controls=CONTROLS,
        )
