"""Random draws that can be had again: the generators' states, taken and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of torch's CPU generator, of the device's, of `random` and of NumPy; taken by `random_state`."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    python: tuple[Any, ...] | None = None
    numpy: Any = None


def random_state(device: torch.device) -> RandomState | None:
    """Return the generators' present state; None in a compiled region or under fake tensors, which cannot hold one."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return None
    accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), device, accelerator, random.getstate(), np.random.get_state())


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
        np.random.set_state(state.numpy)


@contextlib.contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    """Run the body on the draws that follow `state`, then continue the generators where they were."""
    if state is None:
        yield
        return
    present = random_state(state.device)
    restore_random_state(state)
    try:
        yield
    finally:
        restore_random_state(present)
