"""Differentiable optimizers: immutable values with a pure `init` and `update` on one flat vector."""

from hypergrad.optim.adadelta import Adadelta
from hypergrad.optim.adagrad import Adagrad
from hypergrad.optim.adam import Adam, AdamW
from hypergrad.optim.adamax import Adamax
from hypergrad.optim.base import Decay, Hyper, LearningRate, Optimizer, State
from hypergrad.optim.binding import bind
from hypergrad.optim.bound import Bound, BoundHyper
from hypergrad.optim.clip import clip_norm, clip_value
from hypergrad.optim.nadam import NAdam
from hypergrad.optim.opaque import Opaque
from hypergrad.optim.radam import RAdam
from hypergrad.optim.rmsprop import RMSprop
from hypergrad.optim.sgd import SGD
from hypergrad.optim.torch_bridge import (
    FromTorch,
    decay_of,
    from_torch,
    read_options,
    read_state,
    replace_options,
)

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Bound",
    "BoundHyper",
    "Decay",
    "FromTorch",
    "Hyper",
    "LearningRate",
    "NAdam",
    "Opaque",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "State",
    "bind",
    "clip_norm",
    "clip_value",
    "decay_of",
    "from_torch",
    "read_options",
    "read_state",
    "replace_options",
]
