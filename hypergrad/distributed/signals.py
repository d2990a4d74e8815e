"""What one rank asks for and all ranks then do: it travels with the gradient of the top level."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Signal = Literal["stop", "save", "skip", "rollback"]


class Signals:
    """Requests of this process, and what all processes agreed on.

    A request made at any time (by a callback, a signal handler, a failed check) joins the next all-reduce of a
    top-level gradient; from then on, until the next one, `agreed` holds it on every rank. In a single process it is
    agreed on at the same moment.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._requested: set[Signal] = set()
        self._sent: frozenset[Signal] = frozenset()
        self._received: Tensor | None = None

    def request(self, signal: Signal) -> None:
        """Ask every rank for `signal` after the next top-level gradient."""
        if signal not in get_args(Signal):
            raise ValueError(f"request: signal must be one of {list(get_args(Signal))}, got {signal!r}.")
        self._requested.add(signal)

    @property
    def agreed(self) -> frozenset[Signal]:
        """Return what some rank had requested when the last top-level gradient was reduced."""
        if self._received is not None:
            counts = self._received.tolist()
            self._sent = frozenset(s for s, count in zip(get_args(Signal), counts, strict=True) if count > 0)
            self._received = None
        return self._sent

    def send(self, device: torch.device) -> Tensor:
        """Return the requests as a vector of 0 and 1, which are then no longer pending."""
        sent = torch.tensor([float(s in self._requested) for s in get_args(Signal)], device=device)
        self.agree()
        return sent

    def agree(self) -> None:
        """Agree, alone, on what this process has requested."""
        self._sent, self._requested, self._received = frozenset(self._requested), set(), None

    def receive(self, mean: Tensor) -> None:
        """Take the mean of all ranks' vectors; it is read when someone asks."""
        self._received = mean
