"""Checkpoints of sharded modules: each rank its parts, resumed bit for bit, every flipped bit found."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import sharded_engines as sh
import torch
import torch.distributed as dist
from processes import run_ranks

import hypergrad as hg
from hypergrad import store


def _nothing(folder: Path) -> None:
    """Leave the checkpoints as they are."""


def _flip(folder: Path) -> None:
    """Flip a bit in the middle of one rank's shards of the newest checkpoint."""
    if dist.get_rank() == 0:
        file = folder / "step-00000003" / "shards" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    dist.barrier()
    warnings.filterwarnings("ignore", message=".*step-00000003 is damaged and the one before is used.*__1_0.distcp")


@pytest.mark.parametrize("damage", [_nothing, _flip])
def test_a_sharded_run_goes_on_bit_for_bit(damage: Any, tmp_path: Path) -> None:
    found = run_ranks(2, sh.interrupted, tmp_path, damage)
    assert found[0] == found[1]
    whole, again, files = found[0]
    assert whole == again
    parts = ["shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp"]
    assert files == ["manifest.json", "rank-0.pt", "rank-1.pt", *parts]
    assert [p.name for p in store.saved(tmp_path)] == ["step-00000004", "step-00000005"]
    assert (tmp_path / "step-00000003.damaged").exists() == (damage is _flip)
    _find_damage(tmp_path)
    with pytest.raises(ValueError, match="was saved by 2 processes, these are 1"):
        hg.callbacks.Checkpoint.read(store.saved(tmp_path)[-1])
    with pytest.raises(ValueError, match="holds modules sharded by fully_shard, and this engine's are whole"):
        hg.callbacks.Checkpoint.read(store.saved(tmp_path)[-1], rank=0, size=2)


def _find_damage(folder: Path) -> None:
    """Cut or flip each file of the newest checkpoint in turn: each is found out, by its name."""
    choose = random.Random(0)
    newest = store.saved(folder)[-1]
    for case in range(100):
        path = folder / "copies" / newest.name
        shutil.copytree(newest, path)
        files = sorted(p for p in path.rglob("*") if p.is_file())
        file = files[case % len(files)]
        content = bytearray(file.read_bytes())
        if case % 4 == 0:
            del content[choose.randrange(len(content)) :]
        else:
            content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        file.write_bytes(content)
        with pytest.raises(store.DamagedCheckpoint, match=f"{newest.name}.*{file.name}"):
            store.check(path)
        shutil.rmtree(path)


def _refused(folder: Path) -> list[str]:
    if dist.get_rank() == 1:
        from torch.distributed.checkpoint import FileSystemWriter

        def write(*arguments: Any) -> None:
            raise OSError("No space left on device")

        FileSystemWriter.write_data = write  # type: ignore[method-assign]
    engine, _ = sh.build("finite_difference", torch.float64, lower_options={"steps": 1})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        engine.run(3, callbacks=[hg.callbacks.Checkpoint(folder, every=2)])
    return [str(w.message) for w in found if "could not be written" in str(w.message)]


def test_where_one_rank_cannot_write_its_shards_no_checkpoint_counts(tmp_path: Path) -> None:
    for told in run_ranks(2, _refused, tmp_path):
        assert [message[:20] for message in told] == ["checkpoint of step 2", "checkpoint of step 3"]  # the last, too
        assert all("rank 1: No space left" in message for message in told)
    assert store.saved(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
