"""Finds the claims: every module beside this one that has a `measure`."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from hypergrad.bench.claims.base import Claim

Measure = Callable[[], list[Claim]]


def names() -> list[str]:
    """Return the names of the claims there are, in alphabetical order."""
    found = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name for name in found if name not in ("base", "catalogue") and not name.startswith("_"))


def chosen(asked: Sequence[str]) -> list[str]:
    """Return the names asked for; "all" stands for every one.

    Raises:
        ValueError: for a name that is none of a claim.
    """
    known = names()
    unknown = [name for name in asked if name not in known and name != "all"]
    if unknown:
        raise ValueError(f"there is no claim {unknown[0]!r}. Known are: {', '.join(known)}, all.")
    return known if "all" in asked else list(dict.fromkeys(asked))


def measured(name: str, *, threads: int | None = None) -> list[Claim]:
    """Return the claims of one file, measured in a process of its own.

    Args:
        name: the file's.
        threads: for intra-operation parallelism; None leaves it to PyTorch.

    Raises:
        RuntimeError: if the measurement fails; the text holds the end of what it printed.
    """
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "hypergrad.bench.claims.catalogue", name],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the measurement of claim {name!r} failed with exit status {done.returncode}; see above.")
    return [Claim.decode(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _main() -> None:
    module = importlib.import_module(f"hypergrad.bench.claims.{sys.argv[1]}")
    for claim in cast(Measure, module.measure)():
        print(claim.encode(), flush=True)


if __name__ == "__main__":
    _main()
