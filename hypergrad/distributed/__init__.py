"""Losses averaged over the processes of `torch.distributed`."""

from hypergrad.distributed.gather import all_gather
from hypergrad.distributed.ranks import Ranks, active_ranks, world
from hypergrad.distributed.signals import Signal, Signals

__all__ = ["Ranks", "Signal", "Signals", "active_ranks", "all_gather", "world"]
