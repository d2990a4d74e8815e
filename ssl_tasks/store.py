"""Results on disk, seed by seed and arm by arm, so that a run that was cut short goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssl_tasks.saving import plain, write_json


@dataclass(frozen=True)
class Row:
    """One arm's measures under one seed; its curves, and where some test images lie in the plane: x, y, class."""

    arm: str
    seed: int
    seconds: float
    measures: Mapping[str, float]
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    plane: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Store:
    """A folder with one file a seed, each whole or not there; a file belongs to one setting of the options.

    Attributes:
        folder: where the files are.
        settings: everything that decides a result; a run goes on only with the same.
    """

    folder: Path
    settings: Mapping[str, Any]

    def begin(self, *, resume: bool) -> None:
        """Check that what is there can be gone on with, or, without `resume`, clear it away.

        Raises:
            ValueError: if the folder holds results of other settings; the message names the first that differs.
        """
        for path in sorted(self.folder.glob("seed-*.json")):
            if not resume:
                path.unlink()
                continue
            difference = _difference(self._read(path)["settings"], plain(self.settings))
            if difference:
                raise ValueError(
                    f"--resume: {path} was made with other options: {difference}. Give the options of that run, choose "
                    "another --out, or drop --resume to begin anew."
                )

    def rows(self, seed: int) -> list[Row]:
        """Return what is done of one seed."""
        path = self._path(seed)
        return [_row(row) for row in self._read(path)["rows"]] if path.is_file() else []

    def put(self, seed: int, rows: Sequence[Row]) -> None:
        """Write what is done of one seed, whole or not at all."""
        write_json(self._path(seed), {"settings": self.settings, "rows": [asdict(row) for row in rows]})

    def _path(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.json"

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"--resume: {path} is damaged ({error}); remove it, its seed will be run again."
            ) from error
        return content


def _row(stored: Mapping[str, Any]) -> Row:
    """Return a row as it was: null stands for a number that is none."""
    measures = {name: math.nan if value is None else value for name, value in stored["measures"].items()}
    return Row(**{**stored, "measures": measures})


def _difference(theirs: Any, ours: Any, where: str = "") -> str:
    """Return where two settings differ first, in words; empty if they do not."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            found = _difference(theirs.get(key), ours.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return ""
    return "" if theirs == ours else f"{where} was {theirs!r}, now {ours!r}"
