"""MAXL's exact statements: the generator's gradient on the graph itself, the masked softmax, what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

import hypergrad as hg
from ssl_tasks.auxiliary import Generator, MultiTask, auxiliary_loss, negative_entropy
from ssl_tasks.datasets import Data, Split
from ssl_tasks.encoders import MLP
from ssl_tasks.hypergradients import METHODS, MethodName
from ssl_tasks.methods.maxl import LONGER, MAXL, RANDOM, SINGLE
from ssl_tasks.pretext import Backbone, Tower
from ssl_tasks.recipes import Pretraining
from ssl_tasks.system import Trial

Params = dict[str, Tensor]
CLASSES, SUBCLASSES, RATE = 3, 2, 0.2
WORKS: tuple[MethodName, ...] = (
    "cg",
    "layerwise-cg",
    "damped",
    "neumann",
    "nystrom",
    "minres",
    "gmres",
    "exact",
    "one-step",
    "finite-difference",
    "sama",
    "penalty",
    "unrolled",
    "truncated",
)


def _trial(*, width: int = 5) -> Trial:
    """Return a float64 trial in which every batch is the whole training set, in some order."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    split = Split(images, torch.arange(12) % CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = Tower(MLP((1, 4, 4), (width, 4)), torch.nn.Identity()).double()
    return Trial(Backbone(tower), Data("tiny", images, split, split, split, CLASSES), 0)


def _system(**options: Any) -> MAXL:
    return MAXL(
        pretraining=Pretraining(widths=(5, 4), steps=0),
        **{"steps": 1, "subclasses": SUBCLASSES, "batch_size": 12, "rates": (RATE,), "entropy": 0.3, **options},
    )


def _networks(own: MAXL, trial: Trial) -> MultiTask:
    torch.manual_seed(1)
    return own.network(trial).double()


def _masked(scores: Tensor, labels: Tensor) -> Tensor:
    """Return q by a loop over the images."""
    rows = []
    for row, label in zip(scores, labels.tolist(), strict=True):
        full = torch.zeros_like(row)
        own = slice(label * SUBCLASSES, (label + 1) * SUBCLASSES)
        full[own] = row[own].softmax(0)
        rows.append(full)
    return torch.stack(rows)


@pytest.mark.parametrize(("focus", "lower_steps"), [(2.0, 1), (0.0, 1), (2.0, 3)])
def test_the_generator_steps_along_finite_differences_of_the_unrolled_network(focus: float, lower_steps: int) -> None:
    own, trial = _system(focus=focus, lower_steps=lower_steps), _trial()
    network = _networks(own, trial)
    begun = {key: p.detach().clone() for key, p in network.named_parameters()}
    built = own.graph(network, trial, "unrolled", RATE)
    lower_level, (upper_level,) = built.graph.levels
    generator = upper_level.module
    above = torch.optim.SGD(generator.parameters(), lr=1.0)  # in Adam's place: a step shows the gradient
    engine = hg.Engine([*lower_level, replace(upper_level, optimizer=above)])
    before = {key: p.detach().clone() for key, p in generator.named_parameters()}
    model = copy.deepcopy(network)
    engine.step()
    found = {key: before[key] - p.detach() for key, p in generator.named_parameters()}
    images, labels = trial.data.train.images, trial.data.train.labels

    def lower(f: Params, g: Params) -> Tensor:
        z = functional_call(model.encoder, _part(f, "encoder"), (images,))
        logits = functional_call(model.auxiliary, _part(f, "auxiliary"), (z,))
        q = _masked(_scores(generator, g, images), labels)
        p = logits.softmax(1)
        auxiliary = -(q * (1 - p) ** focus * p.log()).sum() / len(images)
        return F.cross_entropy(functional_call(model.primary, _part(f, "primary"), (z,)), labels) + auxiliary

    def value(g: Params) -> Tensor:
        f, speed = begun, {key: torch.zeros_like(p) for key, p in begun.items()}
        for k in range(lower_steps):
            slope = grad(lower)(f, g)
            speed = {key: 0.9 * speed[key] + slope[key] for key in f}
            rate = RATE * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / lower_steps, dtype=torch.float64)))
            f = {key: p - rate * speed[key] for key, p in f.items()}
        z = functional_call(model.encoder, _part(f, "encoder"), (images,))
        mean = _masked(_scores(generator, g, images), labels).mean(0)
        primary = F.cross_entropy(functional_call(model.primary, _part(f, "primary"), (z,)), labels)
        return primary + 0.3 * (mean * mean.log()).sum()

    directions = torch.Generator().manual_seed(3)
    for _ in range(4):  # central differences: an error of O(h^2), some 1e-9 of the value
        direction = {k: torch.randn(p.shape, generator=directions, dtype=p.dtype) for k, p in before.items()}
        h = 1e-5
        up, down = (value({k: p + s * h * direction[k] for k, p in before.items()}) for s in (1, -1))
        slope = sum(float((found[k] * direction[k]).sum()) for k in before)
        assert slope == pytest.approx(float(up - down) / (2 * h), rel=1e-6, abs=1e-9)


