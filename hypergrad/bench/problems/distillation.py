"""Dataset distillation: learned images, one a class, that train a classifier in K steps.

Reference: T. Wang, J.-Y. Zhu, A. Torralba, A. A. Efros, "Dataset distillation", 2018, arXiv 1811.10959.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion


def logits(lower: Params, x: Tensor) -> Tensor:
    """Return the logits of two convolutions with average pooling and a linear layer."""
    for layer in range(2):
        x = F.conv2d(x, lower[f"{layer}.weight"], lower[f"{layer}.bias"], padding=1)
        x = F.avg_pool2d(F.silu(x), 2)
    return F.linear(x.flatten(1), lower["2.weight"], lower["2.bias"])


def lower_loss(lower: Params, upper: Params, batch: Tensor) -> Tensor:
    """Return the cross-entropy on the learned images; the batch holds their labels."""
    return F.cross_entropy(logits(lower, upper["images"]), batch)


def upper_loss(lower: Params, _upper: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy on real images."""
    return F.cross_entropy(logits(lower, batch[0]), batch[1])


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return the run from a random classifier, the learned images begun at real ones.

    Args:
        size: "full" 30 steps, 16 channels, 28 x 28 pixels; "quick" 10 steps, 8 channels, 14 x 14.
        seed: of the initial parameters.
        dtype: of everything.
    """
    steps, channels, pixels = (30, 16, 28) if size == "full" else (10, 8, 14)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    images, labels = fashion("train", dtype)
    x = F.interpolate(images[:3000, None], (pixels, pixels), mode="area")
    x = (x - 0.286) / 0.353
    first = torch.stack([x[(labels[:3000] == label).nonzero()[0, 0]] for label in range(10)])
    side = pixels // 4
    lower = {
        "0.weight": draw(channels, 1, 3, 3, scale=(2 / 9) ** 0.5),
        "0.bias": torch.zeros(channels, dtype=dtype),
        "1.weight": draw(channels, channels, 3, 3, scale=(2 / (9 * channels)) ** 0.5),
        "1.bias": torch.zeros(channels, dtype=dtype),
        "2.weight": draw(10, channels * side**2, scale=(channels * side**2) ** -0.5),
        "2.bias": torch.zeros(10, dtype=dtype),
    }
    return Task(
        name="distillation",
        kind="unrolled",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower=lower,
        upper={"images": first.clone()},
        lower_batches=[torch.arange(10)] * steps,
        upper_batch=(x[2000:2500], labels[2000:2500]),
        lr=0.05,
        steps=steps,
        momentum=0.5,
    )
