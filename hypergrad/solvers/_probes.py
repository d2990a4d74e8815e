"""Random probe vectors without a random generator: entry i is an integer hash of (seed, stream, i).

The same on every device, inside `vmap`, `torch.compile` and fake tensors, and no generator's state is
touched. All arithmetic is on integers below 2^63 in magnitude, so nothing overflows; both kinds of vector are
exact integers before one final scaling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_AT_ONCE = 1 << 20
"""How many entries are drawn at once, which bounds the memory for integers."""


def rademacher(size: int, *, seed: int, stream: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of independent +1 and -1, shape (size,); `stream` numbers the vectors of one seed."""
    sign = _hash(size, [_key(seed, stream, 0)], device).squeeze(0) >> 31
    return (1 - 2 * sign).to(dtype)


def gaussian(size: int, *, seed: int, stream: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of nearly standard normal entries, shape (size,): sums of four 16-bit uniforms.

    Mean 0, variance 1, excess kurtosis -0.3, largest value 3.5.
    """
    return _gaussian_rows(size, seed, range(stream, stream + 1), dtype, device).squeeze(0)


def gaussian_rows(size: int, *, seed: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the vectors of the first `count` streams of one seed as rows, shape (count, size)."""
    together = max(1, _AT_ONCE // max(size, 1))
    starts = range(0, count, together)
    return torch.cat([_gaussian_rows(size, seed, range(i, min(i + together, count)), dtype, device) for i in starts])


def _gaussian_rows(size: int, seed: int, streams: range, dtype: torch.dtype, device: torch.device) -> Tensor:
    total = torch.zeros(len(streams), size, dtype=torch.int64, device=device)
    for word in range(2):
        bits = _hash(size, [_key(seed, stream, word) for stream in streams], device)
        total = total + (bits >> 16) + (bits & 0xFFFF)
    deviation = math.sqrt(4 * (2.0**32 - 1) / 12)
    return (2 * total - 4 * 0xFFFF).to(dtype) / (2 * deviation)


def _hash(size: int, keys: list[int], device: torch.device) -> Tensor:
    """Return 32 well-mixed bits for each key and index, as int64, shape (len(keys), size)."""
    index = torch.arange(size, dtype=torch.int64, device=device)
    rows = _mix(torch.stack([index + (key & _MASK) for key in keys]) & _MASK)
    return _mix(torch.stack([row ^ (key >> 32) for row, key in zip(rows.unbind(0), keys, strict=True)]))


def _mix(bits: Tensor) -> Tensor:
    """Return a bijective mix of 32-bit integers: xor-shifts and multiplies, constants by C. Wellons."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x21F0AAAD) & _MASK
    bits = bits ^ (bits >> 15)
    bits = (bits * (0xD35A2D97 - (1 << 32))) & _MASK  # the same factor mod 2^32; its product fits in 63 bits
    return bits ^ (bits >> 15)


def _key(seed: int, stream: int, word: int) -> int:
    """Return 64 bits from three integers, by the finalizer of splitmix64."""
    state = 0
    for part in (seed, stream, word):
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
