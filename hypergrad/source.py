"""Batches of one problem: drawn when needed, begun again whenever they end, found again after a resume."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hypergrad._random import RandomState, random_state, restore_random_state, same_state
from hypergrad.loaders import Place, Resumable, check_resumable, fingerprint, place, put_back, same_place
from hypergrad.problem import Problem

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class _Draws:
    """Where the generators that iterating may draw from stand: the host's, and the loader's own."""

    random: RandomState | None
    place: Place

    @staticmethod
    def now(data: Any) -> _Draws:
        return _Draws(random_state(_HOST, anew=True), place(data))

    def restore(self, data: Any) -> None:
        restore_random_state(self.random)
        put_back(data, self.place)

    def agrees(self, other: _Draws) -> bool:
        return same_state(self.random, other.random) and same_place(self.place, other.place)

    def state_dict(self) -> dict[str, Any]:
        return {"random": save_random(self.random), "place": self.place}

    @staticmethod
    def of(state: Mapping[str, Any]) -> _Draws:
        return _Draws(load_random(state["random"], _HOST), dict(state["place"]))


@dataclass
class Source:
    """The batches of a problem's `data`.

    Iterating may draw random numbers (a `DataLoader` that shuffles does). A glance at the first batch, when the graph
    is built, takes those draws back; the batch is used later if its draws would be the same then, else it is drawn
    anew: the generators move as they would in a loop written by hand.
    """

    problem: Problem
    began: _Draws | None = None
    """Where the generators stood when the present pass over the data began; None where iterating draws nothing."""
    drawn: int = 0
    """Batches drawn in the present pass."""
    _iterator: Iterator[Any] | None = None
    _glance: tuple[Any, _Draws, _Draws] | None = None
    """The first batch, and where the generators stood before and after it was drawn."""
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
            before = _Draws.now(self.problem.data)
            batch = self._draw()
            self._glance = batch, before, _Draws.now(self.problem.data)
            before.restore(self.problem.data)
        return self._glance[0]

    def _first(self) -> Any:
        """Return the batch that was glanced at, if the draws it took are those it would take now."""
        assert self._glance is not None
        (batch, before, after), self._glance = self._glance, None
        if before.agrees(after):
            return batch
        if before.agrees(_Draws.now(self.problem.data)):
            after.restore(self.problem.data)
            return batch
        self._iterator = None
        return self._draw()

    def _draw(self) -> Any:
        for _ in range(2):
            try:
                if self._iterator is None:
                    assert self.problem.data is not None
                    self.began, self.drawn = None if self._draws_nothing else _Draws.now(self.problem.data), 0
                    self._iterator = iter(self.problem.data)
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
                continue
            except Exception as error:
                raise DataError(
                    f"problem {self.problem.name!r}: its data raised {type(error).__name__} in the place of batch "
                    f"{self.drawn} of a pass: {error}"
                ) from error
            self.drawn += 1
            return batch
        raise ValueError(
            f"problem {self.problem.name!r}: its data yields no batch. Pass an iterable that is not empty and that "
            "can be iterated again."
        )

    def check_resumable(self) -> None:
        """Raise a ValueError for data whose place cannot be found again after a resume."""
        check_resumable(self.problem.data, self.problem.name)

    def state_dict(self) -> dict[str, Any]:
        """Return where in the data this is: its own state, or the batches drawn and the draws they began from."""
        self.check_resumable()
        data: Any = self.problem.data
        if self._glance is not None or not self.drawn:
            return {"drawn": 0, "now": place(data)}
        state: dict[str, Any] = {"drawn": self.drawn, "now": place(data)}
        if isinstance(data, Resumable):
            return state | {"own": data.state_dict()}
        began = None if self.began is None else self.began.state_dict()
        return state | {"began": began, "last": fingerprint(self._last)}

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Return whether `state` was saved from data of this kind: with as many generators, and with its own state."""
        ours, theirs = place(self.problem.data), state["now"]
        alike = len(ours["generators"]) == len(theirs["generators"])
        sampler = (ours["epoch"] is None) == (theirs["epoch"] is None)
        return alike and sampler and ("own" not in state or isinstance(self.problem.data, Resumable))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was: by the data's own state, or by iterating anew from its draws and skipping.

        Raises:
            ValueError: if other batches come than those that came then; nothing is changed then.
        """
        with self.kept():
            self._go_to(state)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Be where it was, and with it the generators, if the body raises."""
        data: Any = self.problem.data
        present, here = _Draws.now(data), dict(vars(self))
        own = copy.deepcopy(data.state_dict()) if isinstance(data, Resumable) else None
        try:
            yield
        except BaseException:
            vars(self).update(here)
            present.restore(data)
            if own is not None:
                data.load_state_dict(own)
            raise

    def _go_to(self, state: Mapping[str, Any]) -> None:
        data: Any = self.problem.data
        self._iterator, self._glance, self.began, self.drawn, self._last = None, None, None, 0, []
        present = random_state(_HOST)
        if "own" in state:
            data.load_state_dict(copy.deepcopy(state["own"]))
            self._iterator, self.drawn = iter(data), state["drawn"]
        elif state["drawn"]:
            if state["began"] is not None:
                _Draws.of(state["began"]).restore(data)
            self._skip(state)
        restore_random_state(present)
        put_back(data, state["now"])

    def _skip(self, state: Mapping[str, Any]) -> None:
        """Draw the batches that were drawn; the last must be the one that came then, unless draws go into each."""
        before = None
        for _ in range(state["drawn"]):
            before = _Draws.now(self.problem.data) if self.drawn == state["drawn"] - 1 else None
            self._last = [self._draw()]
        alone = self.drawn == 1 or (before is not None and before.agrees(_Draws.now(self.problem.data)))
        if self.drawn != state["drawn"] or (alone and fingerprint(self._last) != state["last"]):
            raise ValueError(
                f"problem {self.problem.name!r}: its data gives other batches than when it was saved (compared at "
                f"batch {state['drawn'] - 1} of a pass). Pass the same data, in an order that depends on the "
                "generators of torch, NumPy or random alone, or give it state_dict and load_state_dict."
            )


class DataError(RuntimeError):
    """A problem's data raised when a batch was drawn from it; the cause is chained."""


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
