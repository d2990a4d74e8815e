"""Memory on the CPU that one step frees and the next one needs again.

glibc gives a large block back to the system as soon as it is freed, and the system clears every page before it hands it
out again: a fifth of the time of a step of many tasks, half of that of a solve with ten million parameters. So blocks
of up to 32 MiB, the most that glibc lets one name, are kept from the import on, 64 MiB of free memory at most; and all
of them while a call of the library is under way. Where the environment has one of `CHOSEN`, or the C library is
another, nothing is changed.

Reference: mallopt(3).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Iterator

import torch

CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
"""Environment variables by which a user tells glibc what to keep."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""What mallopt is told: how much free memory may lie at the end of the heap, how large a block must be to lie outside
of it, from where it goes back once freed, and how many may."""

_BETWEEN_CALLS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _MMAP_MAX: 65536}
_DURING_CALLS = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}


class _Allocator:
    """The C library's, told what to keep between calls of this library and during them."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
        self._lock, self._calls, self._is_ours = threading.Lock(), 0, False
        self.begin_call()
        self.end_call()

    def begin_call(self) -> None:
        """Count a call, in whatever thread; before the first one that is under way all is kept."""
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._is_ours = not any(name in os.environ for name in CHOSEN)
                self._tell(_DURING_CALLS)

    def end_call(self) -> None:
        """Undo `begin_call`."""
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._tell(_BETWEEN_CALLS)

    def _tell(self, options: dict[int, int]) -> None:
        if self._library is not None and self._is_ours:
            for option, value in options.items():
                self._library.mallopt(option, value)


_allocator = _Allocator()


def reusing_memory() -> contextlib.AbstractContextManager[None]:
    """Return a context for a call that frees large blocks and asks for the like again and again."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _reusing()


@contextlib.contextmanager
def _reusing() -> Iterator[None]:
    _allocator.begin_call()
    try:
        yield
    finally:
        _allocator.end_call()
