"""A rival's part of a claim: its gradient, seconds and peak memory, from its own interpreter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from hypergrad.bench.pool import Pool, missing
from hypergrad.bench.protocol import Request, Response

Gradient = dict[str, Tensor]


class Rival:
    """`higher`, asked for unrolled hypergradients."""

    name = "higher"

    def __init__(self, pool: Pool, folder: Path) -> None:
        """Talk to the workers of `pool`; gradients are handed over in `folder`."""
        self._pool, self._folder = pool, folder

    def unroll(self, problem: str, *, size: str = "full", repeats: int = 3) -> Response:
        """Return the answer for a function of `_problems`.

        Raises:
            RuntimeError: if there is none.
        """
        request = Request(
            problem=f"bench.claims._problems:{problem}",
            method="unroll",
            size=size,
            repeats=repeats,
            threads=torch.get_num_threads(),
            budget=60.0,
            out=str(self._folder),
        )
        response = self._pool.ask(self.name, request)
        if not response.ok:
            raise RuntimeError(f"{self.name} on {problem}: {response.error}")
        return response

    def gradient(self, response: Response) -> Gradient:
        """Return the gradient of the latest answer."""
        assert response.gradient is not None
        with np.load(self._folder / response.gradient) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@contextmanager
def rival() -> Iterator[Rival]:
    """Open the rival's worker.

    Raises:
        RuntimeError: if its environment is missing; the message says how to make it.
    """
    interpreter = missing(Rival.name)
    if interpreter is not None:
        raise RuntimeError(
            f"this claim compares with {Rival.name}, whose interpreter {interpreter} does not exist. Make it with "
            f"`make rivals`, or `make rival-{Rival.name}` for this one alone."
        )
    with tempfile.TemporaryDirectory() as folder, Pool(Path(folder) / "logs") as pool:
        yield Rival(pool, Path(folder))


def difference(ours: Gradient, theirs: Gradient) -> float:
    """Return the relative distance of two gradients by name."""
    ours_flat, theirs_flat = (torch.cat([g[name].double().flatten() for name in ours]) for g in (ours, theirs))
    return float((ours_flat - theirs_flat).norm() / theirs_flat.norm())


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def milliseconds(seconds: list[float]) -> str:
    """Return the median as text."""
    return f"{1e3 * median(seconds):.1f} ms"
