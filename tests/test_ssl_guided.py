"""The survey's combinations: exact hypergradients of each graph, what is planted, what is refused, what is found."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_tasks.datasets import Data, Split
from ssl_tasks.encoders import MLP
from ssl_tasks.evaluate import linear_probe
from ssl_tasks.guided import UNIFORM, Guide
from ssl_tasks.hypergradients import METHODS, MethodName
from ssl_tasks.methods.learned_pretext import AUGMENTATIONS, LearnedPretext
from ssl_tasks.methods.masked import Masked
from ssl_tasks.methods.sources import ORACLE, Sources
from ssl_tasks.optimizers import cosine, optimizer_of
from ssl_tasks.pipeline import pretrained
from ssl_tasks.pretext import Backbone, Pretext
from ssl_tasks.recipes import Pretraining
from ssl_tasks.ridge import ridge_probe
from ssl_tasks.streams import Drawn, Labelled
from ssl_tasks.system import Trial

Guided = LearnedPretext | Sources | Masked
RECIPE = Pretraining(pretext=Pretext(hidden=5, out=3), batch_size=6, steps=0, optimizer="sgd", learning_rate=0.1)
GUIDE = Guide(steps=2, lower_steps=3, clip=1e9, upper_batch=12)
SYSTEMS: dict[str, Guided] = {
    "light": LearnedPretext(pretraining=RECIPE, guide=GUIDE, losses=("simclr", "barlow-twins", "vicreg")),
    "sources": Sources(pretraining=replace(RECIPE, batch_size=4), guide=GUIDE, count=3),
    "mask": Masked(pretraining=RECIPE, guide=GUIDE, learn="mask"),
    "weights": Masked(pretraining=RECIPE, guide=GUIDE, learn="weights"),
    "both": Masked(pretraining=RECIPE, guide=GUIDE, learn="both"),
}


def _data() -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    split = Split(images, torch.arange(12) % 3)
    return Data("tiny", images, split, split, split, 3)


def _trial(seed: int = 0) -> Trial:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        begun = RECIPE.pretext.start(MLP((1, 4, 4), (6, 4)), 4)
    return Trial(Backbone(begun.tower.double()), _data(), seed)


def _loss(own: Guided, tower: nn.Module, batch: Any, choice: nn.Module) -> Tensor:
    said = choice()
    return own.loss(tower, batch, *said) if isinstance(said, tuple) else own.loss(tower, batch, said)  # type: ignore


def _error_after_three_steps(own: Guided, choice: nn.Module) -> float:
    """Return the probe's error after the engine's first three lower steps, written out with torch's own optimizer."""
    trial = _trial()
    tower: Any = own.start(trial) if isinstance(own, Masked) else trial.backbone.tower
    optimizer = optimizer_of("sgd", tower, lr=0.1)
    schedule = cosine(optimizer, own.guide.total)
    for batch in islice(own.batches(trial), 3):
        optimizer.zero_grad()
        _loss(own, tower, batch, choice).backward()
        optimizer.step()
        schedule.step()
    images, labels = next(iter(Labelled(split=trial.data.train, batch_size=12, seed=trial.seed + 30_000)))
    return ridge_probe(tower.encoder(images), labels, num_classes=3, penalty=own.guide.penalty)[0].item()


@pytest.mark.parametrize("name", ["unrolled", "forward"])
@pytest.mark.parametrize("which", list(SYSTEMS))
def test_each_graph_steps_along_finite_differences(which: str, name: MethodName) -> None:
    """Central differences with h = 1e-5 err by O(h^2) relative to third derivatives of order one, and 1e-16/h."""
    own = SYSTEMS[which]
    engine = own.graph(_trial(), name)
    choice = engine.graph.levels[-1][0].module
    with torch.no_grad():  # off the symmetric start, where derivatives may vanish
        for k, p in enumerate(choice.parameters()):
            p.add_(0.3 * torch.sin(torch.arange(1.0, p.numel() + 1, dtype=p.dtype) + k))
    begun = copy.deepcopy(choice)
    engine.step()
    checked = 0
    for (key, p), (_, found) in zip(begun.named_parameters(), choice.named_parameters(), strict=True):
        if not p.requires_grad:
            assert found.grad is None
            continue
        assert found.grad is not None
        for k in range(p.numel()):
            ends = []
            for sign in (1, -1):
                moved = copy.deepcopy(begun)
                with torch.no_grad():
                    moved.get_parameter(key).view(-1)[k] += sign * 1e-5
                ends.append(_error_after_three_steps(own, moved))
            difference = (ends[0] - ends[1]) / 2e-5
            assert float(found.grad.view(-1)[k]) == pytest.approx(difference, rel=1e-6, abs=1e-9)
            checked += abs(difference) > 1e-6
    assert checked >= 2


