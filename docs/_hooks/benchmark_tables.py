"""The benchmark page's tables: `python docs/_hooks/benchmark_tables.py FOLDER` takes over what a run wrote there.

Copies results.json, claims.json and the figures from FOLDER to docs/benchmarks/, as far as they are there, and writes
the tables into docs/benchmarks.md between their markers. Without FOLDER it writes them from docs/benchmarks/ again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from hypergrad.bench import claims_report, figures, report, results
from hypergrad.bench.results import Results

DOCS = Path(__file__).resolve().parents[1]
KEPT = DOCS / "benchmarks"
PAGE = DOCS / "benchmarks.md"


def take(folder: Path) -> None:
    """Copy a run's files to where the page finds them."""
    KEPT.mkdir(exist_ok=True)
    for pattern in ("results.json", "claims.json", "*.png"):
        for path in folder.glob(pattern):
            shutil.copyfile(path, KEPT / path.name)


def page(text: str, kept: Path = KEPT) -> str:
    """Return the page with its tables written from the files in `kept`; where one is missing, as it is."""
    if (kept / "claims.json").exists():
        found = json.loads((kept / "claims.json").read_text(encoding="utf-8"))
        text = _between(text, "claims", claims_report.table(found))
    if (kept / "results.json").exists():
        found = results.load(kept / "results.json")
        drawn = [name for name in found.problems if (kept / figures.file_name(name)).exists()]
        content = report.markdown(found, drawn, level=3, folder="benchmarks/")
        text = _between(text, "results", _losses(found) + "\n\n" + content.strip())
    return text


def _losses(found: Results) -> str:
    """Return where a rival is on the front of time and error, or that it never is."""
    lost = [
        f"- `{problem}`: {row.library}'s {row.label}, error {row.relative_error:.1e} in "
        + report.duration(row.median or 0.0)
        for problem in found.problems
        for row in report.front([r for r in found.rows if r.problem == problem])
        if row.library != "hypergrad"
    ]
    if not lost:
        return "**Where we lose:** in this run no rival is on the front of error and time."
    return "**Where we lose** (nothing of ours is both faster and more accurate):\n\n" + "\n".join(
        f"- {x}" for x in lost
    )


def _between(text: str, name: str, content: str) -> str:
    begin = f"<!-- {name}: written by docs/_hooks/benchmark_tables.py from docs/benchmarks/{name}.json -->"
    end = f"<!-- end of {name} -->"
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take(Path(sys.argv[1]))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
