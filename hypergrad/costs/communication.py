r"""What the processes that train together send to each other: the collectives of one upper step, in closed form.

With n lower and m upper parameters, k own steps of the lower level, s products, T steps of a penalty. Messages hold
whole vectors; a word for each tensor, and for loss, metrics and signals, goes along and is left out here.
`tests/distributed/test_communication.py` compares all of it with what is sent.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from hypergrad.methods import (
    BOME,
    F2SA,
    SAMA,
    SOBA,
    AmIGO,
    FiniteDifference,
    ForwardUnrolled,
    Implicit,
    Method,
    OneStep,
    Penalty,
    Reptile,
    StocBiO,
    Unrolled,
)

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class Message:
    """One collective: which, and how many vectors of lower and of upper parameters it holds."""

    collective: Collective = "all_reduce"
    lower: Fraction = Fraction(0)
    upper: int = 0

    def ring_bytes(self, ranks: int, lower: float, upper: float) -> float:
        """Return what each of `ranks` processes sends by a ring algorithm, for so many bytes of parameters."""
        passes = 2 if self.collective == "all_reduce" else 1
        return passes * (ranks - 1) / ranks * (float(self.lower) * lower + self.upper * upper)


Messages = Counter[Message]


def _lower(count: int = 1, upper: int = 0) -> Message:
    return Message(lower=Fraction(count), upper=upper)


_WORD, _UPPER = _lower(0), _lower(0, 1)


def upper_step(method: Method, steps: int, *, products: int = 0, upper: int = 0, linear: bool = True) -> Messages:
    """Return what one upper step of an engine sends whose parameters are whole on every rank.

    Args:
        method: of the lower level.
        steps: its own steps, k.
        products: s, as the statistics count them; for methods that do not say it themselves.
        upper: m, for `ForwardUnrolled` alone.
        linear: whether the lower optimizer's step is: SGD's, without clipping and learned options.
    """
    if isinstance(method, ForwardUnrolled):
        products = 2 * steps * upper
    return Counter({_lower(): steps}) + hypergradient(method, steps, products=products, linear=linear)


def hypergradient(
    method: Method, steps: int, *, products: int = 0, gradients: int = 0, linear: bool = True
) -> Messages:
    """Return what one hypergradient sends, its outer gradient included and the lower run left out.

    Args:
        method: of the lower level.
        steps: k.
        products: s.
        gradients: of the lower loss, for a method from outside this package that takes no products.
        linear: as in `upper_step`.
    """
    return Counter({_lower(1, 1): 1}) + _response(method, steps, products, gradients, linear)


def _response(method: Method, steps: int, products: int, gradients: int, linear: bool) -> Messages:
    match method:
        case Implicit():  # the condition itself travels with the first product
            return Counter({_lower(2): 1, _lower(): products - 1, _UPPER: 1})
        case Unrolled():  # each step's product, and before it its gradient, where that was not retained and is needed
            n = _Sweep.of(method, steps)
            return Counter({_lower(): n.again + (0 if linear else n.swept), _lower(1, 1): n.swept + n.taped})
        case ForwardUnrolled():
            return Counter({_lower(): products, _UPPER: steps + 1, _WORD: 1})
        case OneStep():
            return Counter({_lower(1, 1): 1})
        case FiniteDifference():
            return Counter({_UPPER: 1})
        case SAMA():
            return Counter({_lower(): 1, _UPPER: 1})
        case Penalty():
            return Counter({_lower(1, 1): 1, _lower(): 2 * method.steps, _UPPER: 3, _WORD: 2 * method.steps + 3})
        case SOBA():
            return Counter({_lower(2): 1, _UPPER: 1})
        case AmIGO():
            return Counter({_lower(): method.steps + 1, _UPPER: 1, _WORD: 1})
        case StocBiO():
            return Counter({_lower(): method.num_products + 1, _UPPER: 1, _WORD: 1})
        case F2SA():
            return Counter({_lower(): 2 * method.steps, _UPPER: 3, _WORD: 2 * method.steps + 4})
        case BOME():
            return Counter({_lower(): 2, _UPPER: 3, _WORD: 4})
        case Reptile():
            return Counter()
        case _:
            return Counter({_lower(): products + gradients, _UPPER: 1})


@dataclass(frozen=True)
class Work:
    """What one upper step computes: gradients of a loss, and products with second derivatives, mixed ones included."""

    gradients: int
    products: int = 0


def work(method: Method, steps: int, *, products: int = 0) -> Work:
    """Return what one upper step computes, its own steps and the outer gradient included; m is small.

    Args:
        method: of the lower level.
        steps: k.
        products: s.
    """
    own = steps + 1
    match method:
        case Implicit() | SOBA() | AmIGO() | StocBiO():
            return Work(own + 1, products + 1)
        case Unrolled():
            sweep = _Sweep.of(method, steps)
            return Work(own + sweep.swept + sweep.again, sweep.swept + sweep.taped)
        case ForwardUnrolled():
            return Work(own + steps + 1, products)
        case OneStep():
            return Work(own + 1, 1)
        case FiniteDifference():
            return Work(own + 2)
        case SAMA():
            return Work(own + 3)
        case Penalty():
            return Work(own + 2 * method.steps + 4)
        case F2SA():
            return Work(own + 2 * method.steps + 4)
        case BOME():
            return Work(own + 6)
        case Reptile():
            return Work(own)
        case _:
            return Work(own, products)


@dataclass(frozen=True)
class _Sweep:
    """How many steps of the window are swept anew, how many on their retained tape, how many states are made again."""

    swept: int
    taped: int
    again: int

    @staticmethod
    def of(method: Unrolled, steps: int) -> _Sweep:
        window = range(steps - (steps if method.truncate is None else min(method.truncate, steps)), steps)
        kept = method.recording(steps)
        taped = sum(kept.tapes(k) for k in window)
        again = sum(not kept.keeps(k, steps) and not kept.tapes(k) for k in window)
        return _Sweep(len(window) - taped, taped, again)


def upper_step_on_shards(method: Method, steps: int, *, units: int) -> Messages:
    """Return what one upper step sends where the lower module is sharded in `units` equal parts, and small ones whole.

    Each pass gathers every unit twice, forward and backward, and scatters its gradient once. The upper module is whole,
    but for methods whose lower level begins at it, where it is sharded alike and read by nothing else.

    Raises:
        ValueError: for a method that does not run on shards.
    """
    if not method.serves_shards:
        raise ValueError(f"{type(method).__name__} does not run on modules sharded by fully_shard.")
    unit, passes = Fraction(1, units), work(method, steps).gradients
    sharded: Messages = Counter(
        {Message("all_gather", unit): 2 * units * passes, Message("reduce_scatter", unit): units * passes}
    )
    match method:
        case FiniteDifference():  # the norm of the direction is the word beside the own steps'
            small = Counter({_WORD: steps + 1, _UPPER: 3})
        case SAMA():
            small = Counter({_WORD: steps + 1, _UPPER: 4})
        case Penalty():
            small = Counter({_WORD: steps, _UPPER: 5 + 2 * method.steps})
        case _:
            small = Counter({_WORD: steps + 2})
    return sharded + small


def total_bytes(messages: Messages, *, ranks: int, lower: float, upper: float) -> float:
    """Return what each rank sends in all, by ring algorithms, for so many bytes of lower and upper parameters."""
    return math.fsum(count * message.ring_bytes(ranks, lower, upper) for message, count in messages.items())
