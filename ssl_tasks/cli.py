"""The command line: `python -m ssl_tasks NAME --option ...`, every option a field of the method's dataclass."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any

from ssl_tasks import methods
from ssl_tasks.experiment import Run
from ssl_tasks.system import System


def systems() -> dict[str, type[System]]:
    """Return the commands: every `System` in a file of `ssl_tasks.methods`, by its name."""
    found: dict[str, type[System]] = {}
    for info in iter_modules(methods.__path__):
        module = import_module(f"{methods.__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, System) and value.__module__ == module.__name__:
                found[value.name] = value
    return found


def parse(arguments: Sequence[str] | None = None) -> tuple[Run, System]:
    """Return what `arguments` (default: the process's) ask for; exit with the usage if they do not make sense.

    The preset is looked up first: `--help` shows its values as the defaults.
    """
    import tyro

    given = list(sys.argv[1:] if arguments is None else arguments)
    known = systems()
    if not given or given[0] in ("-h", "--help"):
        print(overview(known))
        raise SystemExit(0 if given else 2)
    name, rest = given[0], given[1:]
    if name not in known:
        print(f"ssl_tasks: unknown method {name!r}; expected one of {', '.join(known)}.", file=sys.stderr)
        raise SystemExit(2)
    presets = known[name].presets()
    preset = _preset(rest) or Run.preset
    if preset not in presets:
        print(f"ssl_tasks: {name} has no preset {preset!r}; expected one of {', '.join(presets)}.", file=sys.stderr)
        raise SystemExit(2)
    bare = tyro.conf.arg(name="")
    fields: list[Any] = [
        ("run", Annotated[Run, bare], Run(preset=preset)),
        ("system", Annotated[known[name], bare], presets[preset]),
    ]
    command: Any = make_dataclass("Command", fields, frozen=True)
    said: Any = tyro.cli(
        command,
        args=rest,
        prog=f"python -m ssl_tasks {name}",
        description=known[name].about,
    )
    return said.run, said.system


def overview(known: dict[str, type[System]]) -> str:
    """Return what `--help` prints before a method is chosen."""
    width = max(len(name) for name in known)
    lines = [f"  {name.ljust(width)}  {system.about}" for name, system in known.items()]
    return "\n".join(
        [
            "usage: python -m ssl_tasks NAME [--preset small] [--seeds 2] [--resume] [options]",
            "",
            "Self-supervised systems on real images, built on hypergrad. Every run prints a table and writes",
            "results.json, figures and backbones into --out. `NAME --help` explains every option.",
            "",
            *lines,
        ]
    )


def _preset(arguments: Sequence[str]) -> str | None:
    """Return what follows the last --preset."""
    for k in range(len(arguments) - 1, -1, -1):
        if arguments[k] == "--preset" and k + 1 < len(arguments):
            return arguments[k + 1]
        if arguments[k].startswith("--preset="):
            return arguments[k].split("=", 1)[1]
    return None