REFUSED = {
    "first-order": "differentiates no step",
    "reptile": "give start=",
    "no-implicit": "the upper level acts through it alone",
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_steps_or_says_why_not(name: MethodName) -> None:
    own = SYSTEMS["mask"]
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            own.graph(_trial(), name)
        return
    engine = own.graph(_trial(), name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "hypergradient of problem", RuntimeWarning)  # negative curvature
        engine.step()
    logits = engine.graph.levels[-1][0].module.mask
    assert bool(logits.isfinite().all())


def test_the_light_is_an_offset_and_the_shade_a_ramp() -> None:
    data = _data()
    light = SYSTEMS["light"].plant(data, 3)  # type: ignore[union-attr]
    offset = light.test.images - data.test.images
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-12)
    assert len(offset[:, 0, 0, 0].unique()) == 12 and float(offset.abs().max()) <= 1
    shade = replace(SYSTEMS["light"], nuisance="shade").plant(data, 3)  # type: ignore[arg-type, union-attr]
    ramp = shade.pretext - data.pretext
    second = ramp[:, :, 2:] - 2 * ramp[:, :, 1:-1] + ramp[:, :, :-2]
    assert float(second.abs().max()) < 1e-12 and float(ramp.mean((1, 2, 3)).abs().max()) < 1e-12
    assert 0.1 < float(ramp.abs().max()) <= 1
    assert replace(SYSTEMS["light"], nuisance="none").plant(data, 3) is data  # type: ignore[arg-type, union-attr]


def test_without_strength_the_views_are_the_images_and_each_augmentation_changes_them() -> None:
    own = SYSTEMS["light"]
    assert isinstance(own, LearnedPretext)
    batch = next(iter(own.batches(_trial())))
    assert torch.equal(own.augmented(batch, torch.zeros(len(AUGMENTATIONS))), batch["images"])
    for k in range(len(AUGMENTATIONS)):
        views = own.augmented(batch, torch.eye(len(AUGMENTATIONS), dtype=torch.float64)[k])
        first, second = views.chunk(2)
        assert bool((views != batch["images"]).flatten(1).any(1).float().mean() > 0.5) and not torch.equal(
            first, second
        )


@pytest.mark.parametrize("spoilt", ["shuffled", "noise", "turned", "none"])
def test_one_source_is_spoilt_and_the_oracle_leaves_it_out(spoilt: Any) -> None:
    own = replace(SYSTEMS["sources"], spoilt=spoilt)
    assert isinstance(own, Sources)
    data = _data()
    planted = own.plant(data, 4)  # source 4 mod 3 = 1
    before, after = data.pretext.split(4), planted.pretext.split(4)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert torch.equal(before[1], after[1]) == (spoilt == "none")
    if spoilt == "shuffled":
        assert torch.equal(before[1].flatten(1).sort(1).values, after[1].flatten(1).sort(1).values)
    if spoilt == "turned":
        assert torch.equal(after[1], 1 - before[1].flip((2, 3)))
    assert (ORACLE in own.experiment().arms) == (spoilt != "none")
    assert len(next(iter(own.batches(replace(_trial(4), data=planted))))) == 3


