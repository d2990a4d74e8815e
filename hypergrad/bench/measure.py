"""From a worker's answer to a row of results: errors against the reference, quartiles."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hypergrad.bench.protocol import Offer, Response

Gradient = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Row:
    """One contender on one problem, as results.json holds it.

    Attributes:
        problem: its name.
        library: whose method it is; "hypergrad" for ours.
        method, settings: what was run.
        error: why there is no result; None where there is one.
        relative_error: norm(gradient - reference) / norm(reference).
        cosine: of the angle between the two.
        seconds: of each timed call.
        median, lower_quartile, upper_quartile: of `seconds`.
        compile_seconds: spent once, before; None where nothing is compiled.
        num_products: Hessian or Jacobian products as the method counts them.
        num_gradients: evaluations of the lower loss in one call.
        peak_bytes: the rise of the resident size in one call.
        carried: whether it rests on a state that earlier calls at the same point have built up.
        note: a breakdown's text, or another remark.
        versions: of what did the work.
    """

    problem: str
    library: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    relative_error: float | None = None
    cosine: float | None = None
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    compile_seconds: float | None = None
    num_products: int | None = None
    num_gradients: int | None = None
    peak_bytes: int | None = None
    carried: bool = False
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what no two rows share."""
        return self.problem, self.library, Offer(self.method, self.settings).label

    @property
    def label(self) -> str:
        """Return the method's name and settings."""
        return Offer(self.method, self.settings).label

    def encode(self) -> dict[str, Any]:
        """Return the row as an object of JSON."""
        return asdict(self)


def row(problem: str, library: str, offer: Offer, response: Response, folder: Path, reference: Gradient) -> Row:
    """Return the row of one contender.

    Args:
        problem: its name.
        library: the contender's.
        offer: what it was asked to do.
        response: what it answered.
        folder: where its gradient lies.
        reference: the exact gradient by name.
    """
    named: dict[str, Any] = {
        "problem": problem,
        "library": library,
        "method": offer.method,
        "settings": offer.settings,
        "versions": response.versions,
    }
    if not response.ok or response.gradient is None:
        return Row(**named, error=response.error or "no gradient came back")
    gradient = load(folder / response.gradient)
    missing = sorted(set(reference) ^ set(gradient))
    if missing:
        return Row(**named, error=f"the gradient has entries {sorted(gradient)}, the reference {sorted(reference)}")
    error, cosine = compare(gradient, reference)
    lower, median, upper = (float(q) for q in np.quantile(response.seconds, [0.25, 0.5, 0.75]))
    return Row(
        **named,
        relative_error=error,
        cosine=cosine,
        seconds=response.seconds,
        median=median,
        lower_quartile=lower,
        upper_quartile=upper,
        compile_seconds=response.compile_seconds,
        num_products=response.num_products,
        num_gradients=response.num_gradients,
        peak_bytes=response.peak_bytes,
        carried=response.carried,
        note=response.note,
    )


def load(path: Path) -> Gradient:
    """Return the arrays of a file by name."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def compare(gradient: Gradient, reference: Gradient) -> tuple[float | None, float | None]:
    """Return the relative error and the cosine; None where the gradient is not finite, or a norm is zero."""
    g = np.concatenate([gradient[name].ravel() for name in reference])
    r = np.concatenate([reference[name].ravel() for name in reference])
    scale = float(np.linalg.norm(r))
    error = float(np.linalg.norm(g - r)) / scale if scale > 0 else math.nan
    product = scale * float(np.linalg.norm(g))
    cosine = float(g @ r) / product if product > 0 else math.nan
    return (error if math.isfinite(error) else None), (cosine if math.isfinite(cosine) else None)
