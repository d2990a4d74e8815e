"""A population of upper variables in one call of `torch.func.vmap` equals the loop over its members."""

from __future__ import annotations

import device_cases as cases
import pytest
import torch

import hypergrad as hg

POPULATION = 3
DATA, OTHER = cases.data(), cases.data(seed=1)
OPTIMIZER = {"SGD": hg.optim.SGD(lr=0.1, momentum=0.9, weight_decay=0.05), "Adam": hg.optim.Adam(lr=0.1)}


def population() -> cases.Params:
    _, upper = cases.parameters()
    generator = torch.Generator().manual_seed(2)
    return {
        name: u + 0.3 * torch.randn(POPULATION, *u.shape, dtype=u.dtype, generator=generator)
        for name, u in upper.items()
    }


def member(many, index):
    return {name: value[index] for name, value in many.items()}


def assert_equal(batched: hg.Hypergradient, loop: list[hg.Hypergradient], rtol: float = 1e-10) -> None:
    for name in batched.grad:
        torch.testing.assert_close(batched.grad[name], torch.stack([h.grad[name] for h in loop]), rtol=rtol, atol=1e-12)
    torch.testing.assert_close(batched.value, torch.stack([h.value for h in loop]))
    assert batched.result.tolist() == [int(h.result) for h in loop]
    assert set(batched.stats) == set(loop[0].stats)
    for name, value in batched.stats.items():
        expected = torch.stack([h.stats[name] for h in loop])
        torch.testing.assert_close(value.expand_as(expected), expected, rtol=1e-8, atol=1e-10)


METHODS = {
    f"{name}-{optimizer}": (method, optimizer)
    for name, method in cases.methods(None).items()
    for optimizer in OPTIMIZER
    if not (optimizer == "SGD" and name == "Implicit-CG-second-moment")
}


@pytest.mark.parametrize("name", METHODS)
def test_a_population_equals_the_loop(name):
    method, optimizer = METHODS[name]
    lower, _ = cases.parameters()
    batches = [cases.data(seed=seed) for seed in range(3)]

    def run(upper, state=None):
        traj = hg.descend(
            cases.lower_loss,
            lower,
            upper,
            optimizer=OPTIMIZER[optimizer],
            batches=batches,
            recording=method.recording(3),
        )
        return hg.hypergradient(
            cases.upper_loss, traj, upper, method=method, batch=batches[0], state=state, throw=False
        )

    many = population()
    loop = [run(member(many, i)) for i in range(POPULATION)]
    batched = torch.func.vmap(run)(many)
    assert_equal(batched, loop)
    if loop[0].state is None:
        return
    again = [run(member(many, i), loop[i].state) for i in range(POPULATION)]
    assert not torch.equal(again[0].grad["shift"], loop[0].grad["shift"])
    assert_equal(torch.func.vmap(run)(many, batched.state), again)


@pytest.mark.parametrize("name", [n for n, s in cases.solvers().items() if n != "CG-second-moment"])
def test_over_a_solution_from_elsewhere(name):
    lower, _ = cases.parameters()
    method = hg.Implicit(cases.solvers()[name], damping=0.5)

    def run(upper):
        traj = hg.solved(cases.lower_loss, lower, DATA)
        return hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=OTHER, throw=False)

    many = population()
    assert_equal(torch.func.vmap(run)(many), [run(member(many, i)) for i in range(POPULATION)])


@pytest.mark.parametrize("name", [n for n, s in cases.solvers().items() if not s.requires_symmetric])
def test_over_a_root_with_a_jacobian_that_is_not_symmetric(name):
    lower, _ = cases.parameters()

    def F(w, u, batch):
        grads = torch.func.grad(cases.lower_loss)(w, u, batch)
        return {"a": grads["a"] + 0.3 * grads["b"], "b": grads["b"] + 2.0 * w["b"]}

    def run(upper):
        traj = hg.solved_root(F, lower, DATA)
        method = hg.Implicit(cases.solvers()[name], damping=0.5)
        return hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=OTHER, throw=False)

    many = population()
    assert_equal(torch.func.vmap(run)(many), [run(member(many, i)) for i in range(POPULATION)])


def test_gauss_newton():
    lower, _ = cases.parameters()
    batches = [cases.data(seed=seed) for seed in range(2)]

    def run(upper):
        traj = hg.descend(cases.composite, lower, upper, optimizer=OPTIMIZER["SGD"], batches=batches)
        method = hg.Implicit(hg.CG(5, check_every=None), curvature="gauss_newton", damping=0.1)
        return hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=batches[0], throw=False)

    many = population()
    assert_equal(torch.func.vmap(run)(many), [run(member(many, i)) for i in range(POPULATION)])


