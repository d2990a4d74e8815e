"""Functions run in several processes of one gloo group, with a limit on the time they may take."""

from __future__ import annotations

import os
import signal
import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(
    rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], pipe: Any
) -> None:
    signal.alarm(int(LIMIT))  # no rank outlives its test
    torch.set_num_threads(1)  # a forked child has no thread pool
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=ResourceWarning)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=LIMIT / 2),
        )
        outcome = ("done", function(*arguments))
    except BaseException:
        outcome = ("failed", f"rank {rank}:\n{traceback.format_exc()}")
    pipe.send(outcome)
    pipe.close()
    os._exit(0)


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returned on each of `size` ranks, in order; results are plain containers."""
    context, port = mp.get_context("fork"), free_port()
    pipes, processes = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking where threads exist
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(rank, size, port, function, arguments, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
    try:
        pending, outcomes = dict(enumerate(pipes)), {}
        while pending:
            ready = wait(list(pending.values()), timeout=LIMIT)
            assert ready, f"ranks {sorted(pending)} gave no answer within {LIMIT} s"
            for rank, pipe in list(pending.items()):
                if pipe in ready:
                    try:
                        outcomes[rank] = pipe.recv()
                    except EOFError:
                        outcomes[rank] = ("failed", f"rank {rank} died")
                    del pending[rank]
                    if outcomes[rank][0] == "failed":
                        raise AssertionError(outcomes[rank][1])
        return [outcomes[rank][1] for rank in range(size)]
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
