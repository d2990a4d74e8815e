"""MAML on few-shot tasks from real images: the upper parameters are where each task's few steps begin.

Reference: C. Finn, P. Abbeel, S. Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML
2017, arXiv 1703.03400.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._episodes import Batch, convnet, episodes, logits
from .base import Params, Task


def loss(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy: on the support images the lower loss, on the query images the upper one."""
    return F.cross_entropy(logits(lower, batch[0]), batch[1])


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return tasks of five classes, one image each to learn from.

    Args:
        size: "full" 16 tasks, 5 steps, 32 channels, 28 x 28 pixels; "quick" 4 tasks, 3 steps, 8 channels, 14 x 14.
        seed: of tasks and initial parameters.
        dtype: of everything.
    """
    num_tasks, steps, channels, pixels = (16, 5, 32, 28) if size == "full" else (4, 3, 8, 14)
    generator = torch.Generator().manual_seed(seed)
    support, query = episodes(num_tasks, shots=1, queries=5, pixels=pixels, generator=generator, dtype=dtype)
    upper = convnet(channels, pixels, generator=generator, dtype=dtype)
    return Task(
        name="maml",
        kind="tasks",
        lower_loss=loss,
        upper_loss=loss,
        lower={name: u.clone() for name, u in upper.items()},
        upper=upper,
        lower_batches=[support] * steps,
        upper_batch=query,
        lr=0.1,
        steps=steps,
        notes=f"{num_tasks} tasks.",
    )
