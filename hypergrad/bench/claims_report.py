"""Measures claims one after the other and keeps what was found: claims.json and claims.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypergrad.bench import surroundings
from hypergrad.bench.claims import catalogue
from hypergrad.bench.claims.base import Claim


def measure(names: Sequence[str], out: Path, *, threads: int | None) -> int:
    """Measure the named claims into `out` and return 0 if all of them hold, else 1; earlier ones stay listed.

    Args:
        names: of the claims' files.
        out: an existing folder.
        threads: for intra-operation parallelism; None leaves it to PyTorch.
    """
    path = out / "claims.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    all_hold = True
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            claims = catalogue.measured(name, threads=threads)
        except RuntimeError as error:
            print(f"hypergrad bench: {error}", file=sys.stderr)
            all_hold = False
            continue
        found[name] = {"measured_with": surroundings.describe(), "claims": [asdict(claim) for claim in claims]}
        surroundings.replace_text(path, json.dumps(found, indent=1))
        surroundings.replace_text(out / "claims.md", table(found) + "\n")
        for claim in claims:
            print(_line(claim), flush=True)
            all_hold = all_hold and claim.holds
    return 0 if all_hold else 1


def table(found: dict[str, Any]) -> str:
    """Return the claims of a claims.json as a table in Markdown."""
    rows = ["| claim | measured | spread | promised | kept | what was compared |", "|---|---|---|---|---|---|"]
    for entry in found.values():
        for fields in entry["claims"]:
            spread = "" if fields["spread"] is None else f"{fields['spread'][0]:.3g} to {fields['spread'][1]:.3g}"
            kept = "yes" if fields["holds"] else "**no**"
            rows.append(
                f"| {fields['name']} | {fields['measured']:.3g} | {spread} | {fields['bound']} | {kept} "
                f"| {fields['detail']} |"
            )
    return "\n".join(rows)


def _line(claim: Claim) -> str:
    spread = "" if claim.spread is None else f" ({claim.spread[0]:.3g} to {claim.spread[1]:.3g})"
    verdict = "kept" if claim.holds else "NOT KEPT"
    return f"{verdict}: {claim.name}: {claim.measured:.3g}{spread}, promised {claim.bound}. {claim.detail}"