def _part(params: Params, name: str) -> Params:
    return {key.removeprefix(f"{name}."): p for key, p in params.items() if key.startswith(f"{name}.")}


def _scores(generator: Any, params: Params, images: Tensor) -> Tensor:
    z = functional_call(generator.encoder, _part(params, "encoder"), (images,))
    return functional_call(generator.scores, _part(params, "scores"), (z,))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_steps_or_says_why_not(name: MethodName) -> None:
    own, trial = _system(lower_steps=2, damping=5.0, products=2), _trial()
    network = _networks(own, trial)
    if name in WORKS:
        engine = own.graph(network, trial, name, RATE)
        generator = engine.graph.levels[-1][0].module
        before = [p.detach().clone() for p in generator.parameters()]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "hypergradient of problem", RuntimeWarning)  # negative curvature
            engine.step()
        after = list(generator.parameters())
        assert all(bool(p.isfinite().all()) for p in after)
        assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
        return
    reason = {
        "first-order": "differentiates no step, and without start= nothing else depends on the level above",
        "forward": "--method forward carries two products a step for each upper variable",
        "reptile": "Reptile moves the level above towards the run's end; give start=",
        "no-implicit": "the upper level acts through it alone",
    }[name]
    if name == "forward":
        own = replace(own, pretraining=replace(own.pretraining, widths=(100, 4)))
    with pytest.raises(ValueError, match=reason):
        own.graph(network, trial, name, RATE)


def test_labels_lie_inside_their_class_and_entropy_tells_one_subclass_from_all() -> None:
    torch.manual_seed(0)
    generator = Generator(MLP((1, 4, 4), (5, 4)), CLASSES, SUBCLASSES).double()
    images, labels = torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    q = generator(images, labels)
    torch.testing.assert_close(q, _masked(generator.scores(generator.encoder(images)), labels))
    assert torch.equal(q.unflatten(1, (CLASSES, SUBCLASSES)).sum(2) > 0, F.one_hot(labels, CLASSES).bool())
    one, even = torch.eye(4, dtype=torch.float64)[[0, 0, 2, 2]], torch.full((4, 4), 0.25, dtype=torch.float64)
    assert float(negative_entropy(even)) == pytest.approx(-math.log(4)) and float(negative_entropy(one)) > -0.7
    logits = torch.randn(4, 4, dtype=torch.float64)
    expected = F.cross_entropy(logits, even)
    torch.testing.assert_close(auxiliary_loss(logits, even, focus=0.0), expected)


def test_every_arm_takes_its_steps_at_every_rate_and_notes_what_validation_chose() -> None:
    own, trial = replace(_system(rates=(1e-6, RATE), steps=5), cost=2.0), _trial()
    split = Split(trial.data.test.images.float(), trial.data.test.labels)
    data = replace(trial.data, pretext=split.images, train=split, validation=split, test=split)
    arms = own.experiment().arms
    assert list(arms) == ["conventional", SINGLE, RANDOM, LONGER, "MAXL unrolled"]
    for name, steps in {SINGLE: 10, RANDOM: 10, LONGER: 20, "MAXL unrolled": 10}.items():
        counted: list[int] = []
        count = hg.callbacks.Callback()
        count.on_step = lambda engine, record, counted=counted: counted.append(1)  # type: ignore[method-assign]
        backbone = Backbone(copy.deepcopy(trial.backbone.tower).float())
        own_trial = Trial(backbone, data, 0, lambda counted=counted: counted.append(1), (count,))
        trained = arms[name].train(own_trial)
        assert arms[name].steps == steps == len(counted)
        assert own_trial.noted["rate"] in own.rates and 0 <= own_trial.noted["accuracy"] <= 100
        assert all(bool(p.isfinite().all()) for p in trained.parameters())
        assert bool(own_trial.curves) == name.startswith("MAXL")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subclasses": 1}, "subclasses must be at least 2 for labels to say anything, got 1"),
        ({"rates": ()}, r"rates needs at least one learning rate, all positive; got \(\)"),
        ({"rates": (0.1, 0.0)}, "rates needs at least one learning rate, all positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _system(**options)
