"""A run that is watched, interrupted and gone on with: every callback, on regularizing a linear classifier.

    weights:  w*(p) = argmin_w  cross-entropy of X w  +  sum_j exp(p_j) |w_j|^2     on the training rows, by batches
    penalty:  min_p  cross-entropy of X w*(p)                                       on the validation rows

The run is stopped by a file half way, as a cluster would stop it by a signal, and a second engine, built anew, goes on
from the checkpoint. It ends with the same numbers, bit for bit, as a run that nobody stopped.

Run: python examples/watched_run.py
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg

STEPS = 40


class Vector(nn.Module):
    """One number for each pixel."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((size,), -6.0))


def build() -> hg.Engine:
    torch.manual_seed(0)
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x = (x / 16.0).float()
    net, penalty = nn.Linear(64, 10), Vector(64)

    def train_loss(models, batch):
        images, labels = batch
        decay = (models.penalty.values.exp() * models.net.weight**2).sum()
        return F.cross_entropy(models.net(images), labels) + decay

    def validation_loss(models, batch):
        images, labels = batch
        outputs = models.net(images)
        return F.cross_entropy(outputs, labels), {"accuracy": (outputs.argmax(1) == labels).float().mean()}

    sgd = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    adam = torch.optim.Adam(penalty.parameters(), lr=0.1)
    train = DataLoader(TensorDataset(x[:200], y[:200]), batch_size=50, shuffle=True)
    lower = hg.Problem(
        "net", module=net, loss=train_loss, optimizer=sgd, data=train, steps=5, method=hg.Implicit(hg.CG(5))
    )
    upper = hg.Problem("penalty", module=penalty, loss=validation_loss, optimizer=adam, data=[(x[200:900], y[200:900])])
    return hg.Engine([lower, upper], on_nonfinite="rollback")


class StopAt(hg.callbacks.Callback):
    """Touch a file at one step, in the place of a person or a cluster."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_step(self, engine, record):
        if record["step"] == self.step:
            self.file.touch()


def watchers(folder: Path) -> list[hg.callbacks.Callback]:
    callbacks: list[hg.callbacks.Callback] = [
        hg.callbacks.Progress(interval=0.2),
        hg.callbacks.JSONLines(folder / "log.jsonl", every=2),
        hg.callbacks.EarlyStopping("penalty.loss", patience=30),
        hg.callbacks.StopOnRequest(file=folder / "STOP", interval=0.0),
        hg.callbacks.Checkpoint(folder / "checkpoints", every=10, keep=2),
    ]
    if importlib.util.find_spec("tensorboard"):
        callbacks.append(hg.callbacks.TensorBoard(folder / "tensorboard", every=2))
    if importlib.util.find_spec("wandb"):
        callbacks.append(hg.callbacks.WandB(project="hypergrad", mode="offline", dir=str(folder)))
    return callbacks


def main() -> None:
    warnings.filterwarnings("ignore", module="tensorboard")
    undisturbed = build()
    undisturbed.run(STEPS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = build()
        first.run(STEPS, callbacks=[StopAt(16, folder / "STOP"), *watchers(folder)], resume=folder / "checkpoints")
        print(f"stopped after {first.num_steps} of {STEPS} steps")
        second = build()
        history = second.run(STEPS, callbacks=watchers(folder), resume=folder / "checkpoints")
        print(f"went on for {len(history)} steps: validation accuracy {history['penalty.accuracy'][-1]:.3f}")
        subprocess.run([sys.executable, "-m", "hypergrad", "plot", str(folder)], check=True)
        assert (folder / "curves.png").stat().st_size > 10_000
        assert len((folder / "log.jsonl").read_text().splitlines()) == STEPS // 2
    assert first.num_steps < STEPS == second.num_steps
    for one, other in zip(undisturbed.graph.problems.values(), second.graph.problems.values()):
        for key, value in one.module.state_dict().items():
            assert torch.equal(value, other.module.state_dict()[key]), key


if __name__ == "__main__":
    main()
