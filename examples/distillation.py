"""Dataset distillation: ten learned images, one for each digit, that train a classifier in twenty steps.

    lower:  a linear classifier, from zero, twenty steps of gradient descent on the learned images
    upper:  the images, by the classifier's loss on the real training set

The upper gradient flows through all twenty steps: `Unrolled` sweeps back over their states, and stores no activations.

Run: python examples/distillation.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import hypergrad as hg


class Images(nn.Module):
    """One image for each class, begun at a real one."""

    def __init__(self, images) -> None:
        super().__init__()
        self.pixels = nn.Parameter(images.clone())

    def forward(self):
        return self.pixels


def load():
    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x, dtype=torch.float32) / 16, torch.as_tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[rows], y[rows]) for rows in order.split([1200, 597])]


def train_on_images(models, batch):
    return cross_entropy(models.student(models.images()), torch.arange(10))


def loss_on_real_data(models, batch):
    x, y = batch
    logits = models.student(x)
    return cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


def accuracy_after_training_on(images, test, num_steps: int) -> float:
    """Return the test accuracy of a fresh classifier trained on ten images, in plain PyTorch."""
    net = blank()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for _ in range(num_steps):
        optimizer.zero_grad()
        cross_entropy(net(images), torch.arange(10)).backward()
        optimizer.step()
    return float((net(test[0]).argmax(1) == test[1]).float().mean())


def blank() -> nn.Linear:
    net = nn.Linear(64, 10)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def main() -> None:
    train, test = load()
    real = torch.stack([train[0][train[1] == digit][0] for digit in range(10)])
    net, learned = blank(), Images(real)
    student = hg.Problem(
        "student",
        module=net,
        loss=train_on_images,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        steps=20,
        after="restart",  # every upper step trains a classifier from zero
        method=hg.Unrolled(),
    )
    images = hg.Problem(
        "images",
        module=learned,
        loss=loss_on_real_data,
        optimizer=torch.optim.Adam(learned.parameters(), lr=0.03),
        data=[train],
    )
    history = hg.Engine([student, images]).run(100)
    before = accuracy_after_training_on(real, test, 20)
    after = accuracy_after_training_on(learned.pixels.detach(), test, 20)
    print(f"loss on real data {history['images.loss'][0]:.3f} -> {history['images.loss'][-1]:.3f}")
    print(f"test accuracy after training on ten images: real ones {before:.3f}, distilled ones {after:.3f}")
    assert before < 0.8 < 0.9 < after


if __name__ == "__main__":
    main()
