"""A progress bar on standard error: tqdm's where it is installed, otherwise one line for each thing done."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


class Bar:
    """A bar of `total` things, for a `with` block.

    Args:
        title: what it is about.
        total: how many things there are.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._what = title, total, 0, ""
        self._bar: Any = None

    def __enter__(self) -> Bar:
        """Return the bar, shown."""
        if importlib.util.find_spec("tqdm") is not None and sys.stderr.isatty():
            self._bar = importlib.import_module("tqdm").tqdm(total=self._total, desc=self._title, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        if self._bar is not None:
            self._bar.close()

    def show(self, what: str) -> None:
        """Show what is being done now."""
        self._what = what
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def advance(self) -> None:
        """Count one thing as done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        else:
            print(f"{self._title} {self._done}/{self._total} {self._what}", file=sys.stderr, flush=True)
