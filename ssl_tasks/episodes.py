"""Few-shot episodes: what a handful of labelled images says about the rest, by the nearest class mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(
    features: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    count: int = 100,
    seed: int = 0,
) -> float:
    """Return the mean accuracy in percent of the nearest class mean over few-shot episodes.

    Each episode draws `ways` classes, `shots` labelled images and up to `queries` others of each; features are centred
    on the mean of all and scaled to unit length, a query goes to the class whose mean support feature has the largest
    cosine.

    Args:
        features: (n, dim).
        labels: (n,).
        ways: classes an episode.
        shots: labelled images a class.
        queries: images to tell apart, a class; fewer where a class has no more.
        count: episodes.
        seed: draws the episodes: the same for every encoder.

    Raises:
        ValueError: if there are fewer classes than `ways` with more than `shots` images.

    Example:
        >>> import torch
        >>> accuracy(torch.eye(2).repeat(20, 1), torch.arange(40) % 2, ways=2, count=3)
        100.0
    """
    of_class = [torch.nonzero(labels == c).flatten().cpu() for c in labels.unique().tolist()]
    usable = [index for index in of_class if len(index) > shots]
    if len(usable) < ways or ways < 2:
        raise ValueError(
            f"episodes of {ways} classes with {shots} labelled images each want at least 2 and as many "
            f"classes with more than {shots} images; there are {len(usable)}."
        )
    z = F.normalize(features - features.mean(0), dim=1)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(count):
        hits = size = 0
        chosen = torch.randperm(len(usable), generator=generator)[:ways].tolist()
        rows = [usable[c][torch.randperm(len(usable[c]), generator=generator)][: shots + queries] for c in chosen]
        means = F.normalize(torch.stack([z[row[:shots]].mean(0) for row in rows]), dim=1)
        for k, row in enumerate(rows):
            hits += int((z[row[shots:]] @ means.T).argmax(1).eq(k).sum())
            size += len(row) - shots
        total += hits / size
    return 100 * total / count
