"""Autocast around steps of an optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def uncached_autocast() -> Iterator[None]:
    """Keep an autocast region around the body from casting parameters once and for all.

    It keeps the casts of leaves until it ends, whatever an optimizer does to them in between. Regions that the body
    enters on its own, a loss say, keep theirs as long as they last.
    """
    inside = torch.autocast_increment_nesting() > 1
    torch.autocast_decrement_nesting()
    if not inside:
        yield
        return
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()
