"""Runs contenders on problems, one at a time, and goes on where an earlier run stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypergrad.bench import measure
from hypergrad.bench.bar import Bar
from hypergrad.bench.measure import Gradient
from hypergrad.bench.pool import OURS, REFERENCE, Pool
from hypergrad.bench.protocol import Offer, Request
from hypergrad.bench.results import Results


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        problems: names, or "module:function".
        libraries: whose methods.
        methods: parts of labels; a contender runs if its label contains one of them. Empty for all.
        budget: seconds after which a contender is not repeated.
        limit: seconds after which an attempt is given up.
        own: methods of the user's, "module:attribute".
    """

    problems: Sequence[str]
    libraries: Sequence[str]
    methods: Sequence[str]
    budget: float
    limit: float
    own: Sequence[str] = ()


def execute(plan: Plan, results: Results) -> None:
    """Measure what the plan asks for and `results` do not have yet; a bar shows how far it is.

    Args:
        plan: what to run.
        results: where the rows go; saved after each.
    """
    folder = results.path.parent
    with Pool(folder / "logs") as pool:
        for number, problem in enumerate(plan.problems, 1):
            todo = _offers(plan, results, problem, pool, _request(plan, results, problem))
            if not todo:
                continue
            reference = _reference(plan, results, problem, pool)
            if reference is None:
                continue
            with Bar(f"{problem} ({number} of {len(plan.problems)})", len(todo)) as bar:
                for library, offer in todo:
                    bar.show(f"{library}: {offer.label}")
                    asked = replace(_request(plan, results, problem), method=offer.method, settings=offer.settings)
                    answer = pool.ask(library, asked)
                    results.add(measure.row(problem, library, offer, answer, folder, reference))
                    bar.advance()
    (folder / "gradient.npz").unlink(missing_ok=True)


def _request(plan: Plan, results: Results, problem: str) -> Request:
    return Request(
        problem,
        size=results.run.size,
        seed=results.run.seed,
        dtype=results.run.dtype,
        repeats=results.run.repeats,
        threads=results.run.threads,
        budget=plan.budget,
        limit=plan.limit,
        out=str(results.path.parent),
    )


def _offers(plan: Plan, results: Results, problem: str, pool: Pool, ask: Request) -> list[tuple[str, Offer]]:
    """Return what is still to be measured on a problem; a worker that cannot tell gets a row that says why."""
    todo: list[tuple[str, Offer]] = []
    for library in plan.libraries:
        answer = pool.ask(library, ask)
        if not answer.ok:
            everything = Offer("(all)")
            if results.find((problem, library, everything.label)) is None:
                results.add(measure.row(problem, library, everything, answer, results.path.parent, {}))
            continue
        results.problems.setdefault(problem, {}).update(answer.facts)
        own = [Offer(name) for name in plan.own] if library == OURS else []
        wanted = [offer for offer in answer.offers if not plan.methods or _matches(offer, plan.methods)]
        todo += [(library, offer) for offer in [*wanted, *own]]
    return [(library, offer) for library, offer in todo if results.find((problem, library, offer.label)) is None]


def _matches(offer: Offer, parts: Sequence[str]) -> bool:
    return any(part.lower() in offer.label.lower() for part in parts)


def _reference(plan: Plan, results: Results, problem: str, pool: Pool) -> Gradient | None:
    """Return the exact gradient, computed once and then kept in a file; None, and a message, where that fails."""
    folder = results.path.parent
    ask = replace(_request(plan, results, problem), dtype="float64", method="reference", repeats=0)
    kept = folder / "references" / f"{problem.replace(':', '-')}-{ask.size}-{ask.seed}.npz"
    if not kept.exists():
        with Bar(f"{problem}: exact gradient", 1):
            answer = pool.ask(REFERENCE, replace(ask, limit=max(4 * ask.limit, 600.0)))
        if not answer.ok or answer.gradient is None:
            results.problems.setdefault(problem, {})["error"] = answer.error
            results.save()
            print(f"hypergrad bench: problem {problem!r} has no reference: {answer.error}", file=sys.stderr)
            return None
        kept.parent.mkdir(exist_ok=True)
        os.replace(folder / answer.gradient, kept)
        facts = {"how": answer.note, "seconds": answer.first_seconds}
        kept.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
    results.problems.setdefault(problem, {})["reference"] = json.loads(kept.with_suffix(".json").read_text("utf-8"))
    return measure.load(kept)
