"""The table of methods, read off the code: `python docs/_hooks/methods_table.py` writes it into the pages that show it.

Summary, cost and bias are the docstrings' own sentences; the other columns are found out by asking each method.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

import hypergrad as hg

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/choosing.md")
BEGIN, END = "<!-- methods: written by docs/_hooks/methods_table.py -->", "<!-- end of methods -->"


def exported() -> list[type[hg.Method]]:
    """Return the methods that the package exports, in the order in which one would consider them."""
    names = [name for name in hg.methods.__all__ if inspect.isclass(getattr(hg.methods, name))]
    kinds = [getattr(hg.methods, name) for name in names]
    first = ["Implicit", "Unrolled", "ForwardUnrolled", "OneStep", "FiniteDifference", "SAMA", "Penalty", "SOBA"]
    first += ["AmIGO", "StocBiO", "F2SA", "BOME", "Reptile"]
    concrete = [k for k in kinds if issubclass(k, hg.Method) and not inspect.isabstract(k)]
    return sorted(concrete, key=lambda k: first.index(k.__name__) if k.__name__ in first else len(first))


def table() -> str:
    """Return the table in Markdown."""
    rows = [
        "| method | what it is | cost | second derivatives | needs a run | chains | bias |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in exported():
        method = kind(hg.CG()) if kind is hg.Implicit else kind()
        cells = [
            f"`{kind.__name__}`",
            _summary(kind),
            _sentence(kind, "Cost"),
            "yes" if method.second_order else "no",
            "yes" if _needs_run(method) else "no",
            "yes" if isinstance(method, hg.ResponseMethod) else "no",
            _sentence(kind, "Bias"),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _summary(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n")[0].rstrip(".")


def _sentence(kind: type, label: str) -> str:
    """Return the first sentence of the docstring's paragraph that begins with `label`."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    found = re.search(rf"\b{label}: (.+?)\.(?: [A-Z]|$)", text)
    if found is None:
        raise ValueError(f"the docstring of {kind.__name__} has no paragraph '{label}: ...'; every method needs one.")
    return found.group(1)


def _needs_run(method: hg.Method) -> bool:
    """Return whether the method refuses a lower solution that came from elsewhere."""
    traj = hg.solved(lambda w, u, _: ((w["w"] - u["u"]) ** 2).sum(), {"w": torch.ones(1)})
    try:
        hg.hypergradient(lambda w, _u, _b: (w["w"] ** 2).sum(), traj, {"u": torch.ones(1)}, method=method)
    except ValueError:
        return True
    return False


def insert(page: str, content: str) -> str:
    """Return the text of a page with the table between its markers replaced."""
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(insert(path.read_text(encoding="utf-8"), table()), encoding="utf-8")
