"""The worker processes: ours, the reference's and the rivals', each started when it is first asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from hypergrad.bench.protocol import Request, Response

OURS, AUTOGRAD, REFERENCE = "hypergrad", "autograd", "reference"

_RIVALS = Path(__file__).parent / "rivals"
_ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".rivals"


def rivals() -> list[str]:
    """Return the rivals there are workers for, whether or not their environments are made."""
    return sorted(path.parent.name for path in _RIVALS.glob("*/worker.py"))


def missing(rival: str) -> Path | None:
    """Return the interpreter that a rival needs and that is not there; None where it can run."""
    interpreter = _interpreter(rival)
    return None if interpreter.exists() else interpreter


def chosen(asked: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Return the libraries to run, and those left out because their environment is missing.

    Args:
        asked: their names; None for all there are.

    Raises:
        ValueError: for an unknown name, or one asked for by name whose environment is missing.
    """
    known = [OURS, *rivals()]
    if asked is None:
        return [name for name in known if missing(name) is None], [name for name in known if missing(name) is not None]
    names = list(dict.fromkeys(asked))
    for name in names:
        if name not in known:
            raise ValueError(f"there is no contender {name!r}. Known are: {', '.join(known)}.")
        if (interpreter := missing(name)) is not None:
            raise ValueError(
                f"contender {name!r} has no environment: {interpreter} does not exist. Make it with `make rivals`, or "
                f"`make rival-{name}` for this one alone."
            )
    return names, []


def _interpreter(library: str) -> Path:
    own = library in (OURS, AUTOGRAD, REFERENCE)
    return Path(sys.executable) if own else _ENVIRONMENTS / library / "bin" / "python"


class Pool:
    """Worker processes by library, kept between requests so that each imports its library once.

    Args:
        logs: folder for what the workers print.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, tuple[subprocess.Popen[str], IO[str]]] = {}

    def __enter__(self) -> Pool:
        """Return the pool; the processes end with the block."""
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes."""
        for library in list(self._running):
            self._end(library)

    def ask(self, library: str, request: Request) -> Response:
        """Return a library's answer; if its process ends without one, an answer that says so."""
        process = self._worker(library)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request.encode() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                found = Response.decode(line)
                if found is not None:
                    return found
        except BrokenPipeError:
            pass
        status = process.wait()
        self._end(library)
        tail = _tail(self._logs / f"{library}.log")
        return Response(ok=False, error=f"the worker of {library!r} ended with exit status {status}: {tail}")

    def _worker(self, library: str) -> subprocess.Popen[str]:
        if library not in self._running:
            log = (self._logs / f"{library}.log").open("a", encoding="utf-8")
            process = subprocess.Popen(
                _command(library),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(library),
            )
            self._running[library] = process, log
        return self._running[library][0]

    def _end(self, library: str) -> None:
        process, log = self._running.pop(library)
        for stream in (process.stdin, process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _command(library: str) -> list[str]:
    interpreter = str(_interpreter(library))
    if library == OURS:
        return [interpreter, "-m", "hypergrad.bench.worker"]
    if library == REFERENCE:
        return [interpreter, "-m", "hypergrad.bench.reference"]
    return [interpreter, str(_RIVALS / library / "worker.py")]


def _environment(library: str) -> dict[str, str]:
    """Return a worker's environment: no accelerator, and for our interpreter the package that is running now."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    own = [str(Path(__file__).resolve().parents[2])] if _interpreter(library) == Path(sys.executable) else []
    kept = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p] if own else []
    environment["PYTHONPATH"] = os.pathsep.join([*own, *kept, os.getcwd()])
    return environment


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
