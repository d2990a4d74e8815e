"""Saving a run as it goes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hypergrad import shard_files, store
from hypergrad.callbacks.base import Callback, Runnable, logs
from hypergrad.distributed import Ranks
from hypergrad.distributed.launch import gather_objects
from hypergrad.history import History, Record


class Checkpoint(Callback):
    """Save everything that the run needs to go on, every n-th step and when it ends.

    `engine.run(num_steps, callbacks=[Checkpoint(folder)], resume=folder)` goes on from the newest intact checkpoint, to
    the same numbers, bit for bit, as without the interruption. Each checkpoint is a folder of its own with checksums,
    written under another name and renamed when it is complete: a process killed at any moment leaves the ones before.
    Where one cannot be written (a full disk) the run goes on with a warning. Processes that train together write one
    checkpoint, each a file with its own state, so all must see the folder; of modules sharded by `fully_shard` each
    writes the parts that it holds, by `torch.distributed.checkpoint`.

    Cost: one copy of all parameters, buffers and optimizer states to the disk; on an accelerator, one wait for it.

    Args:
        folder: where checkpoints are kept; made if need be.
        every: steps of the top level between two, >= 1.
        keep: how many are kept, the newest, >= 1. Two or more, so that there is one before a damaged one.

    Raises:
        ValueError: for options out of range; when the run starts, for data that cannot be resumed, and for a folder
            that holds checkpoints of later steps than this run's.

    Example:
        >>> import tempfile, hypergrad as hg
        >>> folder = tempfile.mkdtemp()
        >>> callback = hg.callbacks.Checkpoint(folder, every=100, keep=2)
        >>> hg.callbacks.Checkpoint.latest(folder) is None
        True
    """

    order: ClassVar[int] = 100

    def __init__(self, folder: str | Path, *, every: int = 1, keep: int = 3) -> None:
        if every < 1:
            raise ValueError(f"Checkpoint: every must be >= 1 steps, got {every}.")
        if keep < 1:
            raise ValueError(f"Checkpoint: keep must be >= 1 checkpoints, got {keep}.")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self._saved_at: int | None = None

    @staticmethod
    def latest(folder: str | Path) -> Path | None:
        """Return the newest intact checkpoint in `folder`, or None; each damaged one passed over is warned of."""
        return store.newest(folder)

    @staticmethod
    def read(path: str | Path, *, rank: int = 0, size: int = 1, mesh: Any = None) -> dict[str, Any]:
        """Return the state in one checkpoint, for `engine.load_state_dict`.

        Args:
            path: of the checkpoint.
            rank: which process this one is, of those that train together.
            size: how many these are.
            mesh: `engine.mesh`, over which sharded modules lie; all processes then read together.

        Raises:
            ValueError: if it was saved by another number of processes.
            DamagedCheckpoint: if a file of it is missing, cut short or altered; the message names it.
        """
        found = store.check(path)["ranks"]
        if found != size:
            raise ValueError(f"{path} was saved by {found} processes, these are {size}. Start as many as then.")
        state: dict[str, Any] = shard_files.read(Path(path), store.read(path, _part(rank)), mesh)
        return state

    def on_start(self, engine: Runnable, num_steps: int) -> None:  # noqa: ARG002
        """Refuse now what could not be saved, or would be taken for another run's, later."""
        engine.check_savable()
        if logs(engine):
            store.remove_leftovers(self.folder)
        found = store.saved(self.folder)
        later = [path.name for path in found if store.step_of(path) > engine.num_steps]
        if later:
            raise ValueError(
                f"Checkpoint: {self.folder} holds {later[-1]}, and this run is at step {engine.num_steps}: its own "
                f"checkpoints would be taken for older ones. Go on from there with run(..., resume={str(self.folder)!r}"
                "), or pass another folder."
            )
        self._saved_at = engine.num_steps  # what is there now was saved, or can be built again

    def on_step(self, engine: Runnable, record: Record) -> None:  # noqa: ARG002
        """Save if it is due."""
        if engine.num_steps % self.every == 0:
            self.save(engine)

    def on_end(self, engine: Runnable, history: History) -> None:  # noqa: ARG002
        """Save the last step, unless the run ended by an error in the middle of one."""
        if engine.is_between_steps and self._saved_at != engine.num_steps:
            self.save(engine)

    def save(self, engine: Runnable) -> None:
        """Save now; where the disk refuses, warn and leave the older ones."""
        writing, entries, trouble = None, dict[str, dict[str, Any]](), None
        ranks, shards = engine.ranks, dict[str, Tensor]()
        name = _part(0 if ranks is None else ranks.rank)
        try:
            writing = store.Writing(self.folder, engine.num_steps)
            entries[name] = writing.put(name, shard_files.take_out(engine.state_dict(copied=False), shards))
        except OSError as error:
            trouble = str(error)
        told = _all_told(ranks, entries, trouble)
        if shards and ranks is not None and writing is not None and not any(t for _, t in told):
            try:
                entries |= shard_files.write(writing.path, shards, ranks)
            except OSError as error:
                trouble = str(error)
            told = _all_told(ranks, entries, trouble)
        trouble = next((t for _, t in told if t is not None), None)
        try:
            if writing is not None and trouble is None and logs(engine):
                files = {part: known for theirs, _ in told for part, known in theirs.items()}
                writing.commit(files, {"ranks": len(told)})
        except OSError as error:
            trouble = str(error)
        if trouble is not None:
            if writing is not None:
                writing.abandon()
            warnings.warn(
                f"checkpoint of step {engine.num_steps} could not be written to {self.folder}: {trouble}. The run goes "
                "on, with the checkpoints before.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._saved_at = engine.num_steps
        if logs(engine):
            store.prune(self.folder, self.keep)


def _all_told(
    ranks: Ranks | None, entries: dict[str, dict[str, Any]], trouble: str | None
) -> list[tuple[dict[str, dict[str, Any]], str | None]]:
    """Return what every process wrote, and what kept it from writing."""
    return [(entries, trouble)] if ranks is None else gather_objects(ranks, (entries, trouble))


def _part(rank: int) -> str:
    return f"rank-{rank}.pt"
