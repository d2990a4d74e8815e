"""One learning rate for each of K steps of gradient descent, learned so that the last iterate is best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion

Batch = tuple[Tensor, Tensor]


def loss(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a perceptron with one hidden layer: the lower loss, and the upper one."""
    hidden = F.silu(F.linear(batch[0], lower["0.weight"], lower["0.bias"]))
    return F.cross_entropy(F.linear(hidden, lower["1.weight"], lower["1.bias"]), batch[1])


def rate(upper: Params, step: int) -> Tensor:
    """Return the learning rate of a step."""
    return upper["log_rate"][step].exp()


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return the run from the initial parameters.

    Args:
        size: "full" 100 steps, batches of 128, 100 hidden units; "quick" 20 steps of 64 images, 32 units.
        seed: of the initial parameters and the batches.
        dtype: of everything.
    """
    steps, batch, width = (100, 128, 100) if size == "full" else (20, 64, 32)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    images, labels = fashion("train", dtype)
    x = (images.flatten(1) - 0.286) / 0.353
    rows = [torch.randint(5000, (batch,), generator=generator) for _ in range(steps)]
    lower = {
        "0.weight": draw(width, 784, scale=(2 / 784) ** 0.5),
        "0.bias": torch.zeros(width, dtype=dtype),
        "1.weight": draw(10, width, scale=width**-0.5),
        "1.bias": torch.zeros(10, dtype=dtype),
    }
    return Task(
        name="learned_rates",
        kind="unrolled",
        lower_loss=loss,
        upper_loss=loss,
        lower=lower,
        upper={"log_rate": torch.full((steps,), 0.05, dtype=dtype).log()},
        lower_batches=[(x[r], labels[r]) for r in rows],
        upper_batch=(x[5000:5500], labels[5000:5500]),
        lr=0.05,
        steps=steps,
        hyper={"lr": rate},
        notes="A learning rate does not move the fixed point: only methods that differentiate the run see it.",
    )
