"""What an estimate says: a row for each method, and how the table prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hypergrad.costs._meter import Reading
from hypergrad.methods import Method


@dataclass(frozen=True)
class Cost:
    """What one method costs at one upper step.

    Attributes:
        name: the method, short.
        method: the method.
        gradient_equivalents: its time over that of one gradient of the lower loss; the lower run apart.
        run_equivalents: the same of the lower run, with what this method has it record.
        num_products: Hessian products, an iterative solver's at its `max_steps`; None where it counts none.
        flops: of matrix products and convolutions, the run left out.
        seconds: time of method and run, where the time of a gradient is known.
        record_bytes: what the run's record keeps for the method: parameters, optimizer states, retained tapes.
        tape_bytes: saved for backward passes at the peak: activations, and what the second derivative keeps.
        work_bytes: the rest at the peak: vectors of the solver, gradients, temporaries.
        communication_bytes: what each of `ranks` processes sends, by ring all-reduce.
    """

    name: str
    method: Method
    gradient_equivalents: float
    run_equivalents: float
    num_products: int | None
    flops: int
    seconds: float | None
    record_bytes: int
    tape_bytes: int
    work_bytes: int
    communication_bytes: int

    @property
    def memory_bytes(self) -> int:
        """The peak above parameters and data."""
        return self.record_bytes + self.tape_bytes + self.work_bytes


@dataclass(frozen=True)
class Estimate:
    """What methods cost on one lower problem. `print` it; `estimate["OneStep"]` is one row.

    Attributes:
        name: the lower problem.
        reader: the problem above it.
        num_steps: lower steps per upper step; 0 where the solution came from elsewhere.
        lower_bytes, upper_bytes: of the parameters.
        gradient: what one gradient of the lower loss takes.
        gradient_seconds: its time, if it was given or measured.
        ranks: the number of processes that share the data.
        rows: one for each method.
        refusals: why the other methods do not serve here, by name.
    """

    name: str
    reader: str
    num_steps: int
    lower_bytes: int
    upper_bytes: int
    gradient: Reading
    gradient_seconds: float | None
    ranks: int
    rows: tuple[Cost, ...]
    refusals: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Cost:
        """Return the row of the method called `name`."""
        found = {row.name: row for row in self.rows}
        if name not in found:
            raise KeyError(self.refusals.get(name, f"no row {name!r}; there are {list(found)}"))
        return found[name]

    def __str__(self) -> str:
        """Return a small table."""
        known = "" if self.gradient_seconds is None else f" in {1e3 * self.gradient_seconds:.3g} ms"
        lines = [
            f"{self.name}, read by {self.reader}: {_size(self.lower_bytes)} of lower and {_size(self.upper_bytes)} of "
            f"upper parameters, {self.num_steps} lower steps",
            f"  one lower gradient: {self.gradient.flops:.3g} FLOPs{known}; times below are in such gradients",
        ]
        width = max([6, *(len(row.name) for row in self.rows)])
        timed = "       time" if self.gradient_seconds is not None else ""
        lines.append(
            f"  {'method':{width}}  gradients  + run  products     memory = record +     tape +     work   "
            f"per rank{timed}"
        )
        for row in self.rows:
            products = "" if row.num_products is None else str(row.num_products)
            seconds = "" if row.seconds is None else f"  {1e3 * row.seconds:6.3g} ms"
            parts = (row.memory_bytes, row.record_bytes, row.tape_bytes, row.work_bytes, row.communication_bytes)
            sizes = "  ".join(f"{_size(part):>9}" for part in parts)
            lines.append(
                f"  {row.name:{width}}  {row.gradient_equivalents:9.3g}  {row.run_equivalents:5.3g}  {products:>8}  "
                f"{sizes}{seconds}"
            )
        lines += [f"  {name}: {why}" for name, why in self.refusals.items()]
        return "\n".join(lines)


class Estimates(dict[str, Estimate]):
    """The estimates for an engine's lower problems by name. `print` it."""

    def __str__(self) -> str:
        """Return all tables."""
        return "\n\n".join(str(estimate) for estimate in self.values())


def _size(count: int) -> str:
    """Return a number of bytes for reading."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
