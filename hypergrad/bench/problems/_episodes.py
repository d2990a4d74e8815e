"""Few-shot tasks from real images: five classes each, drawn and ordered anew for every task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import fashion

Batch = tuple[Tensor, Tensor]
WAYS = 5


def episodes(
    num_tasks: int, *, shots: int, queries: int, pixels: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Batch, Batch]:
    """Return support and query images (num_tasks, n, 1, pixels, pixels) with their labels (num_tasks, n).

    Args:
        num_tasks: how many tasks.
        shots: support images a class.
        queries: query images a class.
        pixels: height and width.
        generator: of the draws.
        dtype: of the images.
    """
    images, labels = fashion("train", torch.float64)
    images = (F.interpolate(images[:, None], (pixels, pixels), mode="area") - 0.286) / 0.353
    by_class = [images[labels == label] for label in range(10)]
    support: list[Tensor] = []
    query: list[Tensor] = []
    for _ in range(num_tasks):
        drawn = []
        for label in torch.randperm(10, generator=generator)[:WAYS].tolist():
            rows = torch.randperm(len(by_class[label]), generator=generator)[: shots + queries]
            drawn.append(by_class[label][rows])
        support.append(torch.cat([part[:shots] for part in drawn]))
        query.append(torch.cat([part[shots:] for part in drawn]))
    ways = torch.arange(WAYS)
    return (
        (torch.stack(support).to(dtype), ways.repeat_interleave(shots).expand(num_tasks, -1).contiguous()),
        (torch.stack(query).to(dtype), ways.repeat_interleave(queries).expand(num_tasks, -1).contiguous()),
    )


def convnet(channels: int, pixels: int, *, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the initial parameters of `logits`: three blocks and a linear layer.

    Args:
        channels: of each block.
        pixels: height and width of an image.
        generator: of the draws.
        dtype: of the parameters.
    """

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    params: dict[str, Tensor] = {}
    inputs, side = 1, pixels
    for block in range(3):
        params[f"{block}.weight"] = draw(channels, inputs, 3, 3, scale=(2 / (9 * inputs)) ** 0.5)
        params[f"{block}.bias"] = torch.zeros(channels, dtype=dtype)
        inputs, side = channels, side // 2
    params["3.weight"] = draw(WAYS, channels * side**2, scale=(channels * side**2) ** -0.5)
    params["3.bias"] = torch.zeros(WAYS, dtype=dtype)
    return params


def logits(lower: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the logits of the network."""
    for block in range(3):
        x = F.conv2d(x, lower[f"{block}.weight"], lower[f"{block}.bias"], padding=1)
        x = F.avg_pool2d(F.silu(x), 2)
    return F.linear(x.flatten(1), lower["3.weight"], lower["3.bias"])
