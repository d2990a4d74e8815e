"""How much memory one call takes: the rise of the process's resident size at its peak, or what tensors hold then."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt."""

_BLOCK = 65536
_VARIABLE = "MALLOC_MMAP_THRESHOLD_"


def peak_bytes(run: Callable[[], object]) -> int:
    """Return by how much a call raises the resident size, at its peak.

    On Linux the system's high-water mark is set back before. Elsewhere it cannot be, and what earlier calls
    reached hides what this one takes. With glibc, blocks of 64 KiB and more are given back to the system as soon as
    they are freed: by its default rule gaps between blocks count too, as many as the history of the process has left.
    That costs time, and may last to the end of the process, so take times before.
    """
    gc.collect()
    with _freed_at_once():
        return _rise(run)


@contextlib.contextmanager
def _freed_at_once() -> Iterator[None]:
    """Let the C library give freed memory back, where it can; by the environment a contender knows that it is told."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_THRESHOLD, _BLOCK)
        library.mallopt(_TRIM_THRESHOLD, _BLOCK)
        library.malloc_trim(0)
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(_BLOCK)
    try:
        yield
    finally:
        del os.environ[_VARIABLE]
        if before is not None:
            os.environ[_VARIABLE] = before


def _rise(run: Callable[[], object]) -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = _max_resident()
        run()
        return max(_max_resident() - before, 0)
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


def allocated_bytes(run: Callable[[], object]) -> int:
    """Return the most that PyTorch's allocator has handed out in a call, above what was held before, by its record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text("utf-8"))["traceEvents"] if e.get("name") == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: float(e["ts"])):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _max_resident() -> int:
    """Return the process's largest resident size so far: kilobytes on Linux, bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
