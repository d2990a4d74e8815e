"""Callbacks: told about each step of a run, read-only on the engine."""

from hypergrad.callbacks.base import Callback
from hypergrad.callbacks.checkpoint import Checkpoint
from hypergrad.callbacks.early_stop import EarlyStopping
from hypergrad.callbacks.json_lines import JSONLines
from hypergrad.callbacks.progress import Progress
from hypergrad.callbacks.stop_on_request import StopOnRequest
from hypergrad.callbacks.tensorboard import TensorBoard
from hypergrad.callbacks.weights_and_biases import WandB

__all__ = [
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "JSONLines",
    "Progress",
    "StopOnRequest",
    "TensorBoard",
    "WandB",
]
