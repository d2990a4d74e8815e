"""The command `hypergrad bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from hypergrad.bench import claims_report, pool, report, results, suite, surroundings
from hypergrad.bench.claims import catalogue as claims
from hypergrad.bench.problems import catalogue as problems

LIMITS = {"quick": (0.15, 60.0), "full": (1.0, 300.0)}
"""Suite -> seconds after which a contender is not repeated, and after which it is given up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    folder = Path("runs/bench")
    parser.add_argument("--suite", default="quick", metavar="SIZE", help="quick (2 minutes) or full (an hour or more)")
    parser.add_argument(
        "--problem", nargs="+", metavar="NAME", help="only these: of the suite, or your own as module:function"
    )
    parser.add_argument(
        "--contender",
        nargs="+",
        metavar="LIBRARY",
        help="only these libraries (default: ours and hand-written autograd; in the full suite every one whose "
        "environment is there, see make rivals)",
    )
    parser.add_argument(
        "--method", nargs="+", default=[], metavar="TEXT", help="only methods whose name contains one of these"
    )
    parser.add_argument(
        "--own-method", nargs="+", default=[], metavar="MODULE:NAME", help="methods of yours, beside the others"
    )
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to (default: %(default)s)")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of where the folder's run stopped")
    parser.add_argument("--repeats", type=int, default=None, help="timed calls at most (default: 5 quick, 11 full)")
    parser.add_argument("--limit", type=float, default=None, help="seconds after which an attempt is given up")
    parser.add_argument("--threads", type=int, default=None, help="threads a worker uses (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list problems, contenders and claims, and do nothing")
    parser.add_argument("--claims", nargs="+", metavar="NAME", help="measure these claims instead of a suite, or: all")


def run(options: argparse.Namespace) -> int:
    """Run what the options ask for and return the exit status.

    Raises:
        ValueError: for an unknown suite, problem, contender or claim (the known ones are named), or bad numbers.
        OSError: if the folder cannot be written to.
    """
    if options.list:
        _list()
        return 0
    if options.claims:
        names = claims.chosen(options.claims)
        writable(options.out)
        return claims_report.measure(names, options.out, threads=options.threads)
    return _suite(options)


def _suite(options: argparse.Namespace) -> int:
    if options.suite not in LIMITS:
        raise ValueError(f"there is no suite {options.suite!r}. Known are: {', '.join(LIMITS)}.")
    for name in ("repeats", "limit", "threads"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be positive, got {value}.")
    chosen = list(dict.fromkeys(options.problem)) if options.problem else problems.names()
    for name in chosen:
        if ":" not in name and name not in problems.names():
            raise ValueError(
                f"there is no problem {name!r}. Known are: {', '.join(problems.names())}; or name your own as "
                "module:function."
            )
    quickly = options.suite == "quick" and not options.contender
    libraries, skipped = pool.chosen([pool.OURS, pool.AUTOGRAD] if quickly else options.contender)
    writable(options.out)
    if skipped:
        print(f"left out, for want of an environment (`make rivals`): {', '.join(skipped)}", file=sys.stderr)
    asked = results.Run(
        suite=options.suite,
        size=options.suite,
        seed=options.seed,
        dtype="float32",
        threads=options.threads or torch.get_num_threads(),
        repeats=options.repeats or (5 if options.suite == "quick" else 11),
    )
    path = options.out / "results.json"
    found = results.opened(path, asked, surroundings.describe, restart=options.restart)
    found.skipped = skipped
    budget, limit = LIMITS[options.suite]
    plan = suite.Plan(
        problems=chosen,
        libraries=libraries,
        methods=options.method,
        budget=budget,
        limit=options.limit or limit,
        own=options.own_method,
    )
    try:
        suite.execute(plan, found)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        found.save()
    print(report.write(found))
    return 0


def _list() -> None:
    print("problems:   ", ", ".join(problems.names()))
    listed = [name if pool.missing(name) is None else f"{name} (make rivals)" for name in [pool.OURS, *pool.rivals()]]
    print("contenders: ", ", ".join(listed))
    print("claims:     ", ", ".join(claims.names()))


def writable(folder: Path) -> None:
    """Make the folder, and raise an OSError that says so if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to the folder {str(folder)!r} ({error.strerror}). Choose another with --out."
        ) from None
