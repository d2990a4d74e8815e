"""Which problems there are, and how one is built from its name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from .base import Task

Build = Callable[..., Task]

_NOT_PROBLEMS = ("base", "catalogue", "images")


def names() -> list[str]:
    """Return the names of the suite's problems, in alphabetical order: those of the files beside this one."""
    found = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return sorted(name for name in found if name not in _NOT_PROBLEMS and not name.startswith("_"))


def build(name: str, *, size: str = "quick", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return a problem of the suite, or "module:function" called with the same options.

    Args:
        name: one of `names()`, or where a function `build(*, size, seed, dtype) -> Task` is found.
        size: "quick" or "full".
        seed: of all that is random.
        dtype: of the parameters and the data.

    Raises:
        ValueError: for a name that is neither; what is missing is named.
    """
    if ":" in name:
        function = _function(name)
    elif name in names():
        function = cast(Build, importlib.import_module(f".{name}", __package__).build)
    else:
        raise ValueError(
            f"there is no problem {name!r}. Known are: {', '.join(names())}; or name your own as module:function."
        )
    task = function(size=size, seed=seed, dtype=dtype)
    if type(task).__name__ != Task.__name__:
        raise ValueError(f"problem {name!r} must return a Task (hypergrad.bench.problems.base), got {task!r:.80}.")
    return task


def _function(name: str) -> Build:
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"problem {name!r}: module {module!r} cannot be imported ({error}). Run from its folder, or install it."
        ) from None
    if attribute not in vars(loaded):
        raise ValueError(f"problem {name!r}: module {module!r} has no function {attribute!r}.")
    return cast(Build, vars(loaded)[attribute])
