"""The conventional pipeline: pretrain on unlabelled images, then probe or fine-tune on the downstream task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ssl_tasks import episodes, evaluate
from ssl_tasks.datasets import Data
from ssl_tasks.encoders import encoder
from ssl_tasks.optimizers import cosine, optimizer_of
from ssl_tasks.pretext import Backbone
from ssl_tasks.recipes import Evaluation, Pretraining
from ssl_tasks.streams import Views

Advance = Callable[..., None]


def start(recipe: Pretraining, data: Data, *, seed: int) -> Backbone:
    """Return an encoder and the heads of its pretext drawn from `seed`, on the data's device."""
    drawn = encoder(recipe.encoder, data.image_shape, widths=recipe.widths or None, norm=recipe.norm, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        begun = recipe.pretext.start(drawn, int(drawn.dim))  # type: ignore[arg-type]
    begun.tower.to(data.device)
    if begun.target is not None:
        begun.target.to(data.device)
    return begun


def pretrain(
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: Pretraining,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    advance: Advance = lambda: None,
) -> list[float]:
    """Train `backbone` in place on the recipe's pretext loss and return the loss of every step.

    Cost: `steps` gradients.

    Args:
        backbone: trained in place.
        batches: pairs of views, at least `steps` of them.
        recipe: the loss, the optimizer and its schedule.
        steps: optimizer steps instead of the recipe's, without warm-up.
        learning_rate: of the first step, instead of the recipe's.
        advance: called after each step.
    """
    total = recipe.steps if steps is None else steps
    rate = recipe.learning_rate if learning_rate is None else learning_rate
    optimizer = optimizer_of(recipe.optimizer, backbone.tower, lr=rate, weight_decay=recipe.weight_decay)
    schedule = cosine(optimizer, total, warm_up=recipe.warm_up if steps is None else 0)
    losses: list[Tensor] = []
    for views in islice(batches, total):
        optimizer.zero_grad()
        loss = recipe.pretext(backbone.tower, views, backbone.target)
        loss.backward()
        optimizer.step()
        schedule.step()
        recipe.pretext.follow(backbone)
        losses.append(loss.detach())
        advance()
    return [float(loss) for loss in losses]


def descend(
    tower: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    recipe: Pretraining,
    *,
    steps: int,
    advance: Advance = lambda: None,
) -> None:
    """Train `tower` in place on `loss(tower, batch)` by the recipe's optimizer, cosine schedule: `steps` gradients."""
    optimizer = optimizer_of(recipe.optimizer, tower, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = cosine(optimizer, steps)
    for batch in islice(batches, steps):
        optimizer.zero_grad()
        loss(tower, batch).backward()
        optimizer.step()
        schedule.step()
        advance()


def views(recipe: Pretraining, data: Data, *, seed: int) -> Views:
    """Return the endless stream of augmented pairs that the pretext trains on."""
    return Views(images=data.pretext, augment=recipe.augment, batch_size=recipe.batch_size, seed=seed)


def pretrained(recipe: Pretraining, data: Data, *, seed: int, advance: Advance = lambda: None) -> Backbone:
    """Return a backbone pretrained from scratch by `recipe`, everything drawn from `seed`."""
    backbone = start(recipe, data, seed=seed)
    pretrain(backbone, views(recipe, data, seed=seed), recipe, advance=advance)
    return backbone


def linear_head(
    encoder: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], data: Data, *, rate: float, steps: int
) -> nn.Linear:
    """Return a linear head (drawn from the global generator) trained by SGD on the frozen encoder's features."""
    head = nn.Linear(int(encoder.dim), data.num_classes).to(data.device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    for images, labels in islice(batches, steps):
        with torch.no_grad():
            features = encoder(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()
        optimizer.step()
    return head


def downstream(trained: nn.Module, data: Data, own: Evaluation, recipe: Pretraining, *, seed: int) -> dict[str, float]:
    """Return what an encoder is worth downstream.

    Accuracies in percent of the linear probe, k-NN, fine-tuning and few-shot episodes; the alignment of two views (0:
    the same features) and the effective rank of the test images' features (1: collapsed).
    """
    found = evaluate.features(trained, data.test.images)
    chosen = evaluate.fine_tune(
        trained,
        data,
        learning_rates=own.rates,
        weight_decays=own.decays,
        draws=own.draws,
        steps=own.steps,
        batch_size=min(own.batch_size, len(data.train)),
        seed=seed,
    )
    return {
        "probe": evaluate.linear_probe(trained, data, penalties=own.penalties).test,
        "knn": evaluate.knn(trained, data).test,
        "fine_tuned": chosen.test,
        "few_shot": episodes.accuracy(
            found, data.test.labels, ways=min(own.ways, data.num_classes), shots=own.shots, count=own.episodes
        ),
        "alignment": evaluate.alignment(trained, data.test.images[:1000], recipe.augment, seed=seed),
        "effective_rank": evaluate.effective_rank(found),
    }
