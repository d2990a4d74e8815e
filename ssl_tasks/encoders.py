"""Backbones and heads; those for a CPU are small, and smooth enough for second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ssl_tasks.resnet import RESNET18, RESNET50, Norm, ResNet, norm_layer
from ssl_tasks.vit import ViT

EncoderName = Literal["mlp", "convnet", "resnet18", "resnet50", "vit"]
ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)


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
        self, image_shape: Sequence[int], channels: Sequence[int] = (16, 32, 64), *, norm: Norm = "group"
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("ConvNet needs at least one number of channels, got none.")
        blocks: list[nn.Module] = []
        for a, b in pairwise([image_shape[0], *channels]):
            blocks.append(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=norm == "none"))
            blocks += [norm_layer(norm, b), nn.SiLU()]
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


def encoder(
    name: EncoderName,
    image_shape: Sequence[int],
    *,
    widths: Sequence[int] | None = None,
    norm: Norm = "group",
    seed: int,
) -> nn.Module:
    """Return the named encoder, drawn from `seed` alone; its attribute `dim` is the dimension of its features.

    The global generator is left as it was found.

    Args:
        name: "mlp", "convnet", "resnet18", "resnet50" or "vit".
        image_shape: (channels, height, width).
        widths: the MLP's layers or the convnet's channels; of a ResNet the first stage's; of a ViT the dimension and
            the depth. None takes the class's own.
        norm: of the convolutional ones.
        seed: of the initial weights.

    Raises:
        ValueError: for another name, widths that do not fit it, or images too small for it.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; expected one of {', '.join(ENCODERS)}.")
    if name in ("resnet18", "resnet50") and min(image_shape[1:]) < 8:
        raise ValueError(
            f"{name} halves its images three times and wants at least 8 pixels a side, got "
            f"{image_shape[1]} x {image_shape[2]}. Use larger images, 'convnet' or 'mlp'."
        )
    most = {"resnet18": 1, "resnet50": 1, "vit": 2}.get(name)
    if widths is not None and most is not None and len(widths) != most:
        what = "the first stage's channels" if most == 1 else "its dimension and its depth"
        raise ValueError(f"widths of {name} must be {most} number{'s'[: most - 1]}, {what}; got {tuple(widths)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return MLP(image_shape) if widths is None else MLP(image_shape, widths)
        if name == "convnet":
            return ConvNet(image_shape, norm=norm) if widths is None else ConvNet(image_shape, widths, norm=norm)
        if name == "vit":
            return ViT(image_shape) if widths is None else ViT(image_shape, dim=widths[0], depth=widths[1])
        shape = RESNET18 if name == "resnet18" else RESNET50
        return ResNet(image_shape, shape, width=64 if widths is None else widths[0], norm=norm)
