"""The worker's half of the protocol: `serve(contender)` answers requests, each in a process of its own.

Every contender is timed and weighed by this file, whatever library it belongs to. A rival's worker says

    sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder that holds `bench`
    from bench.serving import Contender, Outcome, serve

and implements `Contender`. The libraries are imported once; each request is then answered by a fork, so that one
attempt's memory, its compiled code and its crash are its own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .problems.base import Task
from .problems.catalogue import build
from .protocol import Offer, Request, Response
from .weighing import peak_bytes


@dataclass(frozen=True)
class Outcome:
    """What one call of a contender returns.

    Attributes:
        gradient: d upper_loss / d upper by name.
        num_products: Hessian or Jacobian products spent, if the library counts them.
        carried: whether it rests on a state that earlier calls at the same point have built up.
        note: what a reader of the table should know.
    """

    gradient: dict[str, Tensor]
    num_products: int | None = None
    carried: bool = False
    note: str = ""


class Contender(ABC):
    """A library, as the benchmark sees it."""

    @abstractmethod
    def offers(self, task: Task, size: str) -> list[Offer]:
        """Return the methods and settings that make sense for a task; a few for the size "quick"."""

    @abstractmethod
    def prepare(self, task: Task, method: str, settings: dict[str, Any]) -> Callable[[], Outcome]:
        """Return the function that is timed; whatever a user sets up once is done before it is returned."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that do the work."""


def serve(contender: Contender) -> None:
    """Answer the requests on standard input until it ends.

    A problem is built once for all requests about it that follow each other, single-threaded: a fork after a parallel
    region may hang. Without `os.fork` (Windows) this does not work.
    """
    torch.set_num_threads(1)
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(x * x, x, torch.ones(1))  # a cotangent makes PyTorch import a great deal, once for all forks
    built: tuple[tuple[str, str, int, str], Task] | None = None
    for line in sys.stdin:
        if not line.strip():
            continue
        request = Request.decode(line)
        key = (request.problem, request.size, request.seed, request.dtype)
        try:
            if built is None or built[0] != key:
                built = None
                dtype = getattr(torch, request.dtype)
                built = key, build(request.problem, size=request.size, seed=request.seed, dtype=dtype)
            response = _attempt(contender, built[1], request)
        except Exception as error:  # a problem that cannot be built is an answer too
            traceback.print_exc()
            response = Response(ok=False, error=f"{type(error).__name__}: {error}")
        print(response.encode(), flush=True)


def _attempt(contender: Contender, task: Task, request: Request) -> Response:
    """Return the answer of a forked process, or what became of it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(2, 1)  # what a library prints must not end up among the responses
        _answer_to(writer, contender, task, request)
    os.close(writer)
    deadline = time.monotonic() + request.limit
    text = b""
    try:
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([reader], [], [], left)[0]:
                break
            part = os.read(reader, 1 << 16)
            if not part:
                break
            text += part
        else:
            left = 0.0
    finally:
        os.close(reader)
    if left <= 0 or not text:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = Response.decode(text.decode())
    if found is not None:
        return found
    if deadline - time.monotonic() <= 0:
        return Response(ok=False, error=f"did not finish within {request.limit:g} s")
    return Response(ok=False, error=f"the process ended without an answer ({_ending(status)})")


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _answer_to(writer: int, contender: Contender, task: Task, request: Request) -> None:
    """Write the answer to a pipe and end the process, without running what the parent registered for its exit."""
    try:
        response = answer(contender, task, request)
    except Exception as error:  # whatever a contender raises is its result
        traceback.print_exc()
        response = Response(ok=False, error=f"{type(error).__name__}: {error}", versions=contender.versions())
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(response.encode().encode())
    sys.stderr.flush()
    os._exit(0)


def answer(contender: Contender, task: Task, request: Request) -> Response:
    """Return the measurement that a request asks for, made in this process."""
    torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    if not request.method:
        offers = contender.offers(task, request.size)
        return Response(ok=True, offers=offers, facts=_facts(task), versions=contender.versions())
    _touch(task)
    compiles = bool(request.settings.get("compile"))
    watched = Watched(task)
    run = contender.prepare(task if compiles else watched.task, request.method, request.settings)
    began = time.perf_counter()
    outcome = run()
    first = time.perf_counter() - began
    once = request.repeats == 0 or (first > 4 * request.budget and not compiles)
    seconds = [first] if once else _repeat(run, first, request)
    watched.count = 0
    peak = None if once else peak_bytes(run)
    name = "gradient.npz"
    arrays: dict[str, Any] = {key: g.detach().cpu().double().numpy() for key, g in outcome.gradient.items()}
    np.savez(Path(request.out) / name, **arrays)
    return Response(
        ok=True,
        seconds=seconds,
        first_seconds=first,
        compile_seconds=max(first - float(np.median(seconds)), 0.0) if compiles else None,
        peak_bytes=peak,
        num_products=outcome.num_products,
        num_gradients=None if once or compiles else watched.count,
        gradient=name,
        carried=outcome.carried,
        note=outcome.note,
        versions=contender.versions(),
    )


class Watched:
    """A task that counts how often its lower loss is evaluated; under vmap all tasks count as one evaluation.

    Args:
        task: the task to watch. Compiled code is not watched: the count would be part of what is compiled.
    """

    def __init__(self, task: Task) -> None:
        self.count = 0
        outputs = None if task.outputs is None else self._counted(task.outputs)
        self.task = replace(task, lower_loss=self._counted(task.lower_loss), outputs=outputs)

    def _counted(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def evaluate(*arguments: Any) -> Tensor:
            self.count += 1
            return loss(*arguments)

        return evaluate


def _facts(task: Task) -> dict[str, Any]:
    return {
        "kind": task.kind,
        "num_lower": sum(w.numel() for w in task.lower.values()),
        "num_upper": sum(u.numel() for u in task.upper.values()),
        "num_steps": task.steps if task.kind == "implicit" else len(task.lower_batches),
        "notes": task.notes,
    }


def _touch(task: Task) -> None:
    """Evaluate both losses' gradients once, so that nobody pays for what PyTorch loads at first use."""
    batch = task.lower_batches[0]
    for loss, at in ((task.lower_loss, batch), (task.upper_loss, task.upper_batch)):
        lower = {name: w.detach().clone().requires_grad_() for name, w in task.lower.items()}
        if task.kind == "tasks":
            at = _first(at)
        value = loss(lower, task.upper, at)
        torch.autograd.grad(value, list(lower.values()), allow_unused=True)


def _first(batch: Any) -> Any:
    """Return the first task's part of a batch whose tensors lead with the number of tasks."""
    return pytree.tree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, batch)


def _repeat(run: Callable[[], Outcome], first: float, request: Request) -> list[float]:
    """Return the seconds of each repeat, as many as the request and its budget allow, at least one."""
    began = time.perf_counter()
    for _ in range(request.warmup if first < request.budget else 0):
        run()
    seconds: list[float] = []
    for _ in range(request.repeats):
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        seconds.append(now - start)
        if now - began > request.budget:
            break
    return seconds
