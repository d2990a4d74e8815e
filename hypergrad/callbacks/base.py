"""What callbacks are."""

from __future__ import annotations

from typing import Any, Protocol

from hypergrad.history import History, Record


class Runnable(Protocol):
    """What a callback may read of an engine."""

    num_steps: int

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on later."""
        ...


class Callback:
    """Told about a run; reads the engine, never changes it. Override what you need."""

    should_stop: bool = False
    """Set True to end the run after this step."""

    def on_start(self, engine: Runnable, num_steps: int) -> None:
        """Do something before the first step."""

    def on_step(self, engine: Runnable, record: Record) -> None:
        """Do something after a step of the top level."""

    def on_end(self, engine: Runnable, history: History) -> None:
        """Do something when the run ends, also by an error."""
