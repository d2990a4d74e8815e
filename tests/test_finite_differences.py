"""Unrolled hypergradients of every optimizer equal finite differences of the run itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad as hg
from hypergrad import optim
from hypergrad.testing import relative_error

Params = dict[str, Tensor]
F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(7, 3, generator=GENERATOR, dtype=F64)
Y = torch.randn(7, generator=GENERATOR, dtype=F64)
LOWER = {"a": torch.tensor([[0.9], [-0.6], [0.5]], dtype=F64), "b": torch.tensor(0.3, dtype=F64)}
UPPER = {"scale": torch.tensor([0.2, -0.4, 0.3], dtype=F64), "decay": torch.tensor(-1.0, dtype=F64)}
STEPS = 8

CASES: dict[str, optim.Optimizer] = {
    "SGD": optim.SGD(0.05, weight_decay=0.1),
    "SGD-momentum": optim.SGD(0.05, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "SGD-nesterov": optim.SGD(0.05, momentum=0.8, nesterov=True),
    "SGD-maximize": optim.SGD(0.02, momentum=0.5, maximize=True, weight_decay=0.3),
    "SGD-schedule": optim.SGD(lambda step: 0.1 / (1 + step)),
    "Adam": optim.Adam(0.05, weight_decay=0.1, eps=1e-3),
    "Adam-amsgrad": optim.Adam(0.05, betas=(0.5, 0.6), amsgrad=True, maximize=True, eps=1e-3),
    "Adam-decoupled": optim.Adam(0.05, weight_decay=0.2, decoupled_weight_decay=True, eps=1e-3),
    "AdamW": optim.AdamW(0.05, weight_decay=0.2, eps=1e-3),
    "NAdam": optim.NAdam(0.05, weight_decay=0.1, eps=1e-3),
    "RAdam": optim.RAdam(0.05, weight_decay=0.1, eps=1e-3),
    "RMSprop": optim.RMSprop(0.02, eps=1e-3, weight_decay=0.1),
    "RMSprop-centered": optim.RMSprop(0.02, alpha=0.8, centered=True, momentum=0.7, eps=1e-2),
    "Adagrad": optim.Adagrad(0.1, lr_decay=0.1, eps=1e-3, weight_decay=0.1),
    "Adadelta": optim.Adadelta(1.0, eps=1e-3, weight_decay=0.1),
    "Adamax": optim.Adamax(0.05, eps=1e-3, weight_decay=0.1),
}

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip-norm": {"clip_norm": 0.4},
    "clip-value": {"clip_value": 0.25},
    "project": {
        "project": lambda w: {"a": w["a"] / (1 + w["a"].square().sum()).sqrt(), "b": w["b"].clamp(-0.35, 0.35)}
    },
    "start": {"start": lambda u: {"a": u["scale"].view(3, 1) + 0.5, "b": u["decay"] * 0.3}},
    "hyper": {"hyper": {"lr": lambda u: 0.04 * u["decay"].exp() + 0.01}},
}


def lower_loss(w: Params, u: Params, batch: Any) -> Tensor:
    rows = slice(batch, batch + 4)
    residual = torch.tanh(X[rows] @ w["a"] + w["b"]).squeeze(1) - Y[rows]
    return (residual**2).mean() + (u["scale"].exp() * w["a"].squeeze(1) ** 2).sum() * u["decay"].exp()


def upper_loss(w: Params, u: Params, batch: Any) -> Tensor:
    return ((X @ w["a"] + w["b"]).squeeze(1) - Y).square().mean() + 0.1 * (u["scale"] ** 2).sum()


def run(upper: Params, optimizer: Any, method: hg.Method | None = None, **options: Any) -> hg.Trajectory:
    batches = [k % 3 for k in range(STEPS)]
    recording = None if method is None else method.recording(STEPS)
    options.setdefault("lower_loss", lower_loss)
    loss = options.pop("lower_loss")
    lower = options.pop("lower", LOWER)
    return hg.descend(loss, lower, upper, optimizer=optimizer, batches=batches, recording=recording, **options)


def differences(optimizer: Any, upper: Params = UPPER, **options: Any) -> Params:
    """Return the derivative by central differences of the fourth order."""

    def value(name: str, index: int, shift: float) -> Tensor:
        moved = {n: u.clone() for n, u in upper.items()}
        moved[name].view(-1)[index] += shift
        return upper_loss(run(moved, optimizer, **options).end, moved, None)

    h = 1e-3

    def slope(name: str, index: int) -> Tensor:
        near = value(name, index, h) - value(name, index, -h)
        far = value(name, index, 2 * h) - value(name, index, -2 * h)
        return (8 * near - far) / (12 * h)

    return {n: torch.stack([slope(n, k) for k in range(u.numel())]).view(u.shape) for n, u in upper.items()}


def gradient(trajectory: hg.Trajectory, method: hg.Method) -> Params:
    return hg.hypergradient(upper_loss, trajectory, UPPER, method=method).grad


@pytest.mark.parametrize("name", CASES)
def test_every_optimizer(name: str) -> None:
    expected = differences(CASES[name])
    assert relative_error(gradient(run(UPPER, CASES[name]), hg.Unrolled()), expected) < 1e-6


@pytest.mark.parametrize("options", [k for k in RUNS if k != "plain"])
@pytest.mark.parametrize("name", ["SGD-momentum", "Adam", "RMSprop-centered"])
def test_what_surrounds_a_step(name: str, options: str) -> None:
    expected = differences(CASES[name], **RUNS[options])
    assert relative_error(gradient(run(UPPER, CASES[name], **RUNS[options]), hg.Unrolled()), expected) < 1e-6


THINNED = [
    hg.Unrolled(checkpoint="sqrt"),
    hg.Unrolled(checkpoint=1),
    hg.Unrolled(checkpoint=3),
    hg.Unrolled(checkpoint=100),
    hg.Unrolled(retain=1.0),
    hg.Unrolled(retain=0.4),
    hg.Unrolled(retain=0.5, checkpoint=3),
]


@pytest.mark.parametrize("method", THINNED, ids=lambda m: f"{m.checkpoint}-{m.retain}")
@pytest.mark.parametrize("name", ["SGD-momentum", "Adam-amsgrad", "RAdam"])
def test_checkpoints_and_tapes_change_nothing(name: str, method: hg.Unrolled) -> None:
    expected = gradient(run(UPPER, CASES[name]), hg.Unrolled())
    thinned = run(UPPER, CASES[name], method)
    for _ in range(2):  # the record serves more than one sweep
        assert relative_error(gradient(thinned, method), expected) < 1e-14
    kept = sum(step.flat is not None for step in thinned.steps)
    tapes = sum(step.taped is not None for step in thinned.steps)
    assert tapes == round(method.retain * STEPS)
    if method.checkpoint is not None:
        spacing = 2 if method.checkpoint == "sqrt" else method.checkpoint
        assert kept <= tapes + 1 + (STEPS + spacing - 1) // spacing


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, "plain") for name in CASES] + [(n, o) for n in ("SGD-momentum", "Adam") for o in RUNS if o != "plain"],
)
def test_forward_mode_equals_reverse_mode(name: str, options: str) -> None:
    trajectory = run(UPPER, CASES[name], **RUNS[options])
    forward, reverse = (gradient(trajectory, m) for m in (hg.ForwardUnrolled(), hg.Unrolled()))
    assert relative_error(forward, reverse) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_coordinates_whose_gradient_is_exactly_zero(name: str) -> None:
    """A constant pixel: its weight has gradient 0 in every step, and no derivative may become NaN by it."""

    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        masked = {"a": w["a"] * torch.tensor([[1.0], [0.0], [1.0]], dtype=F64), "b": w["b"]}
        return lower_loss(masked, u, batch)

    bare = type(CASES[name])(**{**vars(CASES[name]), "weight_decay": 0.0})
    trajectory = run(UPPER, bare, lower_loss=loss)
    expected = differences(bare, lower_loss=loss)
    for method in (hg.Unrolled(), hg.ForwardUnrolled()):
        assert relative_error(gradient(trajectory, method), expected) < 1e-6
    taped = {n: u.clone().requires_grad_() for n, u in UPPER.items()}
    value = upper_loss(hg.best_response(trajectory, taped, method=hg.Unrolled()), taped, None)
    grads = torch.autograd.grad(value, list(taped.values()), create_graph=True)
    assert relative_error({n: g.detach() for n, g in zip(taped, grads, strict=True)}, expected) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_a_continued_state(name: str) -> None:
    """The state of an earlier run is a constant of the later one, which goes on as one long run would."""
    first = run(UPPER, CASES[name])
    second = run(UPPER, CASES[name], state=first.state, lower=first.end)
    double = hg.descend(lower_loss, LOWER, UPPER, optimizer=CASES[name], batches=[k % 3 for k in range(STEPS)] * 2)
    if not callable(CASES[name].lr):
        assert torch.equal(second.end_flat, double.end_flat)
    expected = differences(CASES[name], state=first.state, lower=first.end)
    assert relative_error(gradient(second, hg.Unrolled()), expected) < 1e-6
    truncated = gradient(double, hg.Unrolled(truncate=STEPS))
    assert relative_error(gradient(second, hg.Unrolled()), truncated) < 1e-9


def test_a_torch_optimizer_with_state_and_groups() -> None:
    parts = {n: w.clone().requires_grad_() for n, w in LOWER.items()}
    optimizer = torch.optim.Adam(
        [{"params": [parts["b"]], "lr": 0.02}, {"params": [parts["a"]], "weight_decay": 0.1}], lr=0.05, eps=1e-3
    )
    for _ in range(3):
        lower_loss(parts, UPPER, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {n: w.detach().clone() for n, w in parts.items()}
    expected = differences(optimizer, lower=parts)
    trajectory = run(UPPER, optimizer, lower=parts)
    assert relative_error(gradient(trajectory, hg.Unrolled()), expected) < 1e-6
    assert all(torch.equal(before[n], w) and w.grad is None for n, w in parts.items())
    for k in range(STEPS):
        lower_loss(parts, UPPER, k % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(trajectory.end, {n: w.detach() for n, w in parts.items()}) < 1e-12


def test_dropout_is_replayed_by_every_sweep() -> None:
    def loss(w: Params, u: Params, batch: Any) -> Tensor:
        return lower_loss({"a": torch.nn.functional.dropout(w["a"], 0.5), "b": w["b"]}, u, batch)

    def seeded(upper: Params) -> hg.Trajectory:
        torch.manual_seed(3)
        return run(upper, CASES["Adam"], lower_loss=loss)

    def value(u: Params) -> Tensor:
        return upper_loss(seeded(u).end, u, None)

    trajectory, h = seeded(UPPER), 1e-4
    torch.manual_seed(99)
    grads = [gradient(trajectory, m) for m in (hg.Unrolled(), hg.ForwardUnrolled(), hg.Unrolled(truncate=STEPS))]
    ends = [value({**UPPER, "decay": UPPER["decay"] + s * h}) for s in (1, -1)]
    for grad in grads:
        assert grad["decay"] == pytest.approx(float((ends[0] - ends[1]) / (2 * h)), rel=1e-6)


@pytest.mark.parametrize("reading", range(3))
def test_a_run_of_which_one_step_reads_upper(reading: int) -> None:
    """Forward mode asks the steps from the last one back, and none before the first that reads."""
    asked: list[int] = []

    def loss(w: Params, u: Params, batch: int) -> Tensor:
        asked.append(batch)
        return ((w["w"] - u["x"] if batch == reading else w["w"]) ** 2).sum()

    def above(w: Params, u: Params, batch: Any) -> Tensor:
        return (w["w"] ** 2).sum() + 0.01 * (u["x"] ** 2).sum()

    lower, upper = {"w": torch.zeros(2, dtype=F64)}, {"x": torch.ones(2, dtype=F64)}
    trajectory = hg.descend(loss, lower, upper, optimizer=optim.SGD(0.25), batches=[0, 1, 2])
    asked.clear()
    forward = hg.hypergradient(above, trajectory, upper, method=hg.ForwardUnrolled()).grad
    assert asked == [*range(2, reading - 1, -1), 0, 1, 2]
    torch.testing.assert_close(forward["x"], torch.full((2,), 0.02 + 2 * 0.5 * 0.25 ** (2 - reading) * 0.5, dtype=F64))
    assert relative_error(forward, hg.hypergradient(above, trajectory, upper, method=hg.Unrolled()).grad) < 1e-12


def test_an_upper_parameter_without_entries() -> None:
    upper = {**UPPER, "none": torch.zeros(0, 2, dtype=F64)}
    trajectory = run(upper, CASES["SGD"])
    forward, reverse = (
        hg.hypergradient(upper_loss, trajectory, upper, method=method).grad
        for method in (hg.ForwardUnrolled(), hg.Unrolled())
    )
    assert forward["none"].shape == (0, 2)
    assert relative_error(forward, reverse) < 1e-10
