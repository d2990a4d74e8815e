"""Callbacks: told about each step of a run, read-only on the engine."""

from hypergrad.callbacks.base import Callback
from hypergrad.callbacks.progress import Progress

__all__ = ["Callback", "Progress"]
