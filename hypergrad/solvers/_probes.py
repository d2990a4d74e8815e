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
_BITS = 32
_AT_ONCE = 1 << 20
"""How many signs are drawn at once, which bounds the memory for integers."""


def signs(size: int, *, seed: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `count` vectors of independent entries +1 and -1 as rows, shape (count, size); one hash serves 32."""
    together = min(_BITS, max(1, _AT_ONCE // max(size, 1)))
    rows = []
    for word in range(max(1, -(-count // _BITS))):
        bits = _hash(size, _key(seed, word), device).to(torch.int32)
        places = torch.arange(min(_BITS, count - _BITS * word), dtype=torch.int32, device=device)
        for some in torch.split(places, together):
            rows.append(((bits >> some.unsqueeze(1)) & 1).to(dtype).mul_(-2).add_(1))
    return torch.cat(rows)


def gaussian(size: int, *, seed: int, stream: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of nearly standard normal entries, shape (size,): sums of four 16-bit uniforms.

    Mean 0, variance 1, excess kurtosis -0.3, largest value 3.5; `stream` numbers the vectors of one seed.
    """
    total = torch.zeros(size, dtype=torch.int64, device=device)
    for word in range(2):
        bits = _hash(size, _key(seed, stream, word), device)
        total = total + (bits >> 16) + (bits & 0xFFFF)
    deviation = math.sqrt(4 * (2.0**32 - 1) / 12)
    return (2 * total - 4 * 0xFFFF).to(dtype) / (2 * deviation)


def _hash(size: int, key: int, device: torch.device) -> Tensor:
    """Return 32 well-mixed bits for each index, as int64, shape (size,)."""
    index = torch.arange(size, dtype=torch.int64, device=device)
    return _mix(_mix((index + (key & _MASK)) & _MASK) ^ (key >> 32))


def _mix(bits: Tensor) -> Tensor:
    """Return a bijective mix of 32-bit integers: xor-shifts and multiplies, constants by C. Wellons."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x21F0AAAD) & _MASK
    bits = bits ^ (bits >> 15)
    bits = (bits * (0xD35A2D97 - (1 << 32))) & _MASK  # the same factor mod 2^32; its product fits in 63 bits
    return bits ^ (bits >> 15)


def _key(*parts: int) -> int:
    """Return 64 bits from some integers, by the finalizer of splitmix64."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
