"""`python -m ssl_tasks NAME`: run a method against its controls and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ssl_tasks import cli, experiment
from ssl_tasks.system import System


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return the exit status."""
    try:
        how, system = cli.parse(arguments)
        if how.threads is not None:
            torch.set_num_threads(how.threads)
        out = how.out or Path("runs") / system.name
        experiment.run(system.experiment(), how, out, settings(system))
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"ssl_tasks: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"ssl_tasks: {error.strerror or error}{where}. What was finished before is whole, and --resume goes on "
            "from it.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nssl_tasks: interrupted. Finished arms are kept; --resume goes on from them.", file=sys.stderr)
        return 130
    print(f"written: {out / 'results.json'}, {out / 'figure.png'}")
    return 0


def settings(system: System) -> dict[str, Any]:
    """Return the options that decide a result, without paths of the machine."""
    found: dict[str, Any] = {"method": system.name, **asdict(system)}  # type: ignore[call-overload]
    if isinstance(found.get("source"), dict):
        found["source"].pop("folder", None)
    return found


if __name__ == "__main__":
    sys.exit(main())
