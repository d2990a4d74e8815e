"""The BiSSL step: a convolutional encoder trained by NT-Xent, tied to the encoder of a downstream task."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion

TIE = 10.0
"""The effective lambda of the proximal term, lambda + delta of the released code."""
TEMPERATURE = 0.5
CHANNELS = (16, 32, 64)
Views = tuple[Tensor, Tensor]


def encode(params: Params, images: Tensor) -> Tensor:
    """Return features: blocks of a strided convolution, group normalization and SiLU, then the mean over pixels."""
    hidden = images
    for block, channels in enumerate(CHANNELS):
        hidden = F.conv2d(hidden, params[f"{block}.weight"], stride=2, padding=1)
        hidden = F.silu(F.group_norm(hidden, channels // 8, params[f"{block}.scale"], params[f"{block}.shift"]))
    return hidden.mean((2, 3))


def nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """Return SimCLR's contrastive loss of two views' embeddings."""
    count = len(first)
    z = F.normalize(torch.cat([first, second]), dim=1)
    itself = torch.eye(2 * count, dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / TEMPERATURE).masked_fill(itself, torch.finfo(z.dtype).min / 2)
    return F.cross_entropy(similarity, torch.arange(2 * count, device=z.device).roll(count))


def pretext_loss(head: Params, lower: Params, upper: Params, batch: Views, tie: float = TIE) -> Tensor:
    """Return the contrastive loss plus tie / 2 times the squared distance of the two encoders."""
    hidden = F.silu(F.linear(encode(lower, torch.cat(batch)), head["0.weight"], head["0.bias"]))
    first, second = F.linear(hidden, head["1.weight"], head["1.bias"]).chunk(2)
    distance = torch.stack([(w - upper[f"encoder.{name}"]).square().sum() for name, w in lower.items()]).sum()
    return nt_xent(first, second) + tie / 2 * distance


def upper_loss(lower: Params, upper: Params, batch: Views) -> Tensor:
    """Return the downstream loss of the head on the lower encoder plus that on its own."""
    images, labels = batch
    own = {name.removeprefix("encoder."): u for name, u in upper.items() if name.startswith("encoder.")}
    below, here = (F.linear(encode(p, images), upper["head.weight"], upper["head.bias"]) for p in (lower, own))
    return F.cross_entropy(below, labels) + F.cross_entropy(here, labels)


def views(images: Tensor, generator: torch.Generator) -> Views:
    """Return two random views of each image: a crop of at least .6 of the side, mirrored or not, its light changed."""

    def view() -> Tensor:
        uniform = torch.rand(5, len(images), generator=generator)
        scale, mirror = 0.6 + 0.4 * uniform[0], 1 - 2 * (uniform[1] < 0.5).float()
        zero, shift = torch.zeros_like(scale), (1 - scale) * (2 * uniform[2:4] - 1)
        rows = [torch.stack([mirror * scale, zero, shift[0]], 1), torch.stack([zero, scale, shift[1]], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        light = (0.4 + 1.2 * uniform[4]).view(-1, 1, 1, 1)
        return (light * F.grid_sample(images, grid, padding_mode="border", align_corners=False)).clamp(0, 1)

    return view(), view()


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32, tie: float = TIE) -> Task:
    """Return the problem at the start of BiSSL's stage: after pretraining, with one pretext batch for the response.

    Args:
        size: "full" 64 images of 28 x 28 pixels in two views and 200 steps of pretraining, "quick" 32 of 14 x 14.
        seed: of the initial parameters, the views and the batches.
        dtype: of everything but the pretraining, which is in float32.
        tie: the effective lambda.
    """
    count, pixels = (64, 28) if size == "full" else (32, 14)
    generator = torch.Generator().manual_seed(seed)
    images, labels = fashion("train")
    images = F.interpolate(images[:, None], (pixels, pixels), mode="area")
    encoder, head = initial(generator)
    pretrain(encoder, head, images[1000:], generator, steps=200 if size == "full" else 50, count=count)
    last = {"head.weight": torch.randn(10, CHANNELS[-1], generator=generator) / 8, "head.bias": torch.zeros(10)}
    upper = {**{f"encoder.{name}": w.clone() for name, w in encoder.items()}, **last}
    batch = views(images[1000 : 1000 + count], generator)
    return Task(
        name="bissl",
        kind="implicit",
        lower_loss=partial(pretext_loss, {name: w.to(dtype) for name, w in head.items()}, tie=tie),
        upper_loss=upper_loss,
        lower={name: w.to(dtype) for name, w in encoder.items()},
        upper={name: u.to(dtype) for name, u in upper.items()},
        lower_batches=[(batch[0].to(dtype), batch[1].to(dtype))],
        upper_batch=(images[:128].to(dtype), labels[:128]),
        lr=0.03,
        momentum=0.9,
    )


def initial(generator: torch.Generator) -> tuple[Params, Params]:
    """Return the parameters of an encoder and of a pretext head."""
    encoder: Params = {}
    for block, (a, b) in enumerate(zip((1, *CHANNELS[:-1]), CHANNELS, strict=True)):
        encoder[f"{block}.weight"] = torch.randn(b, a, 3, 3, generator=generator) * (2 / (9 * a)) ** 0.5
        encoder[f"{block}.scale"], encoder[f"{block}.shift"] = torch.ones(b), torch.zeros(b)
    head: Params = {}
    for layer, (a, b) in enumerate(((CHANNELS[-1], 128), (128, 64))):
        head[f"{layer}.weight"] = torch.randn(b, a, generator=generator) * (2 / a) ** 0.5
        head[f"{layer}.bias"] = torch.zeros(b)
    return encoder, head


def pretrain(
    encoder: Params, head: Params, images: Tensor, generator: torch.Generator, *, steps: int, count: int
) -> None:
    """Train the encoder and the pretext head in place, by Adam on the contrastive loss alone."""
    leaves = [w.requires_grad_() for w in (*encoder.values(), *head.values())]
    anchor = {f"encoder.{name}": w.detach().clone() for name, w in encoder.items()}
    optimizer = torch.optim.Adam(leaves, lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (count,), generator=generator)
        loss = pretext_loss(head, encoder, anchor, views(images[chosen], generator), tie=0.0)
        for w, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            w.grad = grad
        optimizer.step()
    for w in leaves:
        w.requires_grad_(False)
