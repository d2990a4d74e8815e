"""The loop around an engine's steps: callbacks, and going on from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from hypergrad._result import SolveError
from hypergrad.callbacks.base import Callback, Runnable, logs
from hypergrad.callbacks.checkpoint import Checkpoint
from hypergrad.distributed import Ranks, Signals
from hypergrad.distributed.launch import gather_objects
from hypergrad.distributed.silence import PATIENCE, RankError, of_a_collective, silent_ranks
from hypergrad.history import History, Record
from hypergrad.source import DataError
from hypergrad.store import newest


class Steppable(Runnable, Protocol):
    """An engine, as the loop sees it."""

    listeners: Sequence[Callback]
    listening: Mapping[str, Any]
    ranks: Ranks | None
    signals: Signals

    @property
    def mesh(self) -> Any:
        """The device mesh of sharded modules, or None."""
        ...

    def step(self) -> Record:
        """Return the record of one step of the top level."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        ...


def run(engine: Steppable, num_steps: int, callbacks: Iterable[Callback], resume: str | Path | None) -> History:
    """Return the history of the steps taken: `num_steps`, or with `resume` those still missing to so many in all."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"Engine.run: num_steps must be an int >= 1, got {num_steps!r}.")
    listeners = sorted(callbacks, key=lambda listener: listener.order)
    if resume is not None:
        path = _agreed(engine, Path(resume))
        if path is not None:
            rank, size = (0, 1) if engine.ranks is None else (engine.ranks.rank, engine.ranks.size)
            engine.load_state_dict(Checkpoint.read(path, rank=rank, size=size, mesh=engine.mesh))
        num_steps -= engine.num_steps
    history = History()
    engine.listeners, states = listeners, engine.listening
    try:
        with _naming_the_dead(engine), ExitStack() as ends:  # told in reverse: what listens last saves first
            for name, listener in named(listeners).items():
                listener.on_start(engine, max(num_steps, 0))
                ends.callback(listener.on_end, engine, history)
                if name in states:
                    listener.load_state_dict(states[name])
            if any(named(listeners)[name].should_stop for name in states if name in named(listeners)):
                return history
            for number in range(1, num_steps + 1):
                record = engine.step()
                history.append(record)
                for listener in listeners:
                    listener.on_step(engine, record)
                if "stop" in engine.signals.agreed:
                    break
                if any(listener.should_stop for listener in listeners):
                    if engine.ranks is None:
                        break
                    if number < num_steps:  # every rank stops after its next step; no later run is to
                        engine.signals.request("stop")
    finally:
        engine.listeners, engine.listening = (), {}
    return history


@contextmanager
def _naming_the_dead(engine: Steppable) -> Iterator[None]:
    """Where a collective fails in the body, say which ranks are gone."""
    try:
        yield
    except (SolveError, DataError):
        raise
    except RuntimeError as error:
        if engine.ranks is None or not of_a_collective(error):
            raise
        gone = silent_ranks(engine.ranks)
        if not gone:
            raise
        raise RankError(
            f"step {engine.num_steps}: a collective failed and no sign of life came from rank "
            f"{', '.join(map(str, gone))} within {PATIENCE:.0f} s. Look at the output of that process, and start all "
            "of them again with run(..., resume=folder)."
        ) from error


def _agreed(engine: Steppable, folder: Path) -> Path | None:
    """Return the checkpoint to go on from: where there are ranks, the one that the first of them finds."""
    path = newest(folder, set_aside=True) if logs(engine) else None
    return path if engine.ranks is None else gather_objects(engine.ranks, path)[0]


def named(listeners: Sequence[Callback]) -> dict[str, Callback]:
    """Return callbacks under the names that their states are saved by: the class, and which one of it."""
    found: dict[str, Callback] = {}
    for listener in listeners:
        kind = type(listener).__name__
        count = sum(name.split(" ")[0] == kind for name in found)
        found[f"{kind} {count}" if count else kind] = listener
    return found
