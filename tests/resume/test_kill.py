"""A run killed at random moments goes on to the same end, bit for bit; damaged checkpoints are found out."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from three_levels import END, build
from torch import Tensor

import hypergrad as hg
from hypergrad import store

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 8


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Server:
    """Starts the run in processes of their own, without importing everything again."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("three_levels.py"))]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, line: str) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        return int(self.process.stdout.readline())

    def finish(self, folder: Path) -> Any:
        """Run to the end and return the state there."""
        folder.mkdir(exist_ok=True)
        assert self.ask(f"wait {self.ask(f'{folder} {NUM_STEPS}')}") == 0
        return torch.load(folder / END, weights_only=True)

    def kill(self, folder: Path, after: float) -> bool:
        """Start the run, kill it `after` seconds later, and return whether it was still running."""
        folder.mkdir(exist_ok=True)
        child = self.ask(f"{folder} {NUM_STEPS}")
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        return self.ask(f"wait {child}") == signal.SIGKILL


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    assert server.process.stdin is not None and server.process.stdout is not None
    server.process.stdin.close()
    server.process.stdout.close()
    server.process.wait()


@pytest.fixture(scope="module")
def expected(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, float, Path]:
    """Return the uninterrupted run's end, how many seconds it takes, and its folder."""
    server.finish(tmp_path_factory.mktemp("warm"))
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    return server.finish(folder), time.monotonic() - began, folder / "saved"


@pytest.mark.parametrize("num_kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_the_uninterrupted_one(
    num_kills: int, server: Server, expected: tuple[Any, float, Path], tmp_path: Path
) -> None:
    state, seconds, _ = expected
    moments, kills, attempt = random.Random(num_kills), 0, 0
    while kills < num_kills:
        folder = tmp_path / f"{attempt}"
        attempt += 1
        assert attempt < 3 * num_kills, "the run ends before it can be killed"
        hit = server.kill(folder, moments.uniform(0.1, 0.9) * seconds)
        hit += hit and server.kill(folder, moments.uniform(0.05, 0.5) * seconds)
        if hit:
            kills += hit
            assert same(state, server.finish(folder))


def test_a_hundred_damaged_checkpoints_are_found_out(expected: tuple[Any, float, Path], tmp_path: Path) -> None:
    choose = random.Random(0)
    *_, before, newest = store.saved(expected[2])
    shutil.copytree(before, tmp_path / before.name)
    for case in range(100):
        path = tmp_path / newest.name
        shutil.copytree(newest, path)
        file = path / choose.choice(sorted(p.name for p in path.iterdir()))
        content = bytearray(file.read_bytes())
        if case % 2:
            del content[choose.randrange(len(content)) :]
        else:
            content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        file.write_bytes(content)
        with pytest.raises(store.DamagedCheckpoint, match=f"{newest.name}.*{file.name}"):
            hg.callbacks.Checkpoint.read(path)
        with pytest.warns(RuntimeWarning, match=f"{newest.name} is damaged and the one before is used.*{file.name}"):
            assert hg.callbacks.Checkpoint.latest(tmp_path) == tmp_path / before.name
        shutil.rmtree(path)


def test_a_resumed_run_goes_on_from_the_one_before_a_damaged_one(
    expected: tuple[Any, float, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(expected[2], folder)
    newest = store.saved(folder)[-1]
    (newest / store.MANIFEST).unlink()
    engine = build(seed=7)
    with pytest.warns(RuntimeWarning, match=f"{newest.name}.*manifest.json cannot be read.*renamed to .*damaged"):
        history = engine.run(NUM_STEPS, callbacks=[hg.callbacks.Checkpoint(folder)], resume=folder)
    assert [record["step"] for record in history] == [NUM_STEPS - 1]
    assert same(expected[0], engine.state_dict())
    assert [p.name for p in store.saved(folder)] == [f"step-{k:08d}" for k in (6, 7, 8)]
