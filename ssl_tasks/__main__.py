"""`python -m ssl_tasks SYSTEM`: run a system against its controls and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ssl_tasks import cli, experiment
from ssl_tasks.recipes import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return the exit status."""
    options = cli.parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        experiment.run(
            options.system,
            _arms(options),
            PRESETS[options.preset].fitted(options.data),
            data=options.data,
            folder=options.folder,
            seeds=range(options.first_seed, options.first_seed + options.seeds),
            out=options.out,
            device=options.device,
            options=options.record(),
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"ssl_tasks: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.out / 'results.json'}, {options.out / 'figure.png'}")
    return 0


def _arms(options: cli.Options) -> dict[str, experiment.Arm]:
    """Return the controls and the arms of the chosen system."""
    if options.system == "bissl":
        from ssl_tasks import bissl

        return {**experiment.controls(), **bissl.arms(options.method)}
    return experiment.controls()


if __name__ == "__main__":
    sys.exit(main())
