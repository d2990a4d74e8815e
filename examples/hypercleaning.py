"""Hyper-cleaning: a third of the training labels are wrong; 200 clean images teach which ones to trust.

    lower:  classifier on the noisy images, each weighted by sigmoid(trust_i)
    upper:  trust, by the classifier's loss on the clean images

The upper loss never mentions the trust: it reaches it through the classifier's response alone.

Run: python examples/hypercleaning.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import hypergrad as hg


class Trust(nn.Module):
    """One number per training image; its sigmoid is the image's weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))

    def forward(self, rows):
        return torch.sigmoid(self.logits[rows])


def load(generator):
    """Return (image, label, row) of 800 noisy rows, 200 clean and 797 test ones, and which labels were corrupted."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x, dtype=torch.float32) / 16, torch.as_tensor(y)
    parts = [(x[rows], y[rows]) for rows in torch.randperm(len(x), generator=generator).split([800, 200, 797])]
    (noisy_x, noisy_y), clean, test = parts
    corrupted = torch.rand(800, generator=generator) < 1 / 3
    shift = torch.randint(1, 10, (800,), generator=generator)
    return (noisy_x, torch.where(corrupted, (noisy_y + shift) % 10, noisy_y), torch.arange(800)), clean, test, corrupted


def classifier_loss(models, batch):
    x, y, rows = batch
    return (models.trust(rows) * cross_entropy(models.classifier(x), y, reduction="none")).mean()


def trust_loss(models, batch):
    x, y = batch
    return cross_entropy(models.classifier(x), y)


def accuracy(net, batch) -> float:
    return float((net(batch[0]).argmax(1) == batch[1]).float().mean())


def main() -> None:
    torch.manual_seed(0)
    noisy, clean, test, corrupted = load(torch.Generator().manual_seed(0))
    net, trust = nn.Linear(64, 10), Trust(800)
    classifier = hg.Problem(
        "classifier",
        module=net,
        loss=classifier_loss,
        optimizer=torch.optim.SGD(net.parameters(), lr=2.0, momentum=0.9, weight_decay=1e-3),
        data=[noisy],
        steps=20,
        method=hg.Implicit(hg.CG(max_steps=20)),
    )
    weights = hg.Problem(
        "trust",
        module=trust,
        loss=trust_loss,
        optimizer=torch.optim.Adam(trust.parameters(), lr=0.3),
        data=[clean],
    )
    plain = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(plain.parameters(), lr=2.0, momentum=0.9, weight_decay=1e-3)
    for _ in range(600):
        optimizer.zero_grad()
        cross_entropy(plain(noisy[0]), noisy[1]).backward()
        optimizer.step()

    engine = hg.Engine([classifier, weights])
    history = engine.run(60)
    learned = trust(torch.arange(800)).detach()
    bad, good = float(learned[corrupted].mean()), float(learned[~corrupted].mean())
    print(hg.diagnose(engine))
    print(f"loss on clean images {history['trust.loss'][0]:.3f} -> {history['trust.loss'][-1]:.3f}")
    print(f"mean weight of corrupted images {bad:.3f}, of clean ones {good:.3f}")
    print(f"test accuracy: all trusted {accuracy(plain, test):.3f}, learned weights {accuracy(net, test):.3f}")
    assert bad < 0.2 < 0.5 < good
    assert accuracy(net, test) > accuracy(plain, test) + 0.02


if __name__ == "__main__":
    main()
