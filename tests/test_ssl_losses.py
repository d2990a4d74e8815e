"""BYOL, Barlow Twins, VICReg, reconstruction, divergence; LARS, schedules and the layer-wise solver, against sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypergrad.operators import Matrix
from ssl_tasks.layerwise import LayerwiseCG
from ssl_tasks.losses import barlow_twins, byol, divergence, reconstruction, unit, vicreg
from ssl_tasks.optimizers import LARS, cosine
from ssl_tasks.pretext import Pretext

Loss = Callable[[Tensor, Tensor], Tensor]
PAIRS: list[Loss] = [byol, barlow_twins, vicreg, divergence]


def _pair(n: int = 6, d: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def test_byol_equals_its_sum_written_out() -> None:
    p, t = _pair()
    total = sum(float((a / a.norm() - b / b.norm()).square().sum()) for a, b in zip(p, t, strict=True))
    assert float(byol(p, t)) == pytest.approx(total / 6, rel=1e-12)


def test_barlow_twins_equals_its_sum_written_out() -> None:
    a, b = _pair()
    total = 0.0
    for i in range(3):
        for j in range(3):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            c = float((x * y).mean() / (x.square().mean() * y.square().mean()).sqrt())
            total += (1 - c) ** 2 if i == j else 0.1 * c**2
    assert float(barlow_twins(a, b, off_diagonal=0.1)) == pytest.approx(total, rel=1e-9)  # 1e-12 under the root


def test_vicreg_equals_its_sum_written_out() -> None:
    a, b = _pair()
    total = 25 * float(F.mse_loss(a, b))
    for z in (a, b):
        total += 25 / 2 * float((1 - (z.var(0) + 1e-4).sqrt()).clamp_min(0).mean())
        covariance = torch.cov(z.T)
        total += float((covariance - torch.diag(torch.diagonal(covariance))).square().sum()) / 3
    assert float(vicreg(a, b)) == pytest.approx(total, rel=1e-12)


def test_reconstruction_and_divergence_equal_their_sums() -> None:
    out, images = torch.rand(2, 1, 2, 2), torch.rand(2, 1, 2, 2)
    assert float(reconstruction(out, images)) == pytest.approx(float(F.mse_loss(out, images)))
    mask = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    assert float(reconstruction(out, images, mask)) == pytest.approx(float(F.mse_loss(out[:1], images[:1])))
    p, q = _pair()
    expected = F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), reduction="batchmean", log_target=True)
    assert float(divergence(p, q)) == pytest.approx(float(expected)) and float(divergence(p, p)) == 0
    assert float(divergence(p, q, reverse=True)) == pytest.approx(float(divergence(q, p)))


@pytest.mark.parametrize("loss", PAIRS)
def test_losses_have_both_derivatives_and_a_batched_form(loss: Loss) -> None:
    first, second = (z.requires_grad_() for z in _pair(4, 3))
    assert torch.autograd.gradcheck(loss, (first, second)) and torch.autograd.gradgradcheck(loss, (first, second))
    stacked = torch.vmap(loss)(torch.stack([first, second]), torch.stack([second, first]))
    expected = torch.stack([loss(first, second), loss(second, first)])
    torch.testing.assert_close(stacked, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", PAIRS)
def test_losses_refuse_what_is_no_pair(loss: Loss) -> None:
    with pytest.raises(ValueError, match=rf"{loss.__name__} wants two tensors of one shape \(n, d\), got \(2, 3\) and"):
        loss(torch.rand(2, 3), torch.rand(3, 3))


def test_reconstruction_and_byol_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"outputs of the images' shape \(2, 1, 2, 2\), got \(2, 4\)"):
        reconstruction(torch.rand(2, 4), torch.rand(2, 1, 2, 2))
    task = Pretext(loss="byol")
    begun = task.start(torch.nn.Flatten(), 4)
    views = (torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2))
    with pytest.raises(ValueError, match="the byol pretext needs its target network"):
        task(begun.tower, views)


def test_byols_target_follows_and_gets_no_gradient() -> None:
    task = Pretext(loss="byol", decay=0.9)
    begun = task.start(torch.nn.Linear(4, 4), 4)
    assert begun.target is not None
    views = (torch.rand(3, 4), torch.rand(3, 4))
    task(begun.tower, views, begun.target).backward()
    assert all(p.grad is not None for p in begun.tower.parameters())
    assert all(p.grad is None for p in begun.target.parameters())
    before = begun.target.encoder.weight.clone()
    with torch.no_grad():
        begun.tower.encoder.weight.add_(1)
    task.follow(begun, steps=2)
    torch.testing.assert_close(begun.target.encoder.weight, before + (1 - 0.81) * 1.0)


def test_lars_scales_each_weight_to_its_own_norm() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    bias = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1, trust=0.01)
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    d = weight.grad + 0.1 * weight.detach()
    step = 0.01 * 5 / d.norm() * d
    expected = weight.detach() - 0.5 * step
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)
    assert float(bias.detach()) == 0.0  # plain momentum, no decay
    bias.grad = torch.zeros_like(bias)
    optimizer.step()
    assert float(bias.detach()) == pytest.approx(-0.9)
    with pytest.raises(ValueError, match="LARS wants lr >= 0, momentum in"):
        LARS([weight], lr=0.1, momentum=1.0)


def test_the_cosine_rises_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine(optimizer, 6, warm_up=2)
    rates = []
    for _ in range(7):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[4] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[-1] == 0


def test_unit_is_normalize_and_smooth_at_zero() -> None:
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit(z), F.normalize(z, dim=1))
    zero = torch.zeros(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(unit(zero).sum(), zero, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), zero)
    assert not unit(zero).any() and bool(slope.isfinite().all()) and bool(curvature.isfinite().all())


def test_the_layerwise_solver_solves_uncoupled_layers_only() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 2, 4)
    blocks = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in sizes]
    uncoupled = torch.block_diag(*(m @ m.T + 0.5 * torch.eye(len(m), dtype=m.dtype) for m in blocks))
    b = torch.randn(9, generator=generator, dtype=torch.float64)
    found = LayerwiseCG(sizes, 30).solve(Matrix(uncoupled, symmetric=True), b)
    torch.testing.assert_close(found.x, torch.linalg.solve(uncoupled, b), rtol=1e-8, atol=1e-10)
    assert float(found.residual_norm) < 1e-9
    m = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    coupled = m @ m.T + 0.5 * torch.eye(9, dtype=torch.float64)
    wrong = LayerwiseCG(sizes, 30).solve(Matrix(coupled, symmetric=True), b)
    assert float(wrong.residual_norm) == pytest.approx(float((b - coupled @ wrong.x).norm()))
    assert float(wrong.residual_norm) > 1e-3 * float(b.norm())  # and says so
    with pytest.raises(ValueError, match=r"tensors of sizes \(3, 2\) hold 5 numbers, the system has 9"):
        LayerwiseCG((3, 2)).solve(Matrix(coupled, symmetric=True), b)