def test_masks_hide_what_the_encoder_does_not_see() -> None:
    own = SYSTEMS["mask"]
    assert isinstance(own, Masked)
    images, noise = next(iter(own.batches(_trial())))
    seen: list[Tensor] = []

    def tower(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(len(x), 16, dtype=x.dtype)

    sure = torch.tensor([50.0, -50.0, -50.0, -50.0], dtype=torch.float64)  # the first patch, always
    error = own.loss(tower, (images, noise), sure, torch.ones(4, dtype=torch.float64))
    assert float(seen[0][:, :, :2, :2].abs().max()) < 1e-12
    assert torch.allclose(seen[0][:, :, 2:], images[:, :, 2:], atol=1e-9)
    assert float(error) == pytest.approx(float(images[:, :, :2, :2].square().mean()), rel=1e-9)
    hard = replace(own, hard=True).masks(noise[0], noise)
    assert set(hard.detach().unique().tolist()) <= {0.0, 1.0}
    many = torch.logit(torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)))
    share = float((own.masks(torch.logit(torch.tensor([0.3])), many) > 0.5).float().mean())
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 20_000) ** 0.5)  # four standard errors


def test_the_ridge_probe_is_the_least_squares_classifier() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (40,), generator=generator)
    error, accuracy = ridge_probe(features, labels, num_classes=3, penalty=1e-12)
    onehot = torch.eye(3, dtype=torch.float64)[labels]
    inputs = torch.cat([features, torch.ones(40, 1, dtype=torch.float64)], 1)
    predicted = inputs[20:] @ torch.linalg.lstsq(inputs[:20], onehot[:20]).solution
    assert float(error) == pytest.approx(float((predicted - onehot[20:]).square().sum(1).mean()), rel=1e-6)
    assert float(accuracy) == float((predicted.argmax(1) == labels[20:]).double().mean())
    constant, _ = ridge_probe(torch.ones(40, 3), torch.arange(40) % 4, num_classes=4, penalty=0.1)
    assert float(constant) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="at least four labelled images and a positive penalty, got 3 and 0.1"):
        ridge_probe(features[:3], labels[:3], num_classes=3, penalty=0.1)


def test_drawn_batches_repeat_themselves() -> None:
    def draw(images: Tensor, generator: torch.Generator) -> Tensor:
        return images + torch.rand(images.shape, generator=generator, dtype=images.dtype)

    stream = Drawn(images=_data().pretext, draw=draw, batch_size=5, seed=1)
    once, again = (list(islice(stream, 4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True)) and not torch.equal(once[0], once[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedPretext(losses=()), r"--losses weighs losses .* at least one; got \(\)"),
        (lambda: LearnedPretext(losses=("byol",)), "byol regresses on a moving average of itself: leave it out"),
        (lambda: LearnedPretext(strength=1.0), "--strength is a start between 0 and 1, both excluded; got 1.0"),
        (lambda: Sources(count=1), "--count: weights say something from two sources on, got 1"),
        (lambda: Sources(pretraining=Pretraining(pretext=Pretext(loss="byol"))), "byol follows one target"),
        (lambda: Sources(count=9).plant(_data(), 0), "--count 9 leaves 1 images a source, and a step takes 32 of each"),
        (lambda: Masked(ratio=0.0), "--ratio lies between 0 and 1, both excluded, .* got 0.0 and 0.5"),
        (lambda: Masked(temperature=0.0), "--temperature is positive; got 0.5 and 0.0"),
        (lambda: Masked(patch=3).start(_trial()), "--patch 3 does not divide images of 4 x 4; choose a side that does"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("own", [LearnedPretext(), LearnedPretext(nuisance="shade"), Sources()], ids=lambda s: s.about)
def test_what_is_planted_is_found(own: LearnedPretext | Sources) -> None:
    """Three seeds that are not among the recorded ones: found in each; in the views it matters to the probe."""
    spec = own.experiment()
    gains = []
    for seed in (0, 1, 2):
        data = spec.load(seed)
        begun = pretrained(spec.pretraining, data, seed=seed)
        probes = {}
        for name in (UNIFORM, "learned, unrolled"):
            trial = Trial(copy.deepcopy(begun), data, seed)
            probes[name] = linear_probe(spec.arms[name].train(trial), data).test
        planted, nearest = trial.noted["planted"], trial.noted["next"]
        if isinstance(own, Sources):
            assert planted < nearest and planted < 1 / own.count
        else:
            assert planted > 0.6 > own.strength
        gains.append(probes["learned, unrolled"] - probes[UNIFORM])
    assert isinstance(own, Sources) or sum(gains) > 0
