"""iMAML on few-shot tasks from real images: each task's solution is tied to the upper parameters.

Reference: A. Rajeswaran, C. Finn, S. Kakade, S. Levine, "Meta-learning with implicit gradients", NeurIPS 2019,
arXiv 1909.04630.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._episodes import Batch, convnet, episodes, logits
from .base import Params, Task

TIE = 2.0


def lower_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy plus TIE / 2 times the squared distance from the upper parameters."""
    distance = torch.stack([(lower[name] - u).square().sum() for name, u in upper.items()]).sum()
    return F.cross_entropy(logits(lower, batch[0]), batch[1]) + 0.5 * TIE * distance


def upper_loss(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy on the query images."""
    return F.cross_entropy(logits(lower, batch[0]), batch[1])


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return tasks of five classes, run from the upper parameters towards their solutions.

    Args:
        size: "full" 16 tasks, 25 steps, 16 channels, 28 x 28 pixels; "quick" 2 tasks, 25 steps, 4 channels, 14 x 14.
        seed: of tasks and initial parameters.
        dtype: of everything.
    """
    num_tasks, channels, pixels = (16, 16, 28) if size == "full" else (2, 4, 14)
    steps = 25
    generator = torch.Generator().manual_seed(seed)
    support, query = episodes(num_tasks, shots=1, queries=5, pixels=pixels, generator=generator, dtype=dtype)
    upper = convnet(channels, pixels, generator=generator, dtype=dtype)
    return Task(
        name="imaml",
        kind="tasks",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower={name: u.clone() for name, u in upper.items()},
        upper=upper,
        lower_batches=[support] * steps,
        upper_batch=query,
        lr=0.2,
        steps=steps,
        converged=True,
        notes=f"{num_tasks} tasks; the truth is the derivative of their solutions, which {steps} steps approach.",
    )
