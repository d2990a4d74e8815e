"""What callbacks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from hypergrad.distributed import Ranks
from hypergrad.history import History, Record


class Runnable(Protocol):
    """What a callback may read of an engine."""

    num_steps: int
    ranks: Ranks | None
    """The processes that train together; None for this one alone."""

    @property
    def names(self) -> Sequence[Sequence[str]]:
        """The problems' names by level, lowest first."""
        ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far, by phase."""
        ...

    @property
    def is_between_steps(self) -> bool:
        """Whether every level is at the end of a step, so that there is a state to save."""
        ...

    def state_dict(self, *, copied: bool = True) -> dict[str, Any]:
        """Return everything needed to go on later."""
        ...

    def check_savable(self) -> None:
        """Raise a ValueError for data that cannot be resumed."""
        ...


def logs(engine: Runnable) -> bool:
    """Return whether this process is the one of its engine's that logs: the first."""
    return engine.ranks is None or engine.ranks.rank == 0


class Callback:
    """Told about a run; reads the engine, never changes it. Override what you need."""

    should_stop: bool = False
    """Set True to end the run after this step."""
    order: ClassVar[int] = 0
    """Callbacks of a higher order are told later; `Checkpoint` comes after the others, whose state it saves."""

    def on_start(self, engine: Runnable, num_steps: int) -> None:
        """Do something before the first step; `num_steps` are to come."""

    def on_step(self, engine: Runnable, record: Record) -> None:
        """Do something after a step of the top level."""

    def on_end(self, engine: Runnable, history: History) -> None:
        """Do something when the run ends, also by an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return what this callback needs to go on in another process: tensors and plain containers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; called after `on_start` of a run that goes on."""
