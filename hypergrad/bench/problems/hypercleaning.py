"""Hyper-cleaning: 5,000 images with noisy labels, one weight each, learned so that an MLP fits clean images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Params, Task
from .images import fashion

TIE = 0.05
"""Strength of the penalty that ties the lower parameters to where the round began.

Without it the lower Hessian of a network that is not trained to rounding has slightly negative eigenvalues, and no
implicit hypergradient exists; it is the damping that every practitioner adds, as a part of the problem.
"""
RATE, STEPS = 0.05, 300
Batch = tuple[Tensor, Tensor, Tensor, Params]
"""Indices of the images, the images, their labels, and where the round began."""


def outputs(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the logits of a multilayer perceptron."""
    hidden, last = batch[1], len(lower) // 2 - 1
    for layer in range(last):
        hidden = F.silu(F.linear(hidden, lower[f"{layer}.weight"], lower[f"{layer}.bias"]))
    return F.linear(hidden, lower[f"{last}.weight"], lower[f"{last}.bias"])


def criterion(logits: Tensor, upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, each image weighted by the sigmoid of its upper variable."""
    weights = torch.sigmoid(upper["weight"][batch[0]])
    return (weights * F.cross_entropy(logits, batch[2], reduction="none")).mean()


def penalty(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the squared distance from where the round began, times half of `TIE`."""
    return 0.5 * TIE * torch.stack([(w - batch[3][name]).square().sum() for name, w in lower.items()]).sum()


def lower_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the weighted training loss."""
    return criterion(outputs(lower, upper, batch), upper, batch) + penalty(lower, upper, batch)


def upper_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy on clean images."""
    return F.cross_entropy(outputs(lower, upper, batch), batch[2])


def build(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return the problem where the lower level has been trained on one batch of 512 images.

    Args:
        size: "full" an MLP 784-300-100-10, "quick" 784-50-20-10.
        seed: of the initial parameters and of the noise: two labels in five are drawn anew.
        dtype: of everything.
    """
    sizes = (784, 300, 100, 10) if size == "full" else (784, 50, 20, 10)
    generator = torch.Generator().manual_seed(seed)
    images, labels = fashion("train")
    images = (images.flatten(1) - 0.286) / 0.353
    drawn = torch.randint(10, labels.shape, generator=generator)
    noisy = torch.where(torch.rand(labels.shape, generator=generator) < 0.4, drawn, labels)
    index = torch.arange(512)
    lower: Params = {}
    for layer, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        lower[f"{layer}.weight"] = torch.randn(b, a, generator=generator) * (2 / a) ** 0.5
        lower[f"{layer}.bias"] = torch.zeros(b)
    upper = {"weight": torch.zeros(5000)}
    lower = descended(lower, upper, (index, images[index], noisy[index], {}), steps=STEPS)
    lower = {name: w.to(dtype) for name, w in lower.items()}
    return Task(
        name="hypercleaning",
        kind="implicit",
        lower_loss=lower_loss,
        upper_loss=upper_loss,
        lower=lower,
        upper={name: u.to(dtype) for name, u in upper.items()},
        lower_batches=[(index, images[index].to(dtype), noisy[index], lower)],
        upper_batch=(index, images[5000:].to(dtype), labels[5000:], {}),
        lr=RATE,
        momentum=0.9,
        outputs=outputs,
        criterion=criterion,
        penalty=penalty,
    )


def descended(lower: Params, upper: Params, batch: Batch, *, steps: int) -> Params:
    """Return the parameters after gradient descent, momentum .9; without the penalty where the batch has no centre."""
    leaves = {name: w.clone().requires_grad_() for name, w in lower.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=RATE, momentum=0.9)
    for _ in range(steps):
        loss = criterion(outputs(leaves, upper, batch), upper, batch)
        if batch[3]:
            loss = loss + penalty(leaves, upper, batch)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for w, grad in zip(leaves.values(), grads, strict=True):
            w.grad = grad
        optimizer.step()
    return {name: w.detach() for name, w in leaves.items()}
