"""Logistic regression with one penalty a weight on real images: tops against other clothes, 785 weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion

TOPS = (0, 2, 3, 4, 6)
Batch = tuple[Tensor, Tensor]


def outputs(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the logits."""
    return batch[0] @ lower["weight"] + lower["bias"]


def criterion(logits: Tensor, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, batch[1])


def penalty(lower: Params, upper: Params, _batch: Batch) -> Tensor:
    """Return half the sum of exp(penalty) * weight^2, one penalty a weight."""
    return 0.5 * torch.stack([(upper[name].exp() * weight**2).sum() for name, weight in lower.items()]).sum()


def lower_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the training loss."""
    return criterion(outputs(lower, upper, batch), upper, batch) + penalty(lower, upper, batch)


def upper_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the validation loss."""
    return criterion(outputs(lower, upper, batch), upper, batch)


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float64) -> Task:
    """Return the problem at its lower solution, found by Newton's method to rounding.

    Args:
        size: "full" 3,000 images of 28 x 28 pixels, "quick" 1,000 of 14 x 14.
        seed: of the penalties' logarithms, normal around -7.
        dtype: of everything; the solution is found in float64.
    """
    count, pixels = (3000, 28) if size == "full" else (1000, 14)
    images, labels = fashion("train")
    small = F.interpolate(images[: 2 * count, None], (pixels, pixels), mode="area").flatten(1)
    top = torch.isin(labels[: 2 * count], torch.tensor(TOPS))
    train, validation = ((small[part].to(dtype), top[part].to(dtype)) for part in (slice(count), slice(count, None)))
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (pixels**2,), "bias": ()}
    upper = {n: torch.randn(s, generator=generator, dtype=torch.float64) - 7 for n, s in shapes.items()}
    return Task(
        name="logistic",
        kind="implicit",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower={n: w.to(dtype) for n, w in _solution(upper, train).items()},
        upper={n: u.to(dtype) for n, u in upper.items()},
        lower_batches=[train],
        upper_batch=validation,
        outputs=outputs,
        criterion=criterion,
        penalty=penalty,
    )


def _solution(upper: Params, batch: Batch) -> Params:
    """Return the lower minimizer."""
    design = F.pad(batch[0].double(), (0, 1), value=1.0)
    penalties = torch.cat([upper["weight"], upper["bias"].reshape(1)]).exp()
    w = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(30):
        likely = torch.sigmoid(design @ w)
        slope = design.T @ (likely - batch[1].double()) / len(design) + penalties * w
        if slope.norm() < 1e-14:
            break
        curvature = design.T @ ((likely * (1 - likely) / len(design))[:, None] * design) + torch.diag(penalties)
        w = w - torch.linalg.solve(curvature, slope)
    return {"weight": w[:-1], "bias": w[-1]}
