"""What a step costs: its time, and the memory that it needs, counted rather than sampled."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg


class Clock(hg.callbacks.Callback):
    """The time between the steps of an engine."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, engine: Any, record: Any) -> None:  # noqa: ARG002
        """Note the time."""
        self.times.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Return the median time of a step; the first, in which the chunk is chosen, does not count."""
        gaps = [b - a for a, b in pairwise(self.times)]
        return 1000 * statistics.median(gaps) if gaps else float("nan")


class _Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        before = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in before and id(storage) not in self.known:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self.known.pop(key, None)
            self.now -= size

        self.known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak_bytes(compute: Callable[[], object]) -> int:
    """Return the most bytes of tensors, made by `compute` itself, that were alive at once.

    Parameters and data that existed before do not count. It runs `compute` once, several times slower than usual.

    Example:
        >>> import torch
        >>> peak_bytes(lambda: torch.zeros(1000) + 1)
        8000
    """
    counter = _Alive()
    with counter:
        result = compute()
    del result
    return counter.peak
