"""Which contenders nothing else beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hypergrad.bench.measure import Row

Cost = Literal["median", "peak_bytes"]


def front(rows: Sequence[Row], cost: Cost = "median") -> list[Row]:
    """Return the rows that no other beats in both error and cost, cheapest first.

    Wrong ones take no part, nor do those whose state earlier calls have paid for.

    Args:
        rows: of one problem.
        cost: "median" for time, "peak_bytes" for memory.
    """
    usable = [row for row in rows if row.relative_error is not None and row.relative_error < 1 and not row.carried]
    usable = [row for row in usable if price(row, cost) is not None]
    usable.sort(key=lambda row: (price(row, cost), row.relative_error))
    found: list[Row] = []
    for row in usable:
        if not found or (row.relative_error or 0.0) < (found[-1].relative_error or 0.0):
            found.append(row)
    return found


def price(row: Row, cost: Cost) -> float | None:
    """Return what a row cost."""
    return row.median if cost == "median" else row.peak_bytes
