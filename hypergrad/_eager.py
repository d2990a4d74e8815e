"""User code that `torch.compile` has compiled, run as it was written: what is compiled has no second derivative."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Return whether any of `modules` has been compiled, by `module.compile()` or by `torch.compile(module)`."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # imported by whoever compiles
    if dynamo is None:
        return False
    return any(m._compiled_call_impl is not None or isinstance(m, dynamo.OptimizedModule) for m in modules)


def is_eager() -> bool:
    """Return whether this runs inside `eagerly`."""
    return _depth > 0


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run what has been compiled as it was written; like the compiler's stance, this holds for all threads."""
    global _depth
    with contextlib.nullcontext() if _depth else _stance("force_eager"):
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


_depth = 0
"""How many such contexts are open."""


def compiled_again() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled code runs compiled, also inside `eagerly`."""
    return _stance("default") if _depth else contextlib.nullcontext()


def _stance(stance: str) -> contextlib.AbstractContextManager[Any]:
    try:
        context: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance(stance)
    except RuntimeError:  # inside a function that is compiled in pieces: what is called there is compiled with it
        return contextlib.nullcontext()
    return context


@contextlib.contextmanager
def modules_eagerly() -> Iterator[None]:
    """Run the body eagerly, without the compiler's remarks on hooks around modules."""
    with eagerly(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        yield
