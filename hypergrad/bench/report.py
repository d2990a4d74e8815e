"""What a person reads: a table in Markdown for each problem, with the cheapest method for each accuracy marked."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from hypergrad.bench import figures
from hypergrad.bench.measure import Row
from hypergrad.bench.pareto import front
from hypergrad.bench.results import Results
from hypergrad.bench.surroundings import replace_text


def write(results: Results) -> str:
    """Write report.md and, with matplotlib, one figure a problem beside results.json; return what was written."""
    folder = results.path.parent
    drawn: list[str] = []
    if importlib.util.find_spec("matplotlib") is not None:
        drawn = figures.draw(results, folder)
    replace_text(folder / "report.md", markdown(results, drawn))
    pictures = f" and {len(drawn)} figures" if drawn else "; figures need matplotlib: hypergrad-torch[bench]"
    return f"written: {folder / 'report.md'}, results.json{pictures}"


def markdown(results: Results, drawn: Sequence[str] = (), *, level: int = 1, folder: str = "") -> str:
    """Return the report.

    Args:
        results: what to report.
        drawn: problem names that have a figure `NAME.png` beside the report.
        level: of the first heading.
        folder: where the figures lie, as links say it.
    """
    hardware, versions = results.surroundings["hardware"], results.surroundings["versions"]
    lines = [
        f"{'#' * level} Accuracy against cost: suite `{results.run.suite}`",
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB, {hardware['system']}; "
        f"{results.run.threads} {'thread' if results.run.threads == 1 else 'threads'}, {results.run.dtype}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {results.surroundings['commit']}.",
        "",
        "Error and cosine against a float64 reference. Time: median of repeats (quartiles), after warm-up; what is "
        "compiled is compiled before, in the seconds given. Memory: rise of the resident size in one call. **Bold**: "
        "nothing measured here is both faster and more accurate, states "
        "built up by earlier calls left out. *wrong*: the error is at least 1, so that zeros would have been closer.",
    ]
    if results.skipped:
        lines += ["", f"Left out, for want of an environment: {', '.join(results.skipped)}."]
    for name in dict.fromkeys([*results.problems, *(row.problem for row in results.rows)]):
        lines += ["", f"{'#' * (level + 1)} {name}", ""]
        if name in results.problems:
            lines += [_about(results.problems[name]), ""]
        if name in drawn:
            lines += [f"![error against time and memory on {name}]({folder}{figures.file_name(name)})", ""]
        lines += table([row for row in results.rows if row.problem == name])
    return "\n".join(lines) + "\n"


def _about(facts: dict[str, object]) -> str:
    if "error" in facts:
        return f"No reference: {facts['error']}"
    text = f"{facts['num_lower']:,} lower and {facts['num_upper']:,} upper variables, kind `{facts['kind']}`"
    if facts["kind"] != "implicit":
        text += f", {facts['num_steps']} lower steps"
    reference = facts.get("reference")
    if isinstance(reference, dict):
        text += f". Reference: {reference['how']}"
    return text + ". " + str(facts["notes"])


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of rows, most accurate first, failures last."""
    lines = [
        "| library | method | error | cosine | time | products | gradients | memory | compile | remark |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    best = front(rows)
    worked = [row for row in rows if row.error is None]
    worked.sort(key=lambda row: (row.relative_error is None, row.relative_error or 0.0, row.median or 0.0))
    for row in [*worked, *(row for row in rows if row.error is not None)]:
        name = f"**{row.label}**" if row in best else row.label
        cells = [row.library, name, *_cells(row)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _cells(row: Row) -> list[str]:
    if row.error is not None:
        return ["", "", "", "", "", "", "", f"failed: {row.error}"]
    assert row.median is not None and row.lower_quartile is not None and row.upper_quartile is not None
    remarks = [row.note.split(". ")[0].rstrip(".")] if row.note else []
    if row.relative_error is None:
        remarks.insert(0, "*wrong*: not finite")
    elif row.relative_error >= 1:
        remarks.insert(0, "*wrong*")
    return [
        "" if row.relative_error is None else f"{row.relative_error:.1e}",
        "" if row.cosine is None else f"{row.cosine:.4f}",
        f"{duration(row.median)} ({duration(row.lower_quartile)} to {duration(row.upper_quartile)})",
        "" if row.num_products is None else str(row.num_products),
        "" if row.num_gradients is None else str(row.num_gradients),
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
        "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s",
        "; ".join(remarks),
    ]


def duration(seconds: float) -> str:
    """Return a time in milliseconds or seconds."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
