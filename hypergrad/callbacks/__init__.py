"""Callbacks: told about each step of a run, read-only on the engine."""

from hypergrad.callbacks.base import Callback
from hypergrad.callbacks.checkpoint import Checkpoint
from hypergrad.callbacks.early_stop import EarlyStopping
from hypergrad.callbacks.progress import Progress
from hypergrad.callbacks.tensorboard import TensorBoard

__all__ = ["Callback", "Checkpoint", "EarlyStopping", "Progress", "TensorBoard"]
