"""What the harness and a worker process say to each other: one JSON object a line, each way.

Imports nothing but the standard library, and nothing of the package: a rival's worker runs in an interpreter of its
own, where `hypergrad` may be another library's name, and imports this folder as `bench`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

MARK = '{"hypergrad-bench": '
"""How a response's line begins, so that what a library prints is not taken for one."""


@dataclass(frozen=True)
class Offer:
    """One way to compute a hypergradient: a method's name and its settings."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the name in tables: `CG 20` or `cg (K=20, lr=0.1)`."""
        options = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.method} ({options})" if options else self.method


@dataclass(frozen=True)
class Request:
    """What a worker is asked to do.

    Attributes:
        problem: the name of a problem of the suite, or "module:function".
        method: one of the offers' names; empty to ask for the offers for this problem.
        settings: that offer's settings.
        size, seed, dtype: what the problem is built with; dtype is "float32" or "float64".
        repeats: how often to time, at most; 0 for a single call, whose time counts as it is.
        warmup: calls before that, beyond a first one within the budget.
        threads: for intra-operation parallelism.
        budget: seconds after which no further repeat is begun; a first call of four times that is the only one.
        limit: seconds after which the attempt is ended and reported as failed.
        out: an existing folder for the gradient's file.
    """

    problem: str
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    size: str = "quick"
    seed: int = 0
    dtype: str = "float32"
    repeats: int = 5
    warmup: int = 1
    threads: int = 1
    budget: float = 10.0
    limit: float = 300.0
    out: str = "."

    def encode(self) -> str:
        """Return the request as one line."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(line: str) -> Request:
        """Return the request that a line holds; entries that a newer harness may add are left out."""
        known = {f.name for f in fields(Request)}
        return Request(**{name: value for name, value in json.loads(line).items() if name in known})


@dataclass(frozen=True)
class Response:
    """What a worker answers.

    Attributes:
        ok: whether there is a gradient.
        error: if not, why.
        seconds: of each timed call.
        first_seconds: of the first call, with whatever is done only once.
        compile_seconds: the part of it that compilation took; None where nothing is compiled.
        peak_bytes: the largest resident size in one call, above that before it.
        num_products: Hessian or Jacobian products as the method counts them; None where it does not.
        num_gradients: evaluations of the lower loss in one call; None where they cannot be counted.
        gradient: the file with d upper_loss / d upper by name, in the request's `out`.
        carried: whether it rests on a state that earlier calls at the same point have built up.
        note: what a reader of the table should know.
        versions: of what did it.
        offers: the answer to a request without a method,
        facts: with what the problem is: kind, num_lower, num_upper, num_steps, notes.
    """

    ok: bool
    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    num_products: int | None = None
    num_gradients: int | None = None
    gradient: str | None = None
    carried: bool = False
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    offers: list[Offer] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> str:
        """Return the response as one line."""
        return MARK + json.dumps(asdict(self)) + "}"

    @staticmethod
    def decode(line: str) -> Response | None:
        """Return the response that a line holds, or None for a line that something else printed."""
        if not line.startswith(MARK):
            return None
        entries = json.loads(line)["hypergrad-bench"]
        known = {f.name for f in fields(Response)}
        found = {name: value for name, value in entries.items() if name in known}
        return Response(**{**found, "offers": [Offer(**offer) for offer in found.get("offers", [])]})
