"""One penalty for each weight: thirty regularization strengths of logistic regression, tuned by gradient descent.

    lower:  w*(u) = argmin_w  mean log(1 + exp(-y x.w)) on the training rows  +  1/2 sum_i exp(u_i) w_i^2
    upper:  min_u  the same mean at w*(u) on the validation rows

A grid over thirty strengths is out of the question; the implicit-function theorem costs a few Hessian products. The
last hypergradient is checked against a dense solve, written out by hand.

Run: python examples/regularization.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch.nn.functional import softplus

import hypergrad as hg

torch.set_default_dtype(torch.float64)


def load() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return training, validation and test rows: standardized measurements of cells, labels -1 and 1."""
    x, y = (torch.as_tensor(part, dtype=torch.float64) for part in load_breast_cancer(return_X_y=True))
    x = (x - x.mean(0)) / x.std(0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[rows], 2 * y[rows] - 1) for rows in order.split([100, 200, 269])]


def fit(w, batch):
    x, y = batch
    return softplus(-y * (x @ w)).mean()


def lower_loss(lower, upper, batch):
    return fit(lower["w"], batch) + 0.5 * (upper["log_penalty"].exp() * lower["w"] ** 2).sum()


def upper_loss(lower, upper, batch):
    return fit(lower["w"], batch)


def dense_hypergradient(lower, upper, train, validation):
    """Return -(d_u d_w L)^T (d_w^2 L)^-1 d_w f, with every matrix formed."""
    w, u = lower["w"], upper["log_penalty"]
    hessian = torch.func.hessian(lambda w: lower_loss({"w": w}, {"log_penalty": u}, train))(w)
    mixed = torch.diag(u.exp() * w)
    cotangent = torch.func.grad(fit)(w, validation)
    return -mixed @ torch.linalg.solve(hessian, cotangent)


def main() -> None:
    train, validation, test = load()
    upper = {"log_penalty": torch.full((30,), -3.0)}
    tuner = torch.optim.Adam(upper.values(), lr=0.1)
    optimizer = hg.optim.SGD(lr=0.4, momentum=0.9)
    method = hg.Implicit(hg.CG(max_steps=100, rtol=1e-9))

    lower = {"w": torch.zeros(30)}
    for step in range(40):
        traj = hg.descend(lower_loss, lower, upper, optimizer=optimizer, batches=[train] * 150)
        h = hg.hypergradient(upper_loss, traj, upper, method=method, batch=validation)
        if step == 0:
            print(hg.diagnose(upper_loss, traj, upper, method=method, batch=validation))
            first, first_test = float(h.value), float(fit(traj.end["w"], test))
        upper["log_penalty"].grad = h.grad["log_penalty"]
        lower = traj.end  # the next solve starts where this one ended
        if step < 39:
            tuner.step()

    dense = dense_hypergradient(lower, upper, train, validation)
    error = float((h.grad["log_penalty"] - dense).norm() / dense.norm())
    last_test = float(fit(lower["w"], test))
    print(f"validation loss {first:.4f} -> {float(h.value):.4f}, test loss {first_test:.4f} -> {last_test:.4f}")
    print(f"hypergradient against a dense solve: relative error {error:.1e}")
    assert float(h.value) < 0.8 * first and last_test < first_test
    assert error < 1e-6


if __name__ == "__main__":
    main()
