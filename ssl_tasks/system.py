"""What a method is here: options that the command line fills in, and the comparison that they spell.

A file in `ssl_tasks/methods` with one `System` in it is a command, `python -m ssl_tasks NAME`. Everything around it is
shared: seeds, resuming, measures, tables, figures, saved backbones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

import hypergrad as hg
from ssl_tasks.datasets import Data
from ssl_tasks.pretext import Backbone
from ssl_tasks.recipes import Evaluation, Pretraining, Source


@dataclass(frozen=True)
class Trial:
    """What an arm receives: a backbone of its own to train, the data, the seed, and where to leave notes.

    Attributes:
        backbone: a copy of the seed's common start.
        data: pretext set and downstream splits.
        seed: of everything that the arm draws.
        advance: moves the progress bar by one step.
        callbacks: for `engine.run`: the progress bar, and TensorBoard where it is installed.
        noted: takes numbers that the arm wants beside its measures.
        curves: takes numbers by step: name -> values, drawn in curves.png.
    """

    backbone: Backbone
    data: Data
    seed: int
    advance: Callable[..., None] = lambda: None
    callbacks: tuple[hg.callbacks.Callback, ...] = ()
    noted: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One thing to compare.

    Attributes:
        train: trains on from the trial's backbone and returns the encoder that is measured.
        steps: how often it will call `advance`, for the progress bar.
        check: builds the arm's graph, so that what does not fit is an error before anything is trained.
    """

    train: Callable[[Trial], nn.Module]
    steps: int = 0
    check: Callable[[Trial], object] | None = None


Measure = Callable[[nn.Module, Trial], Mapping[str, float]]
"""(encoder, trial) -> numbers beside the downstream ones."""

COLUMNS: Mapping[str, str] = {
    "probe": "probe %",
    "fine_tuned": "fine-tuned %",
    "knn": "k-NN %",
    "few_shot": "few-shot %",
    "alignment": "alignment",
    "effective_rank": "rank",
    "seconds": "s",
}
PANELS: Mapping[str, str] = {"probe": "linear probe, before fine-tuning, %", "fine_tuned": "fine-tuned, %"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A comparison: for every seed one common start, and from it every arm, measured alike.

    Attributes:
        title: of the run, its progress bar and its figures.
        source: the data.
        pretraining: of the common start; `steps=0` leaves it untrained.
        evaluation: how encoders are measured downstream.
        arms: name -> arm; the first is the start as it is.
        over: the arm that gains are over, in the table and the figure.
        controls: further arms that results.json compares with.
        extra: more measures than the downstream ones.
        columns: measure -> heading, in the table.
        paired: the measure whose paired gain the table shows.
        panels: measure -> heading, in the figure.
        curves: name of a trial's curve -> label of its axis, in curves.png.
        prepare: (data, seed) -> the data as the arms and the measures see them; what an experiment plants, it plants
            here.
    """

    title: str
    source: Source
    pretraining: Pretraining
    evaluation: Evaluation
    arms: Mapping[str, Arm]
    over: str
    controls: tuple[str, ...] = ()
    extra: Measure | None = None
    columns: Mapping[str, str] = field(default_factory=lambda: dict(COLUMNS))
    paired: str = "probe"
    panels: Mapping[str, str] = field(default_factory=lambda: dict(PANELS))
    curves: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[Data, int], Data] = lambda data, seed: data  # noqa: ARG005, E731

    def load(self, seed: int) -> Data:
        """Return the data of one seed, prepared."""
        return self.prepare(self.source.load(seed), seed)

    def __post_init__(self) -> None:
        missing = [name for name in (self.over, *self.controls) if name not in self.arms]
        if missing:
            raise ValueError(f"gains are measured against {missing}, which are not among the arms {list(self.arms)}.")
        absent = [name for name in (self.paired, *self.panels) if name not in self.columns]
        if absent:
            raise ValueError(f"the measures {absent} are drawn or compared, but are no columns: {list(self.columns)}.")


class System(ABC):
    """A method's options: a frozen dataclass whose fields are what `--help` lists.

    Attributes:
        name: the command.
        about: one line on what it is.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    @classmethod
    @abstractmethod
    def presets(cls) -> Mapping[str, System]:
        """Return the named settings: "tiny" for tests, "small" for two cores, "paper" as published."""

    @abstractmethod
    def experiment(self) -> Experiment:
        """Return the comparison that these options spell."""
