"""Memory on the CPU that one step frees and the next one needs again."""

from __future__ import annotations

import torch

_LARGEST = (32 << 20) - (64 << 10)  # bytes; the block and its header stay below 32 MiB


def keep_freed_memory() -> None:
    """Let the process keep the memory that tensors of up to 32 MiB free, for the tensors that follow.

    glibc gives large blocks back to the system as soon as they are freed, and the system clears every page again before
    it hands it out: up to a fifth of the time of a step of many tasks. What counts as large grows with the largest
    block freed so far, to 32 MiB at most. Here such a block is asked for and freed, untouched; at most 64 MiB of free
    memory stay with the process. Where the environment sets `MALLOC_...`, or the C library is another, nothing changes.

    Reference: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
