"""Calls of the library that are under way, in whatever thread: what holds as long as there is one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from hypergrad._memory import keep_all, keep_some

_lock = threading.Lock()
_count = 0


def under_way() -> contextlib.AbstractContextManager[None]:
    """Return the context of a call, in which freed memory is kept for reuse."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _under_way()


def is_under_way() -> bool:
    """Return whether there is one now."""
    return _count > 0


@contextlib.contextmanager
def _under_way() -> Iterator[None]:
    _add(1)
    try:
        yield
    finally:
        _add(-1)


def _add(calls: int) -> None:
    """Count calls that begin or end; of those that overlap, the first and the last one change what is kept."""
    global _count  # noqa: PLW0603 - the process's
    with _lock:
        before, _count = _count, _count + calls
        if before == 0:
            keep_all()
        elif _count == 0:
            keep_some()
