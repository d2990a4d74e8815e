"""`hypergrad COMMAND` and `python -m hypergrad COMMAND`: one module a command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "bench": ("hypergrad.bench.cli", "accuracy against cost: methods, rivals and your own problem side by side"),
    "plot": ("hypergrad.plot", "the curves of a run, from the lines of JSON that callbacks.JSONLines wrote"),
}
"""Name -> its module, which has `add_arguments(parser)` and `run(options) -> exit status`, and a line of help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name and return the exit status: 2 for a user's mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="hypergrad", description="Hypergradients for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if given[:1] == [name]:
            loaded = importlib.import_module(module)
            loaded.add_arguments(command)
            command.set_defaults(run=loaded.run)
    options = parser.parse_args(given)
    try:
        status: int = options.run(options)
    except (ValueError, OSError) as error:
        print(f"hypergrad {options.command}: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
