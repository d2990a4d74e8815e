"""What features are worth: a linear probe, nearest neighbours, fine-tuning, how views agree, the directions used."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_tasks.augment import Augmentation, two_views
from ssl_tasks.datasets import Data, Split
from ssl_tasks.encoders import classifier_head
from ssl_tasks.optimizers import cosine
from ssl_tasks.readers import to_float
from ssl_tasks.streams import Labelled


@dataclass(frozen=True)
class Score:
    """A test accuracy in percent, with the option that the validation split chose and its accuracy there."""

    test: float
    validation: float
    chosen: float


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, *, batch_size: int = 1000) -> Tensor:
    """Return the encoder's features of all images, (n, dim), in evaluation mode; the mode is put back."""
    training = encoder.training
    encoder.eval()
    out = torch.cat([encoder(to_float(part)) for part in images.split(batch_size)])
    encoder.train(training)
    return out


def linear_probe(
    encoder: nn.Module,
    data: Data,
    *,
    penalties: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
    max_steps: int = 200,
) -> Score:
    """Return the accuracy of a linear classifier on frozen, standardised features.

    Minimises 1/n sum_i CE(W x_i + b, y_i) + penalty/2 ||W||^2 over W and b by L-BFGS in float64, from zero,
    the strongest penalty first and each solution the next one's start; the validation split chooses the
    penalty, the strongest of equals. Deterministic: nothing is drawn. Cost: at most `max_steps` passes a
    penalty.

    Args:
        encoder: the backbone; left as it is.
        data: whose training, validation and test splits are used.
        penalties: candidates, all positive.
        max_steps: of L-BFGS, for each penalty.

    Returns:
        The test accuracy at the chosen penalty.
    """
    _need(penalties, "penalties")
    raw = {name: features(encoder, split.images).double() for name, split in _splits(data).items()}
    mean, deviation = raw["train"].mean(0), raw["train"].std(0, correction=0).clamp_min(1e-8)
    x = {name: (value - mean) / deviation for name, value in raw.items()}
    weight = torch.zeros(x["train"].shape[1] + 1, data.num_classes, dtype=torch.float64, device=mean.device)
    best: Score | None = None
    for penalty in sorted(penalties, reverse=True):
        weight = _logistic_regression(x["train"], data.train.labels, weight, penalty, max_steps)
        validation = _accuracy(x["validation"] @ weight[1:] + weight[0], data.validation.labels)
        if best is None or validation > best.validation:
            best = Score(_accuracy(x["test"] @ weight[1:] + weight[0], data.test.labels), validation, penalty)
    assert best is not None
    return best


