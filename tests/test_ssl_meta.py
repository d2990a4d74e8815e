"""BMSSL's and GeSSL's exact statements, on their own graphs against the same steps written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from ssl_tasks.augment import Augmentation
from ssl_tasks.cost import peak_bytes
from ssl_tasks.datasets import Data, Split
from ssl_tasks.encoders import MLP
from ssl_tasks.heldout import held_out, sigma
from ssl_tasks.hypergradients import METHODS, MethodName
from ssl_tasks.instances import InstanceTasks, deviation, embedded, instance_accuracy, instance_logits
from ssl_tasks.losses import byol, divergence
from ssl_tasks.methods.bmssl import BMSSL
from ssl_tasks.methods.gessl import GeSSL
from ssl_tasks.pretext import Backbone, Pretext, Tower
from ssl_tasks.recipes import Pretraining
from ssl_tasks.system import Trial

Params = dict[str, Tensor]
TASKS, WAYS, ALPHA = 2, 3, 0.3
RECIPE = Pretraining(pretext=Pretext(hidden=5, out=3), augment=Augmentation(noise=0.1), batch_size=6)


def _trial(pretext: Pretext = RECIPE.pretext) -> Trial:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64)
    split = Split(images, torch.arange(12) % 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        begun = pretext.start(MLP((1, 4, 4), (6, 4)), 4)
    target = None if begun.target is None else begun.target.double()
    return Trial(Backbone(begun.tower.double(), target), Data("tiny", images, split, split, split, 3), 0)


def _bmssl(**options: Any) -> BMSSL:
    shared: dict[str, Any] = dict(tasks=TASKS, ways=WAYS, inner_rate=ALPHA, optimizer="sgd", rate=1.0, steps=1, chunk=2)
    return BMSSL(pretraining=RECIPE, **{**shared, **options})


def _gessl(**options: Any) -> GeSSL:
    shared: dict[str, Any] = dict(tasks=TASKS, ways=WAYS, inner_rate=ALPHA, optimizer="sgd", rate=1.0, steps=1, chunk=2)
    return GeSSL(pretraining=RECIPE, **{**shared, **options})


def _moved(own: BMSSL | GeSSL, trial: Trial, name: MethodName = "unrolled") -> Params:
    """Return the gradient along which the engine stepped: SGD with learning rate 1, its first step."""
    engine = own.graph(trial, name)
    module = engine.graph.levels[-1][0].module
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    engine.step()
    return {key: before[key] - p.detach() for key, p in module.named_parameters()}


def _batch(own: BMSSL | GeSSL, trial: Trial) -> dict[str, tuple[Tensor, Tensor]]:
    stream = InstanceTasks(
        images=trial.data.pretext, augment=RECIPE.augment, tasks=TASKS, ways=WAYS, seed=trial.seed + 20_000
    )
    return next(iter(stream))


class _At:
    """A tower at given parameters, called functionally."""

    def __init__(self, tower: Tower, params: Params) -> None:
        self.tower, self.params = tower, params

    def __call__(self, images: Tensor) -> Tensor:
        return functional_call(self.tower, self.params, (images,))


def _descended(tower: Tower, params: Params, views: list[Any], loss: Callable[[Any, Any], Tensor]) -> Params:
    for pair in views:
        g = grad(lambda p, pair=pair: loss(_At(tower, p), pair))(params)
        params = {key: p - ALPHA * g[key] for key, p in params.items()}
    return params


def _task(batch: dict[str, tuple[Tensor, Tensor]], k: int) -> tuple[Any, Any]:
    support, query = batch["support"], batch["query"]
    return (support[0][k], support[1][k]), (query[0][k], query[1][k])


def _check_by_differences(value: Callable[[Params], Tensor], at: Params, found: Params) -> None:
    """Compare with central differences along random directions; their error is O(h^2), some 1e-8 of the value."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        direction = {key: torch.randn(p.shape, generator=generator, dtype=p.dtype) for key, p in at.items()}
        h = 1e-5
        up, down = (value({key: p + s * h * direction[key] for key, p in at.items()}) for s in (1, -1))
        slope = sum(float((found[key] * direction[key]).sum()) for key in at)
        assert slope == pytest.approx(float(up - down) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("matching", "mix", "guard"),
    [("kl", 0.0, 0.0), ("reverse-kl", 0.5, 0.0), ("embedding", 0.0, 2.0), ("parameters", 1.0, 0.0)],
)
def test_bmssl_steps_along_finite_differences_with_the_target_frozen(matching: Any, mix: float, guard: float) -> None:
    own = _bmssl(matching=matching, mix=mix, guard=guard, inner_steps=2, target_steps=2)
    trial = _trial()
    batch, tower = _batch(own, trial), copy.deepcopy(trial.backbone.tower)
    theta = {key: p.detach().clone() for key, p in tower.named_parameters()}
    targets = []
    for k in range(TASKS):
        support, query = _task(batch, k)
        targets.append(_descended(tower, theta, [support, support, support, query], RECIPE.pretext))

    def value(at: Params) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(TASKS):
            support, query = _task(batch, k)
            end = _descended(tower, at, [support, support], RECIPE.pretext)
            student, teacher = _At(tower, end), _At(tower, targets[k])
            seen, best = (embedded(f, support, query) for f in (student, teacher))
            logits, ahead = (instance_logits(views, temperature=0.1) for views in (seen, best))
            both = torch.cat(query)
            if matching == "parameters":
                total = total + sum(((end[key] - targets[k][key]) ** 2).sum() for key in end) / 2
            elif matching == "embedding":
                total = total + byol(student(both), teacher(both))
            else:
                total = total + divergence(ahead, logits, reverse=matching == "reverse-kl")
            total = total + mix * RECIPE.pretext(student, query)
            total = total + guard * torch.relu(0.5 - deviation(seen[1]))
        return total / TASKS

    _check_by_differences(value, theta, _moved(own, trial))


