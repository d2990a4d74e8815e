"""Three levels: weights below penalties below a prior, on the diabetes data.

    weights:    w*(p) = argmin_w  1/2 mean (Xw - y)^2 + 1/2 sum_i exp(p_i) w_i^2      on the training rows
    penalties:  p*(c) = argmin_p  1/2 mean (Xw*(p) - y)^2 + 1/20 sum_i (p_i - c)^2    on the first validation rows
    prior:      min_c  1/2 mean (Xw*(p*(c)) - y)^2                                    on the second

Ten penalties tuned on forty rows overfit them; the prior that holds them together is tuned on others. The engine
infers who depends on whom and chains the rules: the prior's gradient passes through the penalties' solution, whose own
curvature passes through that of the weights. The last hypergradient is checked against one by dense linear algebra.

Run: python examples/three_levels.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import hypergrad as hg

torch.set_default_dtype(torch.float64)


class Vector(nn.Module):
    """Numbers to be learned."""

    def __init__(self, size: int, value: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((size,), value))

    def forward(self):
        return self.values


def error(w, rows):
    x, y = rows
    return 0.5 * ((x @ w - y) ** 2).mean()


PRECISE = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-10, "tolerance_change": 1e-14}
"""The levels above rely on the solution: by default L-BFGS ends as soon as it moves by less than 1e-9."""


def weights_loss(models, rows):
    w = models.weights()
    return error(w, rows) + 0.5 * (models.penalties().exp() * w**2).sum()


def penalties_loss(models, rows):
    return error(models.weights(), rows) + 0.05 * ((models.penalties() - models.prior()) ** 2).sum()


def prior_loss(models, rows):
    return error(models.weights(), rows)


def truth(train, first, second, center):
    """Return d prior_loss / d c by solving the weights in closed form and the penalties by Newton's method."""
    x, y = train

    def solution(p):
        return torch.linalg.solve(x.T @ x / len(x) + torch.diag(p.exp()), x.T @ y / len(x))

    def middle(p, c):
        return error(solution(p), first) + 0.05 * ((p - c) ** 2).sum()

    p = center.repeat(10)
    for _ in range(20):
        hessian = torch.func.hessian(middle)(p, center)
        p = p - torch.linalg.solve(hessian, torch.func.grad(middle)(p, center))
    cotangent = torch.func.grad(lambda p: error(solution(p), second))(p)
    mixed = torch.func.jacrev(torch.func.grad(middle), argnums=1)(p, center)
    return -mixed.T @ torch.linalg.solve(hessian, cotangent)


def main() -> None:
    x, y = (torch.as_tensor(part) for part in load_diabetes(return_X_y=True, scaled=False))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, first, second = [(x[rows], y[rows]) for rows in order.split([40, 40, 362])]

    w, p, c = Vector(10, 0.0), Vector(10, 0.0), Vector(1, 0.0)
    weights = hg.Problem(
        "weights",
        module=w,
        loss=weights_loss,
        optimizer=torch.optim.LBFGS(w.parameters(), max_iter=50, **PRECISE),
        data=[train],
        method=hg.Implicit(hg.CG(max_steps=20, rtol=1e-9)),
    )
    penalties = hg.Problem(
        "penalties",
        module=p,
        loss=penalties_loss,
        optimizer=torch.optim.SGD(p.parameters(), lr=4.0, momentum=0.3),
        data=[first],
        steps=10,
        method=hg.Implicit(hg.CG(max_steps=10, rtol=1e-6)),
    )
    prior = hg.Problem(
        "prior", module=c, loss=prior_loss, optimizer=torch.optim.Adam(c.parameters(), lr=0.5), data=[second]
    )
    engine = hg.Engine([weights, penalties, prior])  # lowest level first
    history = engine.run(12)
    center = c.values.detach().clone()
    history.append(engine.step())
    found, expected = c.values.grad, truth(train, first, second, center)
    loss = history["prior.loss"]
    print(f"error on the second validation rows {loss[0]:.4f} -> {loss[-1]:.4f}, prior {float(center):.3f}")
    print(f"hypergradient {float(found):.3e}, by dense linear algebra {float(expected):.3e}")
    print(hg.diagnose(engine))
    assert loss[-1] < loss[0]
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-6)


if __name__ == "__main__":
    main()
