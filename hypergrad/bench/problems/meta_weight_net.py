"""Meta-Weight-Net: a small network maps the loss of an image with a noisy label to its weight in training.

Reference: J. Shu, Q. Xie, L. Yi, Q. Zhao, S. Zhou, Z. Xu, D. Meng, "Meta-Weight-Net: learning an explicit mapping for
sample weighting", NeurIPS 2019, arXiv 1902.07379.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion

Batch = tuple[Tensor, Tensor]


def logits(lower: Params, x: Tensor) -> Tensor:
    """Return the classifier's logits."""
    hidden = F.silu(F.linear(x, lower["0.weight"], lower["0.bias"]))
    return F.linear(hidden, lower["1.weight"], lower["1.bias"])


def lower_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, each image weighted by the network's output for its loss."""
    losses = F.cross_entropy(logits(lower, batch[0]), batch[1], reduction="none")
    hidden = F.softplus(losses.detach()[:, None] * upper["in"] + upper["shift"])
    weights = torch.sigmoid(hidden @ upper["out"] + upper["bias"])
    return (weights * losses).mean()


def upper_loss(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy on clean images."""
    return F.cross_entropy(logits(lower, batch[0]), batch[1])


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return one lower step from the classifier's initial parameters, the look-ahead of the method.

    Args:
        size: "full" a batch of 512, 300 hidden units; "quick" 64 images, 32 units.
        seed: of the noise (two labels in five drawn anew), the initial parameters and the batches.
        dtype: of everything.
    """
    batch, width = (512, 300) if size == "full" else (64, 32)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    images, labels = fashion("train", dtype)
    x = (images.flatten(1) - 0.286) / 0.353
    drawn = torch.randint(10, labels.shape, generator=generator)
    noisy = torch.where(torch.rand(labels.shape, generator=generator) < 0.4, drawn, labels)
    rows = torch.randperm(5000, generator=generator)[:batch]
    lower = {
        "0.weight": draw(width, 784, scale=(2 / 784) ** 0.5),
        "0.bias": torch.zeros(width, dtype=dtype),
        "1.weight": draw(10, width, scale=width**-0.5),
        "1.bias": torch.zeros(10, dtype=dtype),
    }
    upper = {
        "in": draw(100, scale=1.0),
        "shift": torch.zeros(100, dtype=dtype),
        "out": draw(100, scale=0.1),
        "bias": torch.zeros((), dtype=dtype),
    }
    return Task(
        name="meta_weight_net",
        kind="unrolled",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower=lower,
        upper=upper,
        lower_batches=[(x[rows], noisy[rows])],
        upper_batch=(x[5000 : 5000 + batch], labels[5000 : 5000 + batch]),
        lr=0.1,
        steps=1,
        notes="One step, which reads the losses as constants, as the method has it.",
    )
