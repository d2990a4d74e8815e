"""The command `hypergrad bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

from hypergrad.bench import claims_report
from hypergrad.bench.claims import catalogue


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder to write to (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=None, help="threads a worker uses (default: PyTorch's choice)")
    parser.add_argument("--claims", nargs="+", metavar="NAME", help="measure these claims instead of a suite, or: all")


def run(options: argparse.Namespace) -> int:
    """Run what the options ask for and return the exit status."""
    if options.claims:
        names = catalogue.chosen(options.claims)
        writable(options.out)
        return claims_report.measure(names, options.out, threads=options.threads)
    raise ValueError("only --claims NAME is available so far.")


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
