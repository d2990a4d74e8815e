"""Fifty unrolled steps of a convolutional network at batch 128: memory and time against `higher`.

Both are measured by the same code in a process of their own each: the peak is that of the resident size above its size
before the call.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from hypergrad.bench.claims._rival import difference, quartiles, rival
from hypergrad.bench.claims.base import Claim
from hypergrad.bench.pool import OURS, Pool
from hypergrad.bench.protocol import Request, Response
from hypergrad.methods import Unrolled

ROUNDS = 3
AGREE = 1e-3
PLAIN, HALF, COMPILED = Unrolled(), Unrolled(retain=0.5), Unrolled(compile=True)


def measure() -> list[Claim]:
    """Return the claims about a long run."""
    ways = ("PLAIN", "HALF", "COMPILED")
    theirs: list[Response] = []
    ours: dict[str, list[Response]] = {way: [] for way in ways}
    errors: dict[str, float] = {}
    with rival() as higher, tempfile.TemporaryDirectory() as folder, Pool(Path(folder) / "logs") as pool:
        for turn in range(ROUNDS):
            theirs.append(higher.unroll("long_run", repeats=1))
            reference = higher.gradient(theirs[-1])
            for way in ways if turn == 0 else ways[:2]:  # what is reported beside is run once: compiling takes long
                ours[way].append(_ask(pool, way, folder))
                with np.load(Path(folder) / "gradient.npz") as arrays:
                    found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
                errors[way] = difference(found, reference)
    claims = [
        _time("eager", theirs, ours["PLAIN"], 1.45, errors["PLAIN"]),
        _memory("eager", theirs, ours["PLAIN"], 0.1),
        _time("retain=0.5", theirs, ours["HALF"], 1.25, errors["HALF"]),
        _memory("retain=0.5", theirs, ours["HALF"], None),
        _time("compiled", theirs[:1], ours["COMPILED"], None, errors["COMPILED"]),
        _memory("compiled", theirs[:1], ours["COMPILED"], None),
    ]
    return claims


def _ask(pool: Pool, way: str, folder: str) -> Response:
    request = Request(
        problem="hypergrad.bench.claims._problems:long_run",
        method=f"hypergrad.bench.claims.unrolled:{way}",
        settings={"compile": True} if way == "COMPILED" else {},
        size="full",
        repeats=1,
        threads=torch.get_num_threads(),
        budget=60.0,
        out=folder,
    )
    response = pool.ask(OURS, request)
    if not response.ok:
        raise RuntimeError(f"Unrolled on long_run: {response.error}")
    return response


def _time(way: str, theirs: list[Response], ours: list[Response], bound: float | None, error: float) -> Claim:
    ratios = [median(a.seconds) / median(b.seconds) for a, b in zip(ours, theirs, strict=True)]
    detail = (
        f"higher {median(r.seconds[0] for r in theirs):.2f} s, ours {median(r.seconds[0] for r in ours):.2f} s; "
        f"gradients differ by {error:.1e}"
    )
    if ours[0].compile_seconds is not None:
        detail += f"; compiled in {median(r.compile_seconds or 0.0 for r in ours):.0f} s"
    holds = error < AGREE and (bound is None or median(ratios) <= bound)
    wanted = "(reported beside)" if bound is None else f"<= {bound:g}"
    return Claim(
        f"50 unrolled steps, {way}: time against higher", median(ratios), quartiles(ratios), wanted, holds, detail
    )


def _memory(way: str, theirs: list[Response], ours: list[Response], bound: float | None) -> Claim:
    pairs = [(a.peak_bytes, b.peak_bytes) for a, b in zip(ours, theirs, strict=True)]
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    detail = f"higher {(theirs[0].peak_bytes or 0) / 2**20:.0f} MiB, ours {(ours[0].peak_bytes or 0) / 2**20:.0f} MiB"
    holds = bound is None or median(ratios) <= bound
    wanted = "(reported beside)" if bound is None else f"<= {bound:g}"
    return Claim(
        f"50 unrolled steps, {way}: peak memory against higher",
        median(ratios),
        quartiles(ratios),
        wanted,
        holds,
        detail,
    )
