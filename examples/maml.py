"""MAML, first-order MAML and iMAML on few-shot digits: learn where to begin, so that one image a class goes far.

    lower:  for each task of five classes, a classifier trained on its support images, begun at models.meta
    upper:  meta, by the adapted classifiers' loss on query images

Sixteen tasks run under one vmap. MAML differentiates the steps (Unrolled), FOMAML skips their curvature (truncate=0),
iMAML pulls the classifier towards its beginning and differentiates the solution instead (Implicit). Which digits a
task has, and in which order, is drawn anew each time; the test is on images that meta-training has not seen.

Run: python examples/maml.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import hypergrad as hg

WAYS, SHOTS, QUERIES = 5, 1, 10


class Episodes:
    """Batches of few-shot tasks: every tensor leads with the number of tasks."""

    def __init__(self, split: str, num_tasks: int, seed: int) -> None:
        x, y = load_digits(return_X_y=True)
        rows = slice(0, 100) if split == "train" else slice(100, None)
        self.images = [torch.as_tensor(x[y == digit][rows], dtype=torch.float32) / 16 for digit in range(10)]
        self.num_tasks = num_tasks
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        while True:
            tasks = [self.task() for _ in range(self.num_tasks)]
            yield {part: tuple(torch.stack(t) for t in zip(*(task[part] for task in tasks))) for part in tasks[0]}

    def task(self):
        drawn = []
        for label, chosen in enumerate(torch.randperm(len(self.images), generator=self.generator)[:WAYS].tolist()):
            rows = torch.randperm(len(self.images[chosen]), generator=self.generator)[: SHOTS + QUERIES]
            drawn.append((self.images[chosen][rows], torch.full((SHOTS + QUERIES,), label)))
        x, y = (torch.stack(parts) for parts in zip(*drawn))
        return {
            "support": (x[:, :SHOTS].flatten(0, 1), y[:, :SHOTS].flatten()),
            "query": (x[:, SHOTS:].flatten(0, 1), y[:, SHOTS:].flatten()),
        }


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, WAYS))


def support_loss(models, batch):
    x, y = batch
    return cross_entropy(models.learner(x), y)


def proximal_support_loss(models, batch):
    """The same, tied to where the learner began: what makes its solution depend on models.meta (iMAML)."""
    pairs = zip(models.learner.parameters(), models.meta.parameters())
    return support_loss(models, batch) + 0.05 * sum(((w - begun) ** 2).sum() for w, begun in pairs)


def query_loss(models, batch):
    x, y = batch["query"]
    logits = models.learner(x)
    return cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}


def meta_train(method: hg.Method, loss, steps: int, seed: int = 0) -> tuple[float, float]:
    """Return the query accuracy on tasks of unseen images, before and after meta-training."""
    torch.manual_seed(seed)
    learner_net, meta_net = network(), network()
    learner = hg.Problem(
        "learner",
        module=learner_net,
        loss=loss,
        optimizer=torch.optim.SGD(learner_net.parameters(), lr=0.4),
        steps=steps,
        tasks=16,
        chunk=16,
        start=lambda models: dict(models.meta.named_parameters()),
        select=lambda batch, step: batch["support"],
        method=method,
    )

    def engine_over(split: str, lr: float) -> hg.Engine:
        optimizer = torch.optim.Adam(meta_net.parameters(), lr=lr)
        meta = hg.Problem("meta", module=meta_net, loss=query_loss, optimizer=optimizer, data=Episodes(split, 16, seed))
        return hg.Engine([learner, meta])

    def unseen() -> float:
        accuracy = engine_over("test", lr=0.0).run(5)["meta.accuracy"]
        return sum(accuracy) / len(accuracy)

    before = unseen()
    engine_over("train", lr=0.01).run(70)
    return before, unseen()


def main() -> None:
    print("accuracy on new tasks, one image a class")
    for name, method, loss, steps in [
        ("MAML", hg.Unrolled(), support_loss, 3),
        ("FOMAML", hg.Unrolled(truncate=0), support_loss, 3),
        ("iMAML", hg.Implicit(hg.CG(max_steps=5), damping=0.1), proximal_support_loss, 10),
    ]:
        before, after = meta_train(method, loss, steps)
        print(f"{name:8} {before:.3f} -> {after:.3f}")
        assert after > before + 0.08


if __name__ == "__main__":
    main()
