"""A transformer fine-tuned under a tie to its pretrained parameters, one learned tie a tensor, one weight an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion

HEADS = 4
TIE = 2.0
Batch = tuple[Tensor, Tensor]
LowerBatch = tuple[Tensor, Tensor, Params]


def logits(lower: Params, patches: Tensor) -> Tensor:
    """Return the logits of one attention block over patches (n, length, pixels), averaged over positions."""
    x = F.linear(patches, lower["embed"]) + lower["position"]
    n, length, width = x.shape
    normed = F.layer_norm(x, (width,), lower["norm1.weight"], lower["norm1.bias"])
    q, k, v = F.linear(normed, lower["qkv"]).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    attention = torch.softmax(q @ k.transpose(-1, -2) * (width // HEADS) ** -0.5, -1)
    x = x + F.linear((attention @ v).transpose(1, 2).reshape(n, length, width), lower["proj"])
    normed = F.layer_norm(x, (width,), lower["norm2.weight"], lower["norm2.bias"])
    x = x + F.linear(F.gelu(F.linear(normed, lower["up"])), lower["down"])
    return F.linear(x.mean(1), lower["head.weight"], lower["head.bias"])


def outputs(lower: Params, _upper: Params, batch: LowerBatch) -> Tensor:
    """Return the logits of the training images."""
    return logits(lower, batch[0])


def criterion(predicted: Tensor, upper: Params, batch: LowerBatch) -> Tensor:
    """Return the mean cross-entropy, each image weighted by twice the sigmoid of its upper variable."""
    losses = F.cross_entropy(predicted, batch[1], reduction="none")
    weights = 2 * torch.sigmoid(upper["weight"])
    return torch.dot(weights, losses) / len(losses)


def penalty(lower: Params, upper: Params, batch: LowerBatch) -> Tensor:
    """Return the squared distances from the pretrained tensors, each times half its own tie."""
    distances = torch.stack([(lower[name] - begun).square().sum() for name, begun in batch[2].items()])
    return 0.5 * torch.dot(upper["log_tie"].exp(), distances)


def lower_loss(lower: Params, upper: Params, batch: LowerBatch) -> Tensor:
    """Return the weighted training loss and the tie."""
    return criterion(outputs(lower, upper, batch), upper, batch) + penalty(lower, upper, batch)


def upper_loss(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy on held-out images."""
    return F.cross_entropy(logits(lower, batch[0]), batch[1])


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return the problem where fine-tuning has ended.

    Args:
        size: "full" width 64, 49 patches of 4 x 4 pixels, 256 images; "quick" width 16, 16 patches of 7 x 7, 32 images.
        seed: of the initial parameters.
        dtype: of everything but the making of the solution, which is in float64.
    """
    width, pixels, count = (64, 4, 256) if size == "full" else (16, 7, 32)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    images, labels = fashion("train", torch.float64)
    patches = ((images - 0.286) / 0.353).unfold(1, pixels, pixels).unfold(2, pixels, pixels).flatten(3).flatten(1, 2)
    length = patches.shape[1]
    begun = {
        "embed": draw(width, pixels**2),
        "position": 0.1 * draw(length, width),
        "norm1.weight": torch.ones(width).double(),
        "norm1.bias": torch.zeros(width).double(),
        "qkv": draw(3 * width, width),
        "proj": draw(width, width),
        "norm2.weight": torch.ones(width).double(),
        "norm2.bias": torch.zeros(width).double(),
        "up": draw(2 * width, width),
        "down": draw(width, 2 * width),
        "head.weight": draw(10, width),
        "head.bias": torch.zeros(10).double(),
    }
    upper = {
        "log_tie": torch.full((len(begun),), TIE).double().log(),
        "weight": torch.zeros(count).double(),
    }
    batch = patches[:count], labels[:count], begun
    lower = _tuned(begun, upper, batch)
    return Task(
        name="transformer",
        kind="implicit",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower={name: w.to(dtype) for name, w in lower.items()},
        upper={name: u.to(dtype) for name, u in upper.items()},
        lower_batches=[(batch[0].to(dtype), batch[1], {name: w.to(dtype) for name, w in begun.items()})],
        upper_batch=(patches[4000 : 4000 + count].to(dtype), labels[4000 : 4000 + count]),
        lr=0.1,
        outputs=outputs,
        criterion=criterion,
        penalty=penalty,
    )


def _tuned(begun: Params, upper: Params, batch: LowerBatch) -> Params:
    """Return the minimizer near the pretrained parameters, by L-BFGS."""
    leaves = {name: w.clone().requires_grad_() for name, w in begun.items()}
    optimizer = torch.optim.LBFGS(
        list(leaves.values()),
        max_iter=100,
        tolerance_grad=1e-7,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = lower_loss(leaves, upper, batch)
        for leaf, g in zip(leaves.values(), torch.autograd.grad(value, list(leaves.values())), strict=True):
            leaf.grad = g
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return {name: w.detach() for name, w in leaves.items()}
