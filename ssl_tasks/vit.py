"""A small vision transformer, pre-norm, with the mean of its patches as features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); attention written out, so that it differentiates twice."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.grow, self.shrink = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens, (n, tokens, dim), one layer on."""
        n, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5, -1)
        x = x + self.project((weights @ v).transpose(1, 2).reshape(n, tokens, dim))
        return x + self.shrink(F.gelu(self.grow(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer; its features are the normed mean over patches.

    Args:
        image_shape: (channels, height, width); `patch` must divide height and width.
        patch: side of a patch; None takes the divisor of both sides nearest to a seventh of the height.
        dim: of the tokens; a multiple of `heads`.
        depth: layers.
        heads: of the attention.

    Raises:
        ValueError: if the patch does not divide the image, or the heads the dimension.
    """

    def __init__(
        self, image_shape: Sequence[int], *, patch: int | None = None, dim: int = 64, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if patch is None:
            both = [p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0]
            patch = min(both, key=lambda p: abs(p - height / 7))
        if height % patch or width % patch:
            raise ValueError(
                f"ViT: patches of {patch} pixels do not divide an image of {height} x {width}; choose "
                "a patch that does, or another image size."
            )
        if dim % heads:
            raise ValueError(f"ViT: dim={dim} is no multiple of heads={heads}.")
        self.patch = nn.Conv2d(channels, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (height // patch) * (width // patch), dim))
        self.layers = nn.Sequential(*(Layer(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.dim = dim

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (n, dim), of images, (n, channels, height, width)."""
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        return self.norm(self.layers(tokens)).mean(1)
