"""The sharded part of a checkpoint: tensors of which each process holds a part, by `torch.distributed.checkpoint`.

Every process writes the parts that it holds. The files get checksums of ours, in the checkpoint's manifest:
`torch.distributed.checkpoint` takes a flipped bit without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hypergrad._shards import is_shard
from hypergrad.distributed.ranks import Ranks
from hypergrad.store import entry_of

FOLDER = "shards"
_MARK = "__shard__"


def take_out(state: Any, shards: dict[str, Tensor]) -> Any:
    """Return `state` with a mark in the place of each sharded tensor, which goes into `shards` by that mark's name."""
    if isinstance(state, Tensor) and is_shard(state):
        sharded: Any = state
        name = str(len(shards))
        shards[name] = sharded
        return {_MARK: name, "dim": sharded.placements[0].dim, "shape": list(sharded.shape), "dtype": sharded.dtype}
    if isinstance(state, Mapping):
        return {key: take_out(value, shards) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)([take_out(value, shards) for value in state])
    return state


def put_back(state: Any, shards: Mapping[str, Tensor]) -> Any:
    """Return `state` with the sharded tensors in the place of their marks."""
    if isinstance(state, Mapping):
        if _MARK in state:
            return shards[state[_MARK]]
        return {key: put_back(value, shards) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)([put_back(value, shards) for value in state])
    return state


def write(path: Path, shards: dict[str, Tensor], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Write the parts that this process holds, and return its files' entries in the manifest; all ranks together.

    Raises:
        OSError: on every rank, where one of them cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = path / FOLDER
    try:
        save(shards, storage_writer=FileSystemWriter(folder), process_group=ranks.group)
    except CheckpointException as error:
        first = next(iter(error.failures.items()))
        raise OSError(f"rank {first[0]}: {first[1][0]}") from error
    names = [f"__{ranks.rank}_*.distcp", *([".metadata"] if ranks.rank == 0 else [])]
    return {f"{FOLDER}/{file.name}": entry_of(file) for name in names for file in sorted(folder.glob(name))}


def read(path: Path, state: Any, mesh: Any) -> Any:
    """Return `state`, as a file of a checkpoint held it, with the sharded tensors split over `mesh` put back.

    Raises:
        ValueError: if there are sharded tensors, and no mesh to put them on.
    """
    marks: list[Mapping[str, Any]] = []
    _find(state, marks)
    if not marks:
        return state
    if mesh is None:
        raise ValueError(
            f"{path} holds modules sharded by fully_shard, and this engine's are whole. Shard them as then."
        )
    from torch.distributed import tensor as tensors
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    shards: dict[str, Any] = {
        mark[_MARK]: tensors.empty(
            *mark["shape"], dtype=mark["dtype"], device_mesh=mesh, placements=[tensors.Shard(mark["dim"])]
        )
        for mark in marks
    }
    load(shards, storage_reader=FileSystemReader(path / FOLDER), process_group=mesh.get_group())
    return put_back(state, shards)


def _find(state: Any, marks: list[Mapping[str, Any]]) -> None:
    if isinstance(state, Mapping):
        if _MARK in state:
            marks.append(state)
            return
        for value in state.values():
            _find(value, marks)
    elif isinstance(state, (list, tuple)):
        for value in state:
            _find(value, marks)
