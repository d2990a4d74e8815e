"""When a process dies, the others end within a bounded time with an error that names it."""

from __future__ import annotations

import os
import signal
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import free_port, run_ranks
from test_rank_checkpoints import build

import hypergrad as hg
from hypergrad.distributed import silence
from hypergrad.distributed.silence import RankError

LIMIT = 60.0


class Die(hg.callbacks.Callback):
    def on_step(self, engine: Any, record: hg.Record) -> None:
        if record["step"] == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def work(rank: int, port: int, folder: Path) -> None:
    signal.alarm(int(LIMIT) + 20)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=LIMIT / 2),
    )
    try:
        build().run(5, callbacks=[Die(), hg.callbacks.Checkpoint(folder / "saved")])
    except RankError as error:
        (folder / f"error-{rank}").write_text(str(error))
    os._exit(0)


def test_the_others_end_with_an_error_that_names_it(tmp_path: Path) -> None:
    context, port = mp.get_context("fork"), free_port()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        processes = [context.Process(target=work, args=(rank, port, tmp_path), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
    processes[1].join(LIMIT)
    died = time.monotonic()
    processes[0].join(LIMIT)
    assert time.monotonic() - died < LIMIT and processes[0].exitcode == 0
    assert processes[1].exitcode == -signal.SIGKILL
    assert "step 2: a collective failed and no sign of life came from rank 1" in (tmp_path / "error-0").read_text()
    assert hg.callbacks.Checkpoint.latest(tmp_path / "saved") is not None


def _out_of_memory() -> str:
    silence.PATIENCE = 3.0
    engine = build()
    engine.step()
    if dist.get_rank() == 1:

        def fails(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        engine.runners["net"].partials = fails  # type: ignore[method-assign]
    try:
        engine.run(5)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_raises_says_what_and_the_others_name_it() -> None:
    first, second = run_ranks(2, _out_of_memory)
    assert second == "RuntimeError: out of memory"
    assert first.startswith("RankError: step 1: a collective failed and no sign of life came from rank 1")


def _silent_in_a_group() -> list[int]:
    silence.PATIENCE = 1.0
    group = dist.new_group([1, 2])
    found = silence.silent_ranks(hg.distributed.Ranks(group)) if dist.get_rank() == 1 else []
    dist.barrier()
    return found


def test_members_of_a_group_are_named_by_their_numbers_among_all() -> None:
    assert run_ranks(3, _silent_in_a_group) == [[], [2], []]
