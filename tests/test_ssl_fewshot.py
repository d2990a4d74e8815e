"""UMTRA's and CACTUs' exact statements: MAML's gradient on their graphs, what their tasks are made of."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad

from ssl_tasks.augment import Augmentation
from ssl_tasks.datasets import Data, Split, load
from ssl_tasks.encoders import MLP, classifier_head
from ssl_tasks.fewshot import ClassTasks, adapted_accuracy
from ssl_tasks.hypergradients import METHODS, MethodName
from ssl_tasks.maml import SUPERVISED, Maml
from ssl_tasks.methods.cactus import CACTUs, partitions
from ssl_tasks.methods.umtra import UMTRA
from ssl_tasks.pretext import Backbone, Tower
from ssl_tasks.recipes import Pretraining
from ssl_tasks.system import Trial

Params = dict[str, Tensor]
ALPHA = 0.3
MAML = Maml(tasks=2, ways=3, inner_steps=2, inner_rate=ALPHA, rate=1.0, optimizer="sgd", steps=1, chunk=2)
RECIPE = Pretraining(widths=(6, 4), augment=Augmentation(noise=0.1), batch_size=6)
SYSTEMS = [
    UMTRA(pretraining=RECIPE, maml=MAML),
    CACTUs(pretraining=RECIPE, maml=MAML, embedding="pixels", partitions=2, clusters=3, queries=1),
]


def _trial() -> Trial:
    """Return a float64 trial; its images are three distinct groups, so that three clusters are found."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(3, 1, 1, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    images = torch.sigmoid(2 * groups + 0.2 * noise).flatten(0, 1)
    split = Split(images, torch.arange(15) // 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = Tower(MLP((1, 4, 4), (6, 4)), torch.nn.Linear(4, 3)).double()
    return Trial(Backbone(tower), Data("tiny", images, split, split, split, 3), 0)


def _moved(own: UMTRA | CACTUs, trial: Trial, name: MethodName = "unrolled") -> Params:
    """Return the gradient along which the engine stepped: SGD with learning rate 1, its first step."""
    engine = own.maml.graph(trial.backbone.tower, own.tasks(trial), name)
    before = {key: p.detach().clone() for key, p in trial.backbone.tower.named_parameters()}
    engine.step()
    return {key: before[key] - p.detach() for key, p in trial.backbone.tower.named_parameters()}


@pytest.mark.parametrize("own", SYSTEMS, ids=lambda own: own.name)
def test_the_meta_level_steps_along_finite_differences(own: UMTRA | CACTUs) -> None:
    trial = _trial()
    batch = next(iter(own.tasks(trial)))
    tower = copy.deepcopy(trial.backbone.tower)
    theta = {key: p.detach().clone() for key, p in tower.named_parameters()}

    def loss(params: Params, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(tower, params, (images,)), labels)

    def value(at: Params) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(MAML.tasks):
            params = at
            for _ in range(MAML.inner_steps):
                slope = grad(loss)(params, *(part[k] for part in batch["support"]))
                params = {key: p - ALPHA * slope[key] for key, p in params.items()}
            total = total + loss(params, *(part[k] for part in batch["query"]))
        return total / MAML.tasks

    found = _moved(own, trial)
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):  # central differences: an error of O(h^2), some 1e-9 of the value
        direction = {key: torch.randn(p.shape, generator=generator, dtype=p.dtype) for key, p in theta.items()}
        h = 1e-5
        up, down = (value({key: p + s * h * direction[key] for key, p in theta.items()}) for s in (1, -1))
        slope = sum(float((found[key] * direction[key]).sum()) for key in theta)
        assert slope == pytest.approx(float(up - down) / (2 * h), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("own", SYSTEMS, ids=lambda own: own.name)
def test_tasks_under_one_vmap_step_as_tasks_in_a_loop(own: UMTRA | CACTUs) -> None:
    loop = _moved(replace(own, maml=replace(MAML, chunk=1)), _trial())
    for key, g in _moved(own, _trial()).items():
        torch.testing.assert_close(g, loop[key], rtol=1e-8, atol=1e-11)


WORKS: dict[str, tuple[MethodName, ...]] = {
    "start": ("unrolled", "truncated", "first-order", "reptile"),
    "proximal": ("cg", "damped", "neumann", "gmres", "minres", "one-step", "unrolled", "first-order"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_steps_or_says_why_not(name: MethodName) -> None:
    own = SYSTEMS[0]
    if name in WORKS["start"]:
        assert any(bool(g.any()) for g in _moved(own, _trial(), name).values())
        return
    if name == "forward":
        tower = Tower(MLP((1, 4, 4), (80, 4)), torch.nn.Linear(4, 3))
        with pytest.raises(ValueError, match="--method forward carries two products a step for each upper variable"):
            own.maml.graph(tower, [], name)
        return
    reason = "begins at a function of .'meta'., which .* ignores.*proximal term"
    with pytest.raises(ValueError, match="acts through it alone" if name == "no-implicit" else reason):
        own.maml.graph(_trial().backbone.tower, own.tasks(_trial()), name)


@pytest.mark.parametrize("name", WORKS["proximal"])
def test_with_a_proximal_term_implicit_methods_step(name: MethodName) -> None:
    own = replace(SYSTEMS[0], maml=replace(MAML, proximal=20.0, inner_rate=0.02))
    found = _moved(own, _trial(), name)
    assert all(bool(g.isfinite().all()) for g in found.values()) and any(bool(g.any()) for g in found.values())


def test_umtra_shows_images_and_asks_for_their_copies() -> None:
    trial = _trial()
    batch = next(iter(SYSTEMS[0].tasks(trial)))
    (support, labels), (query, expected) = batch["support"], batch["query"]
    assert support.shape == (2, 3, 1, 4, 4) and query.shape == (2, 6, 1, 4, 4)
    assert labels.tolist() == [[0, 1, 2]] * 2 and expected.tolist() == [[0, 1, 2, 0, 1, 2]] * 2
    pool = {tuple(image.flatten().tolist()) for image in trial.data.pretext.float()}
    shown = {tuple(image.flatten().tolist()) for image in support.flatten(0, 1).float()}
    assert len(shown) == 6 and shown <= pool
    assert not {tuple(image.flatten().tolist()) for image in query.flatten(0, 1).float()} & pool
    moved = next(iter(replace(SYSTEMS[0], still=False).tasks(trial)))["support"][0]
    assert not torch.equal(moved, support)


def test_tasks_from_a_partition_keep_to_its_classes_and_repeat_themselves() -> None:
    images = torch.arange(20.0).view(20, 1, 1, 1) / 20
    labels = torch.cat([torch.arange(18) // 6, torch.tensor([3, -1])])  # class 3 has one image, -1 is in none
    stream = ClassTasks(images=images, partitions=(labels,), tasks=4, ways=3, shots=2, queries=3, seed=0)
    first, again = next(iter(stream)), next(iter(stream))
    for part, count in (("support", 6), ("query", 9)):
        shown, expected = first[part]
        assert shown.shape == (4, count, 1, 1, 1) and torch.equal(shown, again[part][0])
        for task in range(4):
            index = (shown[task].flatten() * 20).round().long()
            assert len(index.unique()) == count
            for c in range(3):
                assert len(labels[index[expected[task] == c]].unique()) == 1
    both = torch.cat([first["support"][0], first["query"][0]], 1).flatten(1)
    assert all(len(row.unique()) == 15 for row in both)


def test_partitions_find_the_groups_and_differ_by_their_scaling() -> None:
    trial = _trial()
    truth = trial.data.train.labels
    for found in partitions(SYSTEMS[1].embedded(trial), count=2, clusters=3, seed=0):
        assert len({(a, b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)}) == 3
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(60, 8, generator=generator)
    one, two = partitions(cloud, count=2, clusters=4, seed=0)
    assert not torch.equal(one, two) and torch.equal(one, partitions(cloud, count=1, clusters=4, seed=0)[0])
    for embedding in ("pretext", "pca"):
        own = replace(SYSTEMS[1], embedding=embedding, components=2)
        assert own.embedded(trial).shape == (15, 4 if embedding == "pretext" else 2)


def test_adaptation_from_a_zero_head_solves_separate_classes() -> None:
    images = torch.eye(4).view(4, 1, 2, 2).repeat(5, 1, 1, 1)
    stream = ClassTasks(images=images, partitions=(torch.arange(20) % 4,), tasks=6, ways=4, shots=1, queries=4, seed=0)
    net = torch.nn.Sequential(torch.nn.Flatten(), classifier_head(4, 4))
    batch = next(iter(stream))
    assert adapted_accuracy(net, batch, steps=1, rate=1.0, chunk=2) == 100
    assert adapted_accuracy(net, batch, steps=0, rate=1.0, chunk=None) == 25
    assert not bool(net[1].weight.any())


def test_unseen_classes_are_in_no_unlabelled_image_and_labels_teach_the_seen_ones_only() -> None:
    data = load("digits", seed=3, num_labels=100, num_validation=100, num_unseen=5)
    everything = load("digits", seed=3, num_labels=100, num_validation=100)
    assert len(data.unseen) == 5 and everything.unseen == () and data.to("cpu").unseen == data.unseen
    assert 0.4 * len(everything.pretext) < len(data.pretext) < 0.6 * len(everything.pretext)
    assert torch.equal(data.train.labels, everything.train.labels)
    assert load("digits", seed=4, num_labels=100, num_validation=100, num_unseen=5).unseen != data.unseen
    own = UMTRA.presets()["tiny"]
    arms = own.experiment().arms
    assert list(arms)[3:] == [SUPERVISED, "UMTRA unrolled", "UMTRA first-order"]


@pytest.mark.parametrize("count", [-1, 10])
def test_a_number_of_unseen_classes_that_leaves_none_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_unseen must lie between 0 and one less than the 10 .*, got {count}"):
        load("digits", num_labels=100, num_validation=100, num_unseen=count)


def test_tasks_that_cannot_be_made_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.rand(9, 1, 2, 2), torch.arange(9) % 3
    shape: dict[str, Any] = {"images": images, "tasks": 1, "shots": 1, "seed": 0}
    with pytest.raises(ValueError, match=r"5 classes with 1 \+ 2 images each want .* partition 0 has 3"):
        ClassTasks(partitions=(labels,), ways=5, queries=2, **shape)
    halves = torch.arange(9) % 2
    with pytest.raises(ValueError, match=r"2 classes with 1 \+ 3 images each want .* partition 1 has 0"):
        ClassTasks(partitions=(halves, labels), ways=2, queries=3, **shape)
    with pytest.raises(ValueError, match="10 clusters of 9 images; ask for fewer clusters"):
        partitions(images.flatten(1), count=1, clusters=10, seed=0)
    with pytest.raises(ValueError, match="clusters must be at least 1, got 0"):
        CACTUs(clusters=0)
    with pytest.raises(ValueError, match="adapt_rates needs at least one learning rate, all positive"):
        Maml(adapt_rates=())
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="scikit-learn's KMeans, and scikit-learn does not import: pip install"):
        partitions(images.flatten(1), count=1, clusters=2, seed=0)


def test_unlabelled_images_of_unknown_classes_are_not_taken_for_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_tasks import datasets

    real = datasets.read
    monkeypatch.setattr(datasets, "read", lambda *a: replace(real(*a), unlabelled=real(*a).images))
    with pytest.raises(ValueError, match="num_unseen=2, but this data has unlabelled images, of whose classes nobody"):
        load("digits", num_labels=100, num_validation=100, num_unseen=2)
