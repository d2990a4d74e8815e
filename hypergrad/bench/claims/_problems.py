"""The problems that the claims about tasks and long runs are measured on.

A rival's interpreter imports this file as `bench.claims._problems`, so that it imports torch and its neighbours only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problems._episodes import WAYS, Batch, convnet, episodes, logits
from ..problems.base import Params, Task
from ..problems.images import fashion

TASKS, STEPS = 16, 5
RUN, BATCH = 50, 128


def mlp(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:  # noqa: ARG001
    """Return 16 tasks of five classes, one image each, for a network 196-32-32-5 on 14 x 14 pixels; 5 steps."""
    generator = torch.Generator().manual_seed(seed)
    support, query = episodes(TASKS, shots=1, queries=5, pixels=14, generator=generator, dtype=dtype)
    widths = (196, 32, 32, WAYS)
    upper: Params = {}
    for layer, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        drawn = torch.randn((outputs, inputs), generator=generator, dtype=torch.float64) * inputs**-0.5
        upper[f"{layer}.weight"], upper[f"{layer}.bias"] = drawn.to(dtype), torch.zeros(outputs, dtype=dtype)
    return _few_shot("mlp", mlp_loss, upper, support, query)


def mlp_loss(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the fully connected network."""
    x = batch[0].flatten(1)
    for layer in range(2):
        x = F.linear(x, lower[f"{layer}.weight"], lower[f"{layer}.bias"]).relu()
    return F.cross_entropy(F.linear(x, lower["2.weight"], lower["2.bias"]), batch[1])


def convolutions(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:
    """Return the same tasks for three convolutional blocks of 16 channels; pixels 8 x 8, or 28 x 28 as "large"."""
    pixels = 28 if size == "large" else 8
    generator = torch.Generator().manual_seed(seed)
    support, query = episodes(TASKS, shots=1, queries=5, pixels=pixels, generator=generator, dtype=dtype)
    upper = convnet(16, pixels, generator=generator, dtype=dtype)
    return _few_shot("convolutions", convolutions_loss, upper, support, query)


def convolutions_loss(lower: Params, _upper: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the convolutional network."""
    return F.cross_entropy(logits(lower, batch[0]), batch[1])


def tied_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return `mlp_loss` plus the squared distance from where the task began: the lower loss of iMAML."""
    return mlp_loss(lower, upper, batch) + _distance(lower, upper)


def tied_convolutions_loss(lower: Params, upper: Params, batch: Batch) -> Tensor:
    """Return `convolutions_loss` plus the same."""
    return convolutions_loss(lower, upper, batch) + _distance(lower, upper)


def _distance(lower: Params, upper: Params) -> Tensor:
    return torch.stack([(lower[name] - u).square().sum() for name, u in upper.items()]).sum()


def _few_shot(name: str, loss: object, upper: Params, support: Batch, query: Batch) -> Task:
    return Task(
        name=name,
        kind="tasks",
        lower_loss=loss,  # type: ignore[arg-type]
        upper_loss=loss,  # type: ignore[arg-type]
        lower={key: u.clone() for key, u in upper.items()},
        upper=upper,
        lower_batches=[support] * STEPS,
        upper_batch=query,
        lr=0.1,
        steps=STEPS,
    )


def long_run(*, size: str = "full", seed: int = 0, dtype: torch.dtype = torch.float32) -> Task:  # noqa: ARG001
    """Return 50 steps of three convolutional blocks at batch 128, with a learned weight for each training image."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = fashion("train", torch.float64)
    images = ((images[:, None] - 0.286) / 0.353).to(dtype)
    few = labels < WAYS
    images, labels = images[few], labels[few]
    count = 8 * BATCH
    rows = [slice(at, at + BATCH) for at in range(0, count, BATCH)]
    batches = [(images[row], labels[row], torch.arange(count)[row]) for row in rows]

    def weighted(lower: Params, upper: Params, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, which = batch
        losses = F.cross_entropy(logits(lower, x), y, reduction="none")
        return (upper["weights"][which].sigmoid() * losses).mean()

    def plain(lower: Params, _upper: Params, batch: Batch) -> Tensor:
        return F.cross_entropy(logits(lower, batch[0]), batch[1])

    return Task(
        name="long_run",
        kind="unrolled",
        lower_loss=weighted,
        upper_loss=plain,
        lower=convnet(16, 28, generator=generator, dtype=dtype),
        upper={"weights": torch.zeros(count, dtype=dtype)},
        lower_batches=[batches[step % len(batches)] for step in range(RUN)],
        upper_batch=(images[-BATCH:], labels[-BATCH:]),
        lr=0.05,
        steps=RUN,
    )
