"""ResNet-18 and ResNet-50 with a stem for small images; parameter names are those of the usual implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["group", "batch", "none"]


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Return a normalization of `channels` feature maps: groups of 8 or more, batch statistics, or none.

    Raises:
        ValueError: for another name.
    """
    if norm == "group":
        return nn.GroupNorm(min(32, max(1, channels // 8)), channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm must be 'group', 'batch' or 'none', got {norm!r}.")


@dataclass(frozen=True)
class Shape:
    """What distinguishes one ResNet from another: blocks a stage, and whether they are bottlenecks."""

    blocks: tuple[int, ...]
    bottleneck: bool


RESNET18 = Shape((2, 2, 2, 2), bottleneck=False)
RESNET50 = Shape((3, 4, 6, 3), bottleneck=True)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels at the end."""

    def __init__(self, inside: int, width: int, stride: int, *, bottleneck: bool, norm: Norm) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        sizes = [(inside, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        if not bottleneck:
            sizes = [(inside, width, 3, stride), (width, width, 3, 1)]
        self.count = len(sizes)
        for k, (a, b, size, step) in enumerate(sizes, 1):
            self.add_module(f"conv{k}", nn.Conv2d(a, b, size, step, size // 2, bias=norm == "none"))
            self.add_module(f"bn{k}", norm_layer(norm, b))
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != out:
            shortcut = nn.Conv2d(inside, out, 1, stride, bias=norm == "none")
            self.downsample = nn.Sequential(shortcut, norm_layer(norm, out))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + residual(x))."""
        hidden = x
        for k in range(1, self.count + 1):
            hidden = self.get_submodule(f"bn{k}")(self.get_submodule(f"conv{k}")(hidden))
            if k < self.count:
                hidden = F.relu(hidden)
        return F.relu(hidden + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network without its classifier; features are averages over the last stage's pixels.

    Images below 64 pixels get the small stem, one 3x3 convolution without pooling; larger ones the 7x7 stem with stride
    two and a 3x3 maximum pool.

    Args:
        image_shape: (channels, height, width).
        shape: `RESNET18` or `RESNET50`.
        width: channels of the first stage, 64 as published.
        norm: "group" (the same function in training and evaluation), "batch" as published, or "none".
    """

    def __init__(
        self, image_shape: Sequence[int], shape: Shape = RESNET18, *, width: int = 64, norm: Norm = "group"
    ) -> None:
        super().__init__()
        channels, height, _ = image_shape
        self.small = height < 64
        kernel, stride = (3, 1) if self.small else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=norm == "none")
        self.bn1 = norm_layer(norm, width)
        inside = width
        for stage, blocks in enumerate(shape.blocks):
            own = width * 2**stage
            layers: list[nn.Module] = []
            for k in range(blocks):
                step = 2 if stage > 0 and k == 0 else 1
                layers.append(Block(inside, own, step, bottleneck=shape.bottleneck, norm=norm))
                inside = 4 * own if shape.bottleneck else own
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(shape.blocks)
        self.dim = inside
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (n, dim), of images, (n, channels, height, width)."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        if not self.small:
            hidden = F.max_pool2d(hidden, 3, 2, 1)
        for stage in range(1, self.stages + 1):
            hidden = self.get_submodule(f"layer{stage}")(hidden)
        return hidden.mean((2, 3))
