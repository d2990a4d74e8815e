"""How much memory one call takes: the rise of the process's resident size at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def peak_bytes(run: Callable[[], object]) -> int:
    """Return by how much a call raises the resident size, at its peak.

    On Linux the system's high-water mark is set back before. Elsewhere it cannot be, and what earlier calls
    reached hides what this one takes.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # where the C library can, give freed memory back first
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = _max_resident()
        run()
        return max(_max_resident() - before, 0)
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _max_resident() -> int:
    """Return the process's largest resident size so far: kilobytes on Linux, bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
