"""Probe vectors: deterministic, independent of any generator, and as random as they need to be."""

from __future__ import annotations

import pytest
import torch
from linear_systems import DOUBLE
from torch._subclasses.fake_tensor import FakeTensorMode

from hypergrad.solvers._probes import gaussian, signs

CPU = torch.device("cpu")


def _sign(size, *, seed, stream, dtype, device):
    return signs(size, seed=seed, count=40, dtype=dtype, device=device).select(0, stream)  # fake tensors: no index


@pytest.mark.parametrize("draw", [_sign, gaussian])
def test_moments_and_independence(draw):
    n = 20000
    streams = (0, 1, 31, 32)
    rows = torch.stack([draw(n, seed=s, stream=t, dtype=DOUBLE, device=CPU) for s in range(4) for t in streams])
    bound = 5 / n**0.5  # five standard deviations, times sqrt(2) for squares
    assert (rows.mean(1).abs() < bound).all()
    gram = rows @ rows.T / n
    assert ((gram - torch.eye(16, dtype=DOUBLE)).abs() < 1.5 * bound).all()
    for lag in (1, 2, 16, 256):
        assert ((rows[:, lag:] * rows[:, :-lag]).mean(1).abs() < bound).all()


def test_signs_are_signs_and_gaussian_is_near_normal():
    rows = signs(1000, seed=0, count=70, dtype=DOUBLE, device=CPU)
    assert rows.shape == (70, 1000) and set(rows.flatten().tolist()) == {-1.0, 1.0}
    assert (rows @ rows.T / 1000 - torch.eye(70, dtype=DOUBLE)).abs().max() < 0.18  # 5.7 standard deviations
    normal = gaussian(50000, seed=0, stream=0, dtype=DOUBLE, device=CPU)
    for level, probability in ((1.0, 0.6827), (2.0, 0.9545)):
        assert abs(float((normal.abs() < level).double().mean()) - probability) < 0.02
    assert abs(float((normal**4).mean()) - 2.7) < 0.1


def test_known_values():
    # Changing the hash would change everyone's results: it should be a decision.
    rows = signs(16, seed=0, count=33, dtype=DOUBLE, device=CPU)
    assert ["".join("+" if s > 0 else "-" for s in rows[k]) for k in (0, 32)] == [
        "-----+++-+---+++",
        "-----+-+-+-+-+++",
    ]


def test_how_many_are_drawn_at_once_changes_nothing(monkeypatch):
    want = signs(50, seed=1, count=40, dtype=DOUBLE, device=CPU)
    monkeypatch.setattr("hypergrad.solvers._probes._AT_ONCE", 120)
    assert torch.equal(signs(50, seed=1, count=40, dtype=DOUBLE, device=CPU), want)
    assert torch.equal(signs(50, seed=1, count=3, dtype=DOUBLE, device=CPU), want[:3])


@pytest.mark.parametrize("draw", [_sign, gaussian])
def test_same_everywhere(draw):
    def vector(dtype=DOUBLE):
        return draw(50, seed=3, stream=2, dtype=dtype, device=CPU)

    state = torch.get_rng_state()
    want = vector()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(vector(), want)
    torch.testing.assert_close(vector(torch.float32).double(), want, rtol=1e-7, atol=1e-7)
    got = torch.func.vmap(lambda x: x + vector())(torch.zeros(2, 50, dtype=DOUBLE))
    assert torch.equal(got[1], want)
    compiled = torch.compile(vector, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(compiled(), want)
    with torch.no_grad(), FakeTensorMode():
        fake = draw(50, seed=3, stream=2, dtype=torch.float32, device=torch.device("cuda"))
    assert fake.device.type == "cuda" and fake.shape == (50,)
    longer = draw(70, seed=3, stream=2, dtype=DOUBLE, device=CPU)
    assert torch.equal(longer[:50], want)
