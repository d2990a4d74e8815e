"""Auxiliary labels: the network that learns two label sets at once, the network that makes one of them up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_tasks.datasets import Split
from ssl_tasks.evaluate import features


class MultiTask(nn.Module):
    """The lower network: an encoder, the primary head, the auxiliary head over the subclasses of every class."""

    def __init__(self, encoder: nn.Module, num_classes: int, subclasses: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.primary = nn.Linear(int(encoder.dim), num_classes)  # type: ignore[arg-type]
        self.auxiliary = nn.Linear(int(encoder.dim), num_classes * subclasses)  # type: ignore[arg-type]


class Generator(nn.Module):
    """The label generator g: an encoder of its own and a score for every subclass of every class."""

    def __init__(self, encoder: nn.Module, num_classes: int, subclasses: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.scores = nn.Linear(int(encoder.dim), num_classes * subclasses)  # type: ignore[arg-type]
        self.subclasses = subclasses

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return q(x, y), (n, classes x subclasses): zero outside the subclasses of each image's own class."""
        scores = self.scores(self.encoder(images)).unflatten(1, (-1, self.subclasses))
        own = F.one_hot(labels, scores.shape[1]).to(scores.dtype)
        return (own.unsqueeze(2) * scores.softmax(2)).flatten(1)


def auxiliary_loss(logits: Tensor, target: Tensor, *, focus: float) -> Tensor:
    """Return the mean of -sum_k q_k (1 - p_k)^focus log p_k, the cross-entropy where `focus` is 0.

    Example:
        >>> import torch
        >>> target = torch.tensor([[0.5, 0.5]])
        >>> round(float(auxiliary_loss(torch.zeros(1, 2), target, focus=0.0)), 4)
        0.6931
    """
    log_p = F.log_softmax(logits, 1)
    focal = (1 - log_p.exp()) ** focus if focus else torch.ones_like(log_p)
    return -(target * focal * log_p).sum(1).mean()


def negative_entropy(target: Tensor) -> Tensor:
    """Return sum_k m_k log m_k of the batch's mean label m: smallest where all subclasses are used alike."""
    mean = target.mean(0)
    return torch.special.xlogy(mean, mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum()


def primary_accuracy(network: MultiTask, split: Split) -> float:
    """Return the accuracy of the primary head in percent."""
    scores = features(nn.Sequential(network.encoder, network.primary), split.images)
    return 100 * float((scores.argmax(1) == split.labels).double().mean())
