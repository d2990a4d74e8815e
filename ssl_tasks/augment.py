"""Random views of a batch, each sample with its own draw, on whatever device the batch lives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Uniform = Callable[[float, float], Tensor]
"""(low, high) -> one draw for each sample, (n, 1, 1, 1)."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Crop-and-resize, flip, rotation, brightness, contrast, colour, blur, cutout and noise, drawn for each sample.

    One affine map a sample, sampled bilinearly, does crop, flip and rotation together; then
    x <- c (x - mean(x)) + mean(x) + b with contrast c and brightness b, colours drawn towards or away from grey, a mix
    with a 3x3 binomial blur, a square hole, noise, and a cut to [0, 1]. Cost: about eight passes over the batch, no
    loop over samples.

    Attributes:
        min_scale: the crop's side is uniform in [min_scale, 1] of the image's; 1 switches crops off.
        flip: whether half of the samples are mirrored left to right.
        rotation: the largest angle in degrees, either way.
        brightness: b is uniform in [-brightness, brightness].
        contrast: c is uniform in [1 - contrast, 1 + contrast].
        saturation: colours are multiplied by s about the grey image, s uniform in [1 - saturation, 1 + saturation].
        grayscale: the share of samples that lose their colours.
        blur: the largest share of the blurred image in the mix.
        cutout: the hole's side as a share of the image's; 0 switches it off.
        noise: standard deviation of Gaussian noise.

    Example:
        >>> import torch
        >>> images = torch.rand(8, 1, 28, 28)
        >>> generator = torch.Generator().manual_seed(0)
        >>> first, second = two_views(images, Augmentation(), generator)
        >>> first.shape, bool((first != second).any())
        (torch.Size([8, 1, 28, 28]), True)
    """

    min_scale: float = 0.6
    flip: bool = True
    rotation: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.4
    saturation: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.5
    cutout: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must lie in (0, 1], got {self.min_scale}.")
        for name in ("rotation", "brightness", "contrast", "saturation", "grayscale", "blur", "cutout", "noise"):
            value = float(vars(self)[name])
            most = math.inf if name in ("rotation", "noise") else 1.0
            if not 0 <= value <= most:
                raise ValueError(f"{name} must lie in [0, {most:g}], got {value}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return one random view of each image, (n, channels, height, width), values in [0, 1].

        Args:
            images: float images in [0, 1].
            generator: the only source of randomness; on the images' device.
        """
        n = images.shape[0]

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(n, 1, 1, 1, device=images.device).uniform_(low, high, generator=generator)

        out = self._warp(images, uniform)
        if self.brightness or self.contrast:
            mean = out.mean((1, 2, 3), keepdim=True)
            contrast = uniform(1 - self.contrast, 1 + self.contrast)
            out = contrast * (out - mean) + mean + uniform(-self.brightness, self.brightness)
        if (self.saturation or self.grayscale) and images.shape[1] > 1:
            grey = out.mean(1, keepdim=True)
            colour = uniform(1 - self.saturation, 1 + self.saturation)
            colour = torch.where(uniform(0, 1) < self.grayscale, 0.0, colour)
            out = grey + colour * (out - grey)
        if self.blur:
            share = uniform(0, self.blur)
            out = out + share * (blurred(out) - out)
        if self.cutout:
            out = out * self._outside_hole(out, uniform)
        if self.noise:
            out = out + self.noise * torch.randn(out.shape, device=out.device, generator=generator)
        return out.clamp(0, 1)

    def _warp(self, images: Tensor, uniform: Uniform) -> Tensor:
        scale = uniform(self.min_scale, 1.0).flatten()
        room = 1 - scale
        dx, dy = room * uniform(-1, 1).flatten(), room * uniform(-1, 1).flatten()
        mirror = torch.where(uniform(0, 1).flatten() < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(scale)
        angle = uniform(-self.rotation, self.rotation).flatten() * (math.pi / 180)
        cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
        rows = [torch.stack([mirror * cos, -sin, dx], 1), torch.stack([mirror * sin, cos, dy], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)

    def _outside_hole(self, images: Tensor, uniform: Uniform) -> Tensor:
        """Return 0 inside each sample's square hole and 1 outside."""
        height, width = images.shape[-2:]
        y = (torch.arange(height, device=images.device) + 0.5).view(1, 1, -1, 1) / height
        x = (torch.arange(width, device=images.device) + 0.5).view(1, 1, 1, -1) / width
        half = self.cutout / 2
        inside = ((y - uniform(0, 1)).abs() < half) & ((x - uniform(0, 1)).abs() < half)
        return 1.0 - inside.to(images.dtype)


def blurred(images: Tensor) -> Tensor:
    """Return images convolved with the 3x3 binomial kernel (1 2 1)/4 x (1 2 1)/4, edges repeated."""
    channels = images.shape[1]
    line = torch.tensor([0.25, 0.5, 0.25], device=images.device, dtype=images.dtype)
    kernel = (line[:, None] * line[None, :]).expand(channels, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)


def two_views(images: Tensor, augment: Augmentation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return two independent random views of each image."""
    both = augment(torch.cat([images, images]), generator)
    first, second = both.chunk(2)
    return first, second