def test_the_lower_start_may_be_batched():
    lower, upper = cases.parameters()
    starts = {name: torch.stack([w, 0.5 * w, -w]) for name, w in lower.items()}

    def run(start, method):
        traj = hg.descend(cases.lower_loss, start, upper, optimizer=OPTIMIZER["Adam"], batches=[DATA] * 3)
        return hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=DATA, throw=False)

    for method in (hg.Implicit(hg.CG(4, check_every=None)), hg.Unrolled(), hg.ForwardUnrolled()):
        loop = [run(member(starts, i), method) for i in range(3)]
        assert_equal(torch.func.vmap(lambda s, m=method: run(s, m))(starts), loop)


def test_best_response_inside_vmap_of_grad():
    lower, _ = cases.parameters()

    def value(upper, method):
        traj = hg.descend(cases.lower_loss, lower, upper, optimizer=OPTIMIZER["SGD"], batches=[DATA] * 3)
        lower_star = hg.best_response(traj, upper, method=method, throw=False)  # indefinite here: no breakdown is read
        return cases.upper_loss(lower_star, upper, OTHER)

    many = population()
    for method in (hg.Implicit(hg.CG(20, check_every=None)), hg.Unrolled()):
        grad = torch.func.grad(lambda u, m=method: value(u, m))
        batched = torch.func.vmap(grad)(many)
        for index in range(POPULATION):
            one = grad(member(many, index))
            for name in batched:
                torch.testing.assert_close(batched[name][index], one[name], rtol=1e-9, atol=1e-12)


def test_throw_and_explicit_checks_are_refused_inside():
    lower, _ = cases.parameters()

    def run(upper, throw, every):
        traj = hg.solved(cases.lower_loss, lower, DATA)
        method = hg.Implicit(hg.CG(2, check_every=every))
        return hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=DATA, throw=throw).grad

    with pytest.raises(ValueError, match="throw=False"):
        torch.func.vmap(lambda u: run(u, True, None))(population())
    with pytest.raises(ValueError, match="check_every=None"):
        torch.func.vmap(lambda u: run(u, False, 2))(population())


@pytest.mark.parametrize("retain", [0.5, 1.0])
def test_kept_tapes_serve_a_population(retain):
    lower, _ = cases.parameters()
    method = hg.Unrolled(retain=retain)

    def run(upper, method):
        traj = hg.descend(
            cases.lower_loss,
            lower,
            upper,
            optimizer=OPTIMIZER["SGD"],
            batches=[DATA] * 4,
            recording=method.recording(4),
        )
        assert [step.taped is not None for step in traj.steps] == [k >= 4 - round(4 * method.retain) for k in range(4)]
        return hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=OTHER, throw=False)

    many = population()
    assert_equal(
        torch.func.vmap(lambda u: run(u, method))(many),
        [run(member(many, i), hg.Unrolled()) for i in range(POPULATION)],
    )


def test_members_may_lie_along_any_dimension_and_one_vmap_inside_another():
    lower, _ = cases.parameters()

    def run(upper):
        traj = hg.descend(cases.lower_loss, lower, upper, optimizer=OPTIMIZER["Adam"], batches=[DATA] * 2)
        return hg.hypergradient(cases.upper_loss, traj, upper, method=hg.Unrolled(), batch=OTHER, throw=False).grad

    many = population()
    expected = torch.func.vmap(run)(many)
    last = {name: u.movedim(0, -1) for name, u in many.items()}
    along = torch.func.vmap(run, in_dims=(dict.fromkeys(last, -1),))(last)
    twice = torch.func.vmap(torch.func.vmap(run))({name: torch.stack([u, u]) for name, u in many.items()})
    for name, value in expected.items():
        torch.testing.assert_close(along[name], value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(twice[name][1], value, rtol=1e-10, atol=1e-12)


def test_a_loss_without_lower_parameters_is_named_inside_too():
    lower, _ = cases.parameters()

    def run(upper):
        hg.descend(lambda w, u, b: u["shift"].sum() * 1.0, lower, upper, optimizer=OPTIMIZER["SGD"], batches=[DATA])
        return upper

    with pytest.raises(ValueError, match="does not depend on the lower parameters"):
        torch.func.vmap(run)(population())


def test_inside_one_vmap_no_transform_takes_a_derivative(monkeypatch):
    """Derivatives of a population are autograd's, over all members at once."""

    def refuse(*args, **kwargs):
        raise AssertionError("a torch.func derivative was taken")

    lower, _ = cases.parameters()
    for name in ("grad", "vjp", "grad_and_value"):
        monkeypatch.setattr(torch.func, name, refuse)
    for method in (hg.Unrolled(), hg.Implicit(hg.CG(3, check_every=None), damping=1.0)):

        def run(upper, method=method):
            traj = hg.descend(cases.lower_loss, lower, upper, optimizer=OPTIMIZER["SGD"], batches=[DATA] * 2)
            return hg.hypergradient(cases.upper_loss, traj, upper, method=method, batch=OTHER, throw=False).grad

        torch.func.vmap(run)(population())
