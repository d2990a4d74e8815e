"""The conventional pipeline: pretrain on unlabelled images, then probe or fine-tune on the downstream task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from ssl_tasks import evaluate
from ssl_tasks.datasets import Data
from ssl_tasks.encoders import encoder, projection_head
from ssl_tasks.losses import nt_xent
from ssl_tasks.recipes import Pretraining, Recipe
from ssl_tasks.streams import Views


@dataclass(frozen=True)
class Backbone:
    """A pretrained encoder with the projection head of its pretext loss."""

    encoder: nn.Module
    head: nn.Module


def start(recipe: Pretraining, data: Data, *, seed: int) -> Backbone:
    """Return an encoder and a projection head drawn from `seed`, on the data's device."""
    device = data.pretext.device
    drawn = encoder(recipe.encoder, data.image_shape, widths=recipe.widths, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        head = projection_head(drawn.dim)
    return Backbone(drawn.to(device), head.to(device))


def pretrain(
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    temperature: float,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train `backbone` in place on the contrastive loss and return the loss of every step.

    Adam with a cosine schedule from `learning_rate` to zero. Cost: `steps` gradients.

    Args:
        backbone: trained in place.
        batches: pairs of views, at least `steps` of them.
        steps: optimizer steps.
        learning_rate: of the first step.
        temperature: of the loss.
        advance: called after each step.
    """
    params = [*backbone.encoder.parameters(), *backbone.head.parameters()]
    optimizer = torch.optim.Adam(params, lr=learning_rate)
    losses: list[Tensor] = []
    for step, (first, second) in enumerate(islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss = contrast(backbone, first, second, temperature=temperature)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        advance()
    return [float(loss) for loss in losses]


def contrast(backbone: Backbone, first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """Return the contrastive loss of two views under `backbone`; both views pass in one batch."""
    z = backbone.head(backbone.encoder(torch.cat([first, second])))
    one, other = z.chunk(2)
    return nt_xent(one, other, temperature=temperature)


def views(recipe: Pretraining, data: Data, *, seed: int) -> Views:
    """Return the endless stream of augmented pairs that the pretext trains on."""
    return Views(images=data.pretext, augment=recipe.augment, batch_size=recipe.batch_size, seed=seed)


def pretrained(recipe: Pretraining, data: Data, *, seed: int, advance: Callable[[], None] = lambda: None) -> Backbone:
    """Return a backbone pretrained from scratch by `recipe`, everything drawn from `seed`."""
    backbone = start(recipe, data, seed=seed)
    pretrain(
        backbone,
        views(recipe, data, seed=seed),
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        temperature=recipe.temperature,
        advance=advance,
    )
    return backbone


def measure(trained: nn.Module, data: Data, recipe: Recipe, *, seed: int) -> dict[str, float]:
    """Return the downstream accuracies in percent of an encoder: probe, k-NN, fine-tuned; and its effective rank."""
    return {
        "probe": evaluate.linear_probe(trained, data).test,
        "knn": evaluate.knn(trained, data).test,
        "fine_tuned": evaluate.fine_tune(
            trained,
            data,
            learning_rates=recipe.fine_tune_rates,
            steps=recipe.fine_tune_steps,
            batch_size=min(100, len(data.train)),
            seed=seed,
        ).test,
        "effective_rank": evaluate.effective_rank(evaluate.features(trained, data.test.images)),
    }
