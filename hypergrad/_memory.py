"""Memory on the CPU that one step frees and the next one needs again.

glibc gives a large block back to the system as soon as it is freed, and the system clears every page before it hands it
out again: a fifth of the time of a step of many tasks, half of that of a solve with ten million parameters. So blocks
of up to 32 MiB, the most that glibc lets one name, are kept from the import on, 64 MiB of free memory at most; and all
of them while a call of the library is under way. Where the environment has one of `CHOSEN`, or the C library is
another, nothing is changed.

Reference: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import platform

CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
"""Environment variables by which a user tells glibc what to keep."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""What mallopt is told: how much free memory may lie at the end of the heap, how large a block must be to lie outside
of it, from where it goes back once freed, and how many may."""

_LIBRARY = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_some() -> None:
    """Keep blocks of some size: between calls."""
    _tell({_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20, _MMAP_MAX: 65536})


def keep_all() -> None:
    """Keep every block: during calls."""
    _tell({_TRIM_THRESHOLD: -1, _MMAP_MAX: 0})


def _tell(options: dict[int, int]) -> None:
    if _LIBRARY is not None and not any(name in os.environ for name in CHOSEN):
        for option, value in options.items():
            _LIBRARY.mallopt(option, value)


keep_some()
