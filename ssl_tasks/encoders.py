"""Backbones and heads small enough for a CPU, smooth enough for second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """A multilayer perceptron over flattened images; its features are the last layer's activations."""

    def __init__(self, image_shape: Sequence[int], widths: Sequence[int] = (256, 128)) -> None:
        super().__init__()
        if not widths:
            raise ValueError("MLP needs at least one width, got none.")
        sizes = [int(torch.Size(image_shape).numel()), *widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dim = sizes[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (n, dim), of images, (n, channels, height, width)."""
        hidden = images.flatten(1)
        for layer in self.layers:
            hidden = nn.functional.silu(layer(hidden))
        return hidden


class ConvNet(nn.Module):
    """A convnet whose every block halves the image; its features are averages over the last block's pixels.

    `norm` is "group" (no batch statistics: the same function in training and evaluation), "batch" or "none".
    """

    def __init__(
        self, image_shape: Sequence[int], channels: Sequence[int] = (16, 32, 64), *, norm: str = "group"
    ) -> None:
        super().__init__()
        if norm not in ("group", "batch", "none"):
            raise ValueError(f"norm must be 'group', 'batch' or 'none', got {norm!r}.")
        if not channels:
            raise ValueError("ConvNet needs at least one number of channels, got none.")
        blocks: list[nn.Module] = []
        for a, b in pairwise([image_shape[0], *channels]):
            blocks.append(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=norm == "none"))
            if norm == "group":
                blocks.append(nn.GroupNorm(max(1, b // 8), b))
            elif norm == "batch":
                blocks.append(nn.BatchNorm2d(b))
            blocks.append(nn.SiLU())
        self.blocks = nn.Sequential(*blocks)
        self.dim = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (n, dim), of images, (n, channels, height, width)."""
        return self.blocks(images).mean((2, 3))


def projection_head(dim: int, *, hidden: int = 128, out: int = 64) -> nn.Sequential:
    """Return SimCLR's projector: features -> embeddings in which the contrastive loss is taken."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, out))


def classifier_head(dim: int, num_classes: int) -> nn.Linear:
    """Return a linear classifier that starts at zero: every class equally likely, nothing drawn."""
    head = nn.Linear(dim, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def encoder(name: str, image_shape: Sequence[int], *, widths: Sequence[int] | None = None, seed: int) -> MLP | ConvNet:
    """Return the encoder called `name`, "mlp" or "convnet", drawn from `seed` alone.

    The global generator is left as it was found. `widths` are the MLP's layers or the convnet's channels;
    None takes the class's own.

    Raises:
        ValueError: for another name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return MLP(image_shape) if widths is None else MLP(image_shape, widths)
        if name == "convnet":
            return ConvNet(image_shape) if widths is None else ConvNet(image_shape, widths)
    raise ValueError(f"unknown encoder {name!r}; expected 'mlp' or 'convnet'.")
