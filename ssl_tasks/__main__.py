"""`python -m ssl_tasks NAME`: run a method against its controls and report."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
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
        with _alone_or_led(out) as folder:
            experiment.run(system.experiment(), how, folder, settings(system))
            led = folder != out
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
    if not led:
        print(f"written: {out / 'results.json'}, {out / 'figure.png'}")
    return 0


@contextmanager
def _alone_or_led(out: Path) -> Iterator[Path]:
    """Yield the folder to write to: `out`, or one to throw away in a process of `torchrun` that is not the first.

    Every process trains and measures alike; the first one tells. The others begin with what is done already, as it
    does.
    """
    if int(os.environ.get("RANK", "0")) == 0:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        if (out / "seeds").is_dir():
            shutil.copytree(out / "seeds", Path(folder) / "seeds")
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield Path(folder)


def settings(system: System) -> dict[str, Any]:
    """Return the options that decide a result, without paths of the machine."""
    found: dict[str, Any] = {"method": system.name, **asdict(system)}  # type: ignore[call-overload]
    if isinstance(found.get("source"), dict):
        found["source"].pop("folder", None)
    return found


if __name__ == "__main__":
    sys.exit(main())
