"""results.json: what it holds, and how it grows one row at a time.

schema      1
run         suite, size, seed, dtype, threads, repeats: what was asked for
hardware, versions, commit          what it was measured with
problems    name -> kind, num_lower, num_upper, num_steps, notes, reference (how, seconds)
skipped     libraries without an environment
rows        one object for each contender on each problem: `hypergrad.bench.measure.Row`
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hypergrad.bench.measure import Row
from hypergrad.bench.surroundings import replace_text

SCHEMA = 1


@dataclass(frozen=True)
class Run:
    """What was asked for: two runs that differ here do not share a results.json.

    Attributes:
        suite: "quick", "full" or "own".
        size: of the problems.
        seed: of everything random.
        dtype: of the contenders.
        threads: that a worker uses.
        repeats: timed calls at most.
    """

    suite: str
    size: str
    seed: int
    dtype: str
    threads: int
    repeats: int


@dataclass
class Results:
    """The content of results.json, saved whole after each change.

    Attributes:
        path: the file.
        run: what was asked for.
        surroundings: hardware, versions and commit.
        problems: facts about each problem by name.
        skipped: libraries left out.
        rows: what was measured.
    """

    path: Path
    run: Run
    surroundings: dict[str, Any]
    problems: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def find(self, key: tuple[str, str, str]) -> Row | None:
        """Return the row with a key, or None where it is yet to be measured."""
        return next((row for row in self.rows if row.key == key), None)

    def add(self, row: Row) -> None:
        """Append a row and save."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {
            "schema": SCHEMA,
            "run": asdict(self.run),
            **self.surroundings,
            "problems": self.problems,
            "skipped": self.skipped,
            "rows": [row.encode() for row in self.rows],
        }
        replace_text(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Results:
    """Return what a results.json holds.

    Raises:
        ValueError: for a file of another schema, or none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a results.json ({error}). Give another folder, or pass --restart.") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not of schema {SCHEMA}, which this version writes. Pass --restart to replace it.")
    return Results(
        path,
        Run(**content["run"]),
        {name: content[name] for name in ("hardware", "versions", "commit")},
        content["problems"],
        content["skipped"],
        [Row(**row) for row in content["rows"]],
    )


def opened(path: Path, run: Run, describe: Callable[[], dict[str, Any]], *, restart: bool) -> Results:
    """Return the results to go on with: those of the file, or empty ones.

    Args:
        path: of results.json.
        run: what is asked for now.
        describe: returns the present surroundings.
        restart: leave what the file holds behind.

    Raises:
        ValueError: if the file was made by another run or with other surroundings; the first difference is named.
    """
    surroundings = describe()
    if restart or not path.exists():
        return Results(path, run, surroundings)
    found = load(path)
    before = {**asdict(found.run), **found.surroundings}
    now = {**asdict(run), **surroundings}
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"{path} was begun with {name} {before[name]!r}, and now it is {value!r}; mixed results would mislead. "
                "Pass --restart to begin anew, or --out for another folder."
            )
    return found
