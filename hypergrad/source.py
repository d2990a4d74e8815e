"""Batches of one problem: drawn when needed, begun again whenever they end, found again after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hypergrad._random import RandomState, random_state, restore_random_state
from hypergrad.problem import Problem

_HOST = torch.device("cpu")


@dataclass
class Source:
    """The batches of a problem's `data`.

    Iterating may draw random numbers (a `DataLoader` that shuffles does). A glance at the first batch, when the graph
    is built, takes those draws back; the batch is used later if its draws would be the same then, else it is drawn
    anew: the generators move as they would in a loop written by hand.
    """

    problem: Problem
    random: RandomState | None = None
    """The random state that the present pass over the data began from; None where it draws nothing."""
    drawn: int = 0
    """Batches drawn in the present pass."""
    _iterator: Iterator[Any] | None = None
    _glance: tuple[Any, RandomState | None, RandomState | None] | None = None
    """The first batch, and the random states before and after it was drawn."""
    _last: list[Any] = field(default_factory=list)

    @property
    def _draws_nothing(self) -> bool:
        """Return whether iterating cannot draw a random number."""
        return isinstance(self.problem.data, (list, tuple))

    def next(self) -> Any:
        """Return the next batch."""
        self._last = [self._first() if self._glance is not None else self._draw()]
        return self._last[0]

    def recent(self) -> Any:
        """Return the batch used last; before the first, the next one, which is not used up."""
        return self._last[0] if self._last else self.peek()

    def peek(self) -> Any:
        """Return the first batch before it is used; no random number counts as drawn."""
        if self._glance is None:
            before = random_state(_HOST)
            batch = self._draw()
            self._glance = batch, before, random_state(_HOST)
            restore_random_state(before)
        return self._glance[0]

    def _first(self) -> Any:
        """Return the batch that was glanced at, if the draws it took are those it would take now."""
        assert self._glance is not None
        (batch, before, after), self._glance = self._glance, None
        if _same(before, after):
            return batch
        if _same(before, random_state(_HOST)):
            restore_random_state(after)
            return batch
        self._iterator = None
        return self._draw()

    def _draw(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                assert self.problem.data is not None
                self.random, self.drawn = None if self._draws_nothing else random_state(_HOST), 0
                self._iterator = iter(self.problem.data)
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
                continue
            self.drawn += 1
            return batch
        raise ValueError(
            f"problem {self.problem.name!r}: its data yields no batch. Pass an iterable that is not empty and that "
            "can be iterated again."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where in the data this is: how many batches were drawn, and the random state they began from."""
        if self._glance is not None:
            return {"drawn": 0, "random": None}
        return {"drawn": self.drawn, "random": save_random(self.random)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was, by iterating anew from its random state and skipping."""
        self._iterator, self._glance, self.random, self.drawn, self._last = None, None, None, 0, []
        if not state["drawn"]:
            return
        present = random_state(_HOST)
        restore_random_state(load_random(state["random"], _HOST))
        for _ in range(state["drawn"]):
            self._draw()
        restore_random_state(present)


def _same(one: RandomState | None, other: RandomState | None) -> bool:
    """Return whether two states of the host's generators agree."""
    if one is None or other is None:
        return one is other
    if not torch.equal(one.cpu, other.cpu) or one.python != other.python:
        return False
    if one.numpy is None or other.numpy is None:
        return one.numpy is other.numpy
    return all(np.array_equal(a, b) for a, b in zip(one.numpy, other.numpy, strict=True))


def save_random(state: RandomState | None) -> dict[str, Any] | None:
    """Return a random state as plain containers."""
    if state is None:
        return None
    numpy = state.numpy
    if numpy is not None:
        numpy = (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:])
    return {"cpu": state.cpu, "accelerator": state.accelerator, "python": state.python, "numpy": numpy}


def load_random(saved: Mapping[str, Any] | None, device: torch.device) -> RandomState | None:
    """Return the random state that `save_random` saved."""
    if saved is None:
        return None
    numpy = saved["numpy"]
    if numpy is not None:
        numpy = (numpy[0], numpy[1].numpy().astype(np.uint32), *numpy[2:])
    return RandomState(saved["cpu"], device, saved["accelerator"], saved["python"], numpy)
