"""Random draws that can be had again: the generators' states, taken and put back."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of torch's CPU generator, of the device's, of `random` and of NumPy; taken by `random_state`."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    python: tuple[Any, ...] | None = None
    numpy: Any = None


def random_state(device: torch.device, *, anew: bool = False) -> RandomState | None:
    """Return the generators' present state; None in a compiled region or under fake tensors, which cannot hold one.

    Args:
        device: the accelerator whose generator counts too, or the host.
        anew: read NumPy's whole state. Without, it counts as unchanged while the generator's memory is what it was,
            which seeding it again, and drawing another number of normals since, could feign.
    """
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return None
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), device, accelerator, random.getstate(), _numpy_state(anew))


def restore_random_state(state: RandomState | None) -> None:
    """Put the generators back to `state`."""
    if state is None:
        return
    torch.set_rng_state(state.cpu)
    if state.accelerator is not None:
        torch.cuda.set_rng_state(state.accelerator, state.device)
    if state.python is not None:
        random.setstate(state.python)
    if state.numpy is not None:
        _put_numpy_state(state.numpy)


def same_state(one: RandomState | None, other: RandomState | None) -> bool:
    """Return whether the two agree: between them nothing was drawn."""
    if one is None or other is None:
        return one is other
    if not torch.equal(one.cpu, other.cpu) or one.python != other.python:
        return False
    if one.accelerator is not None and other.accelerator is not None:
        if not torch.equal(one.accelerator, other.accelerator):
            return False
    if one.numpy is other.numpy or one.numpy is None or other.numpy is None:
        return one.numpy is other.numpy
    return all(np.array_equal(a, b) for a, b in zip(one.numpy, other.numpy, strict=True))


@contextlib.contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    """Run the body on the draws that follow `state`, then continue the generators where they were.

    In a compiled region, which cannot set generators, the body goes on with their draws.
    """
    if state is None or torch.compiler.is_compiling():
        yield
        return
    present = random_state(state.device)
    restore_random_state(state)
    try:
        yield
    finally:
        restore_random_state(present)


_known: tuple[bytes, Any] | None = None
"""The mark that NumPy's generator bore when its state was last taken or put back, and that state."""


def _numpy_state(anew: bool) -> Any:
    """Return `np.random.get_state()`; the very same object while nothing is drawn, for taking it costs 0.1 ms.

    A mark that has not changed tells so, except where the generator holds a second normal draw in store: handing that
    out leaves no mark.
    """
    global _known
    mark = _numpy_mark()
    if not anew and mark is not None and _known is not None and _known[0] == mark and not _known[1][3]:
        return _known[1]
    state = np.random.get_state()
    _known = None if mark is None else (mark, state)
    return state


def _put_numpy_state(state: Any) -> None:
    global _known
    if _known is not None and _known[1] is state and not state[3] and _known[0] == _numpy_mark():
        return
    np.random.set_state(state)
    mark = _numpy_mark()
    _known = None if mark is None else (mark, state)


def _numpy_mark() -> bytes | None:
    """Return the memory of NumPy's global generator: its 624 words and its position among them.

    None for a generator of another kind than NumPy's own.
    """
    generator = get_bit_generator()
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, 625 * 4)
