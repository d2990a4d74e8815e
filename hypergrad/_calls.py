"""Calls of the library that are under way, in whatever thread: what holds as long as there is one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from hypergrad._memory import keep_all, keep_some

_lock = threading.Lock()
_open: list[None] = []
"""One entry for each call that is under way."""


def under_way() -> contextlib.AbstractContextManager[None]:
    """Return the context of a call, in which freed memory is kept for reuse."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _under_way()


def is_under_way() -> bool:
    """Return whether there is one now."""
    return bool(_open)


@contextlib.contextmanager
def _under_way() -> Iterator[None]:
    with _lock:
        if not _open:
            keep_all()
        _open.append(None)
    try:
        yield
    finally:
        with _lock:
            _open.pop()
            if not _open:
                keep_some()