def test_bmssl_is_maml_up_to_scale_and_nothing_flows_through_the_target() -> None:
    """1/2 |theta_K - target|^2, the target theta_K - alpha dL(theta_K; query) frozen, has slope alpha dL in theta_K."""
    own = _bmssl(matching="parameters", mix=0.0, inner_steps=2, target_steps=1)
    trial = _trial()
    batch, tower = _batch(own, trial), copy.deepcopy(trial.backbone.tower)
    theta = {key: p.detach().clone() for key, p in tower.named_parameters()}

    def maml(at: Params) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(TASKS):
            support, query = _task(batch, k)
            total = total + RECIPE.pretext(_At(tower, _descended(tower, at, [support, support], RECIPE.pretext)), query)
        return total / TASKS

    def through_the_target(at: Params) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(TASKS):
            support, query = _task(batch, k)
            end = _descended(tower, at, [support, support], RECIPE.pretext)
            ahead = _descended(tower, end, [query], RECIPE.pretext)
            total = total + sum(((end[key] - ahead[key]) ** 2).sum() for key in end) / 2
        return total / TASKS

    found, expected, other = _moved(own, trial), grad(maml)(theta), grad(through_the_target)(theta)
    for key, g in found.items():
        torch.testing.assert_close(g, ALPHA * expected[key], rtol=1e-9, atol=1e-13)
    apart = sum(float((g - other[key]).square().sum()) for key, g in found.items()) ** 0.5
    assert apart > 0.01 * sum(float(g.square().sum()) for g in found.values()) ** 0.5


def test_gessl_target_steps_along_finite_differences() -> None:
    own, trial = _gessl(inner_steps=2, lead=2, mix=0.7), _trial()
    batch, tower = _batch(own, trial), copy.deepcopy(trial.backbone.tower)
    f = {f"model.{key}": p.detach().clone() for key, p in tower.named_parameters()}
    bare = {key.removeprefix("model."): p for key, p in f.items()}
    targets = [_descended(tower, bare, [_task(batch, k)[0]] * 4, RECIPE.pretext) for k in range(TASKS)]

    def value(at: Params) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(TASKS):
            support, query = _task(batch, k)
            named = {key.removeprefix("model."): p for key, p in at.items()}
            student = _At(tower, _descended(tower, named, [support] * 2, RECIPE.pretext))
            views = (embedded(g, support, query) for g in (_At(tower, targets[k]), student))
            both = (instance_logits(seen, temperature=0.1) for seen in views)
            total = total + sigma(*both) + 0.7 * RECIPE.pretext(student, query)
        return total / TASKS

    _check_by_differences(value, f, _moved(own, trial))


def test_gessl_threshold_steps_along_finite_differences_in_f_and_g() -> None:
    own, trial = _gessl(variant="threshold", inner_steps=1, guidance=0.8, width=4), _trial()
    batch, tower = _batch(own, trial), copy.deepcopy(trial.backbone.tower)
    torch.manual_seed(5)
    engine = own.graph(_trial(), "unrolled")
    auxiliary = copy.deepcopy(engine.graph.levels[-1][0].module.auxiliary).double()
    torch.manual_seed(5)
    found = _moved(own, trial)
    at = {f"model.{key}": p.detach().clone() for key, p in tower.named_parameters()}
    at |= {f"auxiliary.{key}": p.detach().clone() for key, p in auxiliary.named_parameters()}

    def part(params: Params, name: str) -> Params:
        return {key.removeprefix(f"{name}."): p for key, p in params.items() if key.startswith(f"{name}.")}

    def value(params: Params) -> Tensor:
        def g(z: Tensor) -> Tensor:
            return functional_call(auxiliary, part(params, "auxiliary"), (z,))

        def inner(f: Any, views: Any) -> Tensor:
            return RECIPE.pretext(f, views) + 0.8 * own.discrimination(f, g, views)

        total = torch.zeros((), dtype=torch.float64)
        for k in range(TASKS):
            support, query = _task(batch, k)
            end = _descended(tower, part(params, "model"), [support], inner)
            total = total + RECIPE.pretext(_At(tower, end), query)
        return total / TASKS

    _check_by_differences(value, at, found)
    assert all(float(found[f"auxiliary.{key}"].norm()) > 0 for key in ("0.weight", "2.weight"))  # second-order only
    first = _moved(replace(own, inner_steps=1), _trial(), "first-order")
    assert all(not bool(g.any()) for key, g in first.items() if key.startswith("auxiliary."))


