"""Ridge regression with one penalty a feature on real images: closed form, well-conditioned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion

Batch = tuple[Tensor, Tensor]


def outputs(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the predictions."""
    return batch[0] @ lower["weight"]


def criterion(predictions: Tensor, _upper: Params, batch: Batch) -> Tensor:
    """Return half the mean squared error."""
    return 0.5 * (predictions - batch[1]).square().mean()


def penalty(lower: Params, upper: Params, _batch: Batch) -> Tensor:
    """Return half the sum of exp(penalty) * weight^2."""
    return 0.5 * (upper["penalty"].exp() * lower["weight"].square()).sum()


def lower_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the penalized error on the training images."""
    return criterion(outputs(lower, upper, batch), upper, batch) + penalty(lower, upper, batch)


def upper_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the error on held-out images."""
    return criterion(outputs(lower, upper, batch), upper, batch)


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float64) -> Task:
    """Return the problem at its solution w = (X^T X / n + diag(exp(u)))^-1 X^T y / n.

    Args:
        size: "full" 2,000 images of 28 x 28 pixels, "quick" 500 of 14 x 14. The label is whether it is a top.
        seed: of the penalties' logarithms, normal around log(0.1).
        dtype: of everything but the solution's making, which is in float64.
    """
    count, pixels = (2000, 28) if size == "full" else (500, 14)
    images, labels = fashion("train", torch.float64)
    images = F.interpolate(images[: 2 * count, None], (pixels, pixels), mode="area").flatten(1)
    x, held = (images - images.mean(0)).chunk(2)
    targets = torch.where((labels[: 2 * count, None] == torch.tensor([0, 2, 4, 6])).any(1), 1.0, -1.0).double()
    y, held_y = targets.chunk(2)
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(pixels**2, generator=generator, dtype=torch.float64) - 2.3
    matrix = x.T @ x / count + torch.diag(u.exp())
    weight = torch.linalg.solve(matrix, x.T @ y / count)
    cotangent = held.T @ (held @ weight - held_y) / count
    reference = {"penalty": -u.exp() * weight * torch.linalg.solve(matrix, cotangent)}
    values = torch.linalg.eigvalsh(matrix)
    return Task(
        name="ridge",
        kind="implicit",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower={"weight": weight.to(dtype)},
        upper={"penalty": u.to(dtype)},
        lower_batches=[(x.to(dtype), y.to(dtype))],
        upper_batch=(held.to(dtype), held_y.to(dtype)),
        lr=float(1 / values[-1]),
        outputs=outputs,
        criterion=criterion,
        penalty=penalty,
        reference=reference,
        notes=f"Condition number {float(values[-1] / values[0]):.0f}.",
    )