def _logistic_regression(x: Tensor, y: Tensor, start: Tensor, penalty: float, max_steps: int) -> Tensor:
    """Return weights, the intercept in row 0, that minimise the penalised cross-entropy."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_steps,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[1:] + weight[0], y) + 0.5 * penalty * weight[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def knn(encoder: nn.Module, data: Data, *, neighbours: Sequence[int] = (1, 5, 10, 20)) -> Score:
    """Return the accuracy of a vote among the nearest training features; validation chooses how many.

    Each of the k neighbours by cosine votes for its class with its cosine as weight.
    """
    _need(neighbours, "neighbours")
    z = {name: F.normalize(features(encoder, split.images), dim=1) for name, split in _splits(data).items()}
    most = max(neighbours)
    if most > len(data.train):
        raise ValueError(f"{most} neighbours asked for, but there are {len(data.train)} training images.")
    best: Score | None = None
    for k in sorted(neighbours):
        accuracy = {}
        for name, split in (("validation", data.validation), ("test", data.test)):
            cosine, index = (z[name] @ z["train"].T).topk(k, dim=1)
            votes = torch.zeros(len(split), data.num_classes, device=cosine.device, dtype=cosine.dtype)
            accuracy[name] = _accuracy(votes.scatter_add(1, data.train.labels[index], cosine), split.labels)
        if best is None or accuracy["validation"] > best.validation:
            best = Score(accuracy["test"], accuracy["validation"], k)
    assert best is not None
    return best


def fine_tune(
    encoder: nn.Module,
    data: Data,
    *,
    learning_rates: Sequence[float] = (0.01, 0.03, 0.1),
    weight_decays: Sequence[float] = (1e-4,),
    draws: int | None = None,
    steps: int = 200,
    batch_size: int = 100,
    seed: int = 0,
) -> Score:
    """Return the accuracy after training a copy of the encoder and a fresh head on the labels.

    SGD with momentum .9 and a cosine schedule to zero; the head starts at zero. Every candidate starts from the same
    encoder and sees the same batches; the validation split chooses, the smallest learning rate of equals.

    Args:
        encoder: the backbone; copied, left as it is.
        data: whose training, validation and test splits are used.
        learning_rates: candidates.
        weight_decays: candidates, on all parameters; every pair of both is one.
        draws: how many pairs to try, drawn from `seed`; None for all.
        steps: SGD steps for each candidate.
        batch_size: labelled images a step.
        seed: of the batches.

    Returns:
        The test accuracy of the chosen candidate; `chosen` is its learning rate.
    """
    _need(learning_rates, "learning_rates")
    pairs = [(lr, decay) for lr in sorted(learning_rates) for decay in sorted(weight_decays)]
    if draws is not None and draws < len(pairs):
        kept = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:draws]
        pairs = [pairs[k] for k in sorted(kept.tolist())]
    best: Score | None = None
    for lr, decay in pairs:
        head = classifier_head(features(encoder, data.train.images[:1]).shape[1], data.num_classes)
        model = nn.Sequential(copy.deepcopy(encoder), head.to(data.device)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        schedule = cosine(optimizer, steps)
        stream = iter(Labelled(split=data.train, batch_size=batch_size, seed=seed))
        for _ in range(steps):
            images, labels = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        score = {
            name: _accuracy(features(model, split.images), split.labels)
            for name, split in (("validation", data.validation), ("test", data.test))
        }
        if best is None or score["validation"] > best.validation:
            best = Score(score["test"], score["validation"], lr)
    assert best is not None
    return best


def alignment(encoder: nn.Module, images: Tensor, augment: Augmentation, *, seed: int = 0) -> float:
    """Return the mean squared distance of two views' features, scaled to unit length: 0 for views alike, 2 for chance.

    Read it beside `effective_rank`: a collapsed encoder aligns perfectly.

    Reference: Wang and Isola, *Understanding Contrastive Representation Learning through Alignment and Uniformity on
    the Hypersphere*, 2020, arXiv 2005.10242.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    views = two_views(to_float(images), augment, generator)
    first, second = (F.normalize(features(encoder, view), dim=1) for view in views)
    return float((first - second).square().sum(1).mean())


def effective_rank(x: Tensor) -> float:
    """Return exp(-sum_k p_k log p_k), p the singular values of the centred features scaled to sum one.

    Between 1 (a collapsed embedding: one direction) and min(n, dim).

    Reference: Roy and Vetterli, *The effective rank: a measure of effective dimensionality*, EUSIPCO 2007.

    Example:
        >>> import torch
        >>> round(effective_rank(torch.cat([torch.eye(3), -torch.eye(3)]).double()), 6)
        3.0
    """
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    total = values.sum()
    if total == 0:
        return 1.0
    p = values / total
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def plane(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the two leading principal components of the images' features, (n, 2), signs fixed: a map to look at."""
    x = features(encoder, images).double()
    x = x - x.mean(0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return x @ (directions * largest.sign()).T


def _splits(data: Data) -> dict[str, Split]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return 100 * float((scores.argmax(1) == labels).double().mean())


def _need(candidates: Sequence[float], what: str) -> None:
    if not candidates or min(candidates) <= 0:
        raise ValueError(f"{what} needs at least one candidate, all positive; got {tuple(candidates)}.")
