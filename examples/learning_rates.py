"""Learned learning rates: one for each of ten steps of gradient descent, tuned so that the last iterate is best.

    lower:  w_{k+1} = w_k - exp(u_k) grad L(w_k)       ten steps of softmax regression on digits
    upper:  min_u  loss of w_10 on other digits

Learning rates do not move the fixed point, so an implicit method would see no derivative at all: it refuses. The run
itself is differentiated, backwards (Unrolled: any number of upper variables) or forwards (ForwardUnrolled: few); both
give the same numbers. On a quadratic the best rates are known: one over each eigenvalue, in any order.

Run: python examples/learning_rates.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import hypergrad as hg

torch.set_default_dtype(torch.float64)
STEPS = 10
HYPER = {"lr": lambda upper, step: upper["log_lr"][step].exp()}


def run(lower_loss, lower, upper, batch) -> hg.Trajectory:
    sgd = hg.optim.SGD(lr=1.0)  # replaced by HYPER at every step
    steps = len(upper["log_lr"])
    return hg.descend(lower_loss, lower, upper, optimizer=sgd, batches=[batch] * steps, hyper=HYPER)


def tune(lower_loss, upper_loss, lower, upper, train, validation, *, num_steps: int, lr: float) -> float:
    tuner = torch.optim.Adam(upper.values(), lr=lr)
    for _ in range(num_steps):
        traj = run(lower_loss, lower, upper, train)
        h = hg.hypergradient(upper_loss, traj, upper, method=hg.Unrolled(), batch=validation)
        upper["log_lr"].grad = h.grad["log_lr"]
        tuner.step()
    return float(upper_loss(run(lower_loss, lower, upper, train).end, upper, validation))


def softmax_regression(lower, upper, batch):
    x, y = batch
    return cross_entropy(x @ lower["w"] + lower["b"], y)


def digits() -> None:
    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x) / 16, torch.as_tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, validation = [(x[rows], y[rows]) for rows in order.split([600, 1197])]
    lower = {"w": torch.zeros(64, 10), "b": torch.zeros(10)}

    def loss_at(rate: float) -> float:
        upper = {"log_lr": torch.full((STEPS,), rate).log()}
        return float(softmax_regression(run(softmax_regression, lower, upper, train).end, upper, validation))

    constant = {rate: loss_at(rate) for rate in (0.5, 1.0, 1.5, 2.0, 3.0)}
    best_lr = min(constant, key=constant.__getitem__)
    upper = {"log_lr": torch.full((STEPS,), best_lr).log()}
    traj = run(softmax_regression, lower, upper, train)
    backward, forward = [
        hg.hypergradient(softmax_regression, traj, upper, method=method, batch=validation).grad["log_lr"]
        for method in (hg.Unrolled(), hg.ForwardUnrolled())
    ]
    learned = tune(softmax_regression, softmax_regression, lower, upper, train, validation, num_steps=40, lr=0.1)
    print(f"digits, loss after {STEPS} steps: constant rate ({best_lr}) {constant[best_lr]:.4f}, learned {learned:.4f}")
    print("learned rates:", " ".join(f"{rate:.2f}" for rate in upper["log_lr"].exp().tolist()))
    assert torch.allclose(backward, forward, rtol=1e-9, atol=1e-12)
    assert learned < 0.85 * constant[best_lr]
    try:
        hg.hypergradient(softmax_regression, traj, upper, method=hg.Implicit(hg.CG()), batch=validation)
    except ValueError as refusal:
        print("Implicit refuses:", refusal)
    else:
        raise AssertionError("an implicit derivative in a learning rate should have been refused")


def quadratic() -> None:
    curvature = torch.tensor([1.0, 3.0, 10.0])

    def loss(lower, upper, batch):
        return 0.5 * (curvature * lower["w"] ** 2).sum()

    upper = {"log_lr": torch.tensor([0.1, 0.2, 0.5]).log()}
    reached = tune(loss, loss, {"w": torch.ones(3)}, upper, None, None, num_steps=250, lr=0.03)
    rates = upper["log_lr"].exp().sort(descending=True).values
    print(f"quadratic: loss {reached:.1e} after 3 steps at rates", " ".join(f"{rate:.4f}" for rate in rates.tolist()))
    assert torch.allclose(rates, 1 / curvature, rtol=1e-2)


if __name__ == "__main__":
    digits()
    quadratic()