def test_sigma_is_not_negative_and_zero_at_the_specialist() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        best, own = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        assert float(sigma(best, own)) > 0 and float(sigma(best, best)) == 0
    trial = _trial()
    measured = held_out(trial, RECIPE, ways=WAYS, rate=0.3, steps=2, tasks=2)
    still = held_out(trial, RECIPE, ways=WAYS, rate=0.0, steps=2, tasks=2)
    assert measured["sigma"] > 0 and still["sigma"] == 0 and still["task_accuracy"] == still["adapted_accuracy"]


WORKS: dict[str, tuple[MethodName, ...]] = {
    "start": ("unrolled", "truncated", "first-order", "reptile"),
    "proximal": ("cg", "damped", "neumann", "gmres", "minres", "one-step", "unrolled", "first-order"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_steps_or_says_why_not(name: MethodName) -> None:
    own = _bmssl(inner_steps=2)
    if name in WORKS["start"]:
        assert any(bool(g.any()) for g in _moved(own, _trial(), name).values())
        return
    reason = {
        "forward": "--method forward carries two products a step for each upper variable",
        "no-implicit": "the upper level acts through it alone",
    }.get(name, "begins at a function of .'meta'., which .* ignores.*proximal term")
    if name == "forward":
        own = replace(own, pretraining=replace(RECIPE, pretext=Pretext(hidden=200, out=3)))
    with pytest.raises(ValueError, match=reason):
        own.graph(_trial(own.pretraining.pretext), name)


@pytest.mark.parametrize("name", WORKS["proximal"])
def test_with_a_proximal_term_implicit_methods_step(name: MethodName) -> None:
    found = _moved(_bmssl(inner_steps=2, proximal=20.0, inner_rate=0.02), _trial(), name)
    assert all(bool(g.isfinite().all()) for g in found.values()) and any(bool(g.any()) for g in found.values())


@pytest.mark.parametrize("system", [_bmssl, _gessl])
@pytest.mark.parametrize("loss", ["simclr", "byol", "barlow-twins", "vicreg"])
def test_tasks_under_one_vmap_step_as_tasks_in_a_loop(system: Callable[..., BMSSL | GeSSL], loss: Any) -> None:
    recipe = replace(RECIPE, pretext=Pretext(loss=loss, hidden=5, out=3))
    both = [
        _moved(replace(system(inner_steps=2), pretraining=recipe, chunk=chunk), _trial(recipe.pretext))
        for chunk in (1, 2)
    ]
    for key, g in both[0].items():
        torch.testing.assert_close(both[1][key], g, rtol=1e-8, atol=1e-11)


def test_tasks_are_distinct_images_and_repeat_themselves() -> None:
    images = torch.arange(24.0).view(24, 1, 1, 1).expand(24, 1, 4, 4) / 24
    still = Augmentation(min_scale=1.0, flip=False, brightness=0.0, contrast=0.0, blur=0.0)
    stream = InstanceTasks(images=images, augment=still, tasks=3, ways=4, seed=0)
    first, again = next(iter(stream)), next(iter(stream))
    for part in ("support", "query"):
        for one, two in zip(first[part], again[part], strict=True):
            assert one.shape == (3, 4, 1, 4, 4) and torch.equal(one, two)
            assert len(one[..., 0, 0].unique()) == 12
    same = next(iter(replace(stream, split=False)))
    assert same["query"][0] is same["support"][0]
    with pytest.raises(ValueError, match="7 tasks of 4 images want at least 2 images each and no more than the 24"):
        InstanceTasks(images=images, augment=still, tasks=7, ways=4, seed=0)


def test_instance_accuracy_and_deviation_know_the_extremes() -> None:
    assert float(instance_accuracy(torch.eye(3).repeat(2, 1))) == 1
    assert float(deviation(torch.full((5, 4), 0.5))) < 1e-4
    assert float(deviation(torch.cat([torch.eye(4), -torch.eye(4)]))) == pytest.approx(1.0)


def test_the_memory_of_a_computation_is_what_is_alive_at_once() -> None:
    def chain() -> Tensor:
        x = torch.zeros(1000)  # 4000 bytes
        for _ in range(5):
            x = x + 1
        return x

    assert peak_bytes(chain) == 8000
    first, second = (peak_bytes(_bmssl(inner_steps=k).graph(_trial(), "unrolled").step) for k in (1, 6))
    assert second > first > 0
