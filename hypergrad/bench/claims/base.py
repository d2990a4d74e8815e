"""What the measurement of a claim returns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Claim:
    """One claim, as measured.

    Attributes:
        name: what is claimed, a phrase: "logistic regression: time to 1e-6 against the fastest rival".
        measured: the number that decides it; a ratio carries no unit, else `detail` names it.
        spread: what `measured` ranges over between repeats, lower and upper quartile; None for a count.
        bound: the promise in words: ">= 3", "<= 1.10".
        holds: whether the measurement keeps it.
        detail: what was compared with what, the absolute numbers, and whatever a sceptic would ask.
    """

    name: str
    measured: float
    spread: tuple[float, float] | None
    bound: str
    holds: bool
    detail: str = ""

    def encode(self) -> str:
        """Return the claim as one line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(line: str) -> Claim:
        """Return the claim that a line holds."""
        entries = json.loads(line)
        spread = entries.pop("spread")
        return Claim(spread=None if spread is None else (spread[0], spread[1]), **entries)
