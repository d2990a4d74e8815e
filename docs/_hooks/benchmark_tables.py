"""The benchmark page's tables: `python docs/_hooks/benchmark_tables.py FOLDER` takes over what a run wrote there.

Copies results.json, claims.json and the figures from FOLDER to docs/benchmarks/, as far as they are there, and writes
the tables into docs/benchmarks.md between their markers. With a name after FOLDER the results are kept as NAME.json,
for a run of some problems apart. Without FOLDER it writes the tables from docs/benchmarks/ again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from hypergrad.bench import claims_report, figures, pareto, report, results
from hypergrad.bench.results import Results

DOCS = Path(__file__).resolve().parents[1]
KEPT = DOCS / "benchmarks"
PAGE = DOCS / "benchmarks.md"
RUNS = ("results", "transformer")
"""The files of results that the page has tables of."""


def take(folder: Path, name: str = "results") -> None:
    """Copy a run's files to where the page finds them, its results as `name`.json."""
    KEPT.mkdir(exist_ok=True)
    for pattern in ("results.json", "claims.json", "*.png"):
        for path in folder.glob(pattern):
            shutil.copyfile(path, KEPT / (f"{name}.json" if path.name == "results.json" else path.name))


def page(text: str, kept: Path = KEPT) -> str:
    """Return the page with its tables written from the files in `kept`; where one is missing, as it is."""
    if (kept / "claims.json").exists():
        found = json.loads((kept / "claims.json").read_text(encoding="utf-8"))
        text = _between(text, "claims", claims_report.table(found))
    for run in RUNS:
        if (kept / f"{run}.json").exists():
            found = results.load(kept / f"{run}.json")
            drawn = [name for name in found.problems if (kept / figures.file_name(name)).exists()]
            content = report.markdown(found, drawn, level=3, folder="benchmarks/")
            text = _between(text, run, _losses(found) + "\n\n" + content.strip())
    return text


def _losses(found: Results) -> str:
    """Return the rivals on the front that none of ours matches: as fast, with at most twice the error."""
    lost = []
    for problem in found.problems:
        rows = [row for row in found.rows if row.problem == problem]
        ours = [
            row for row in rows if row.library == "hypergrad" and row.relative_error is not None and not row.carried
        ]
        for row in pareto.front(rows):
            error, time = row.relative_error or 0.0, row.median or 0.0
            if row.library == "hypergrad" or any(
                (own.relative_error or 0.0) <= 2 * error and (own.median or 0.0) <= time for own in ours
            ):
                continue
            lost.append(f"- `{problem}`: {row.library}'s {row.label}, error {error:.1e} in {report.duration(time)}")
    if not lost:
        return (
            "**Where we lose:** in this run every rival is matched by a method as fast, with at most twice its error."
        )
    return "**Where we lose** (nothing of ours is as fast with at most twice the error):\n\n" + "\n".join(lost)


def _between(text: str, name: str, content: str) -> str:
    begin = f"<!-- {name}: written by docs/_hooks/benchmark_tables.py from docs/benchmarks/{name}.json -->"
    end = f"<!-- end of {name} -->"
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(Path(sys.argv[1]), *sys.argv[2:])
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
