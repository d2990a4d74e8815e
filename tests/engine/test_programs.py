"""Random multilevel programs: the engine's hypergradient against finite differences of the loss that it reports.

Two to four curved levels with random modules, optimizers, numbers of steps, clipping, learning rates and starts that
higher levels set, reads past the levels between, and a detached problem that trains beside them. Every lower level
begins anew in each step, so that the whole step is one function of the top's variables.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_cases import draw, engine
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hypergrad as hg

N = 3
DATA = [draw(4, N, seed=k) for k in range(3)]


class Curved(nn.Module):
    """A vector, by itself or as a small network makes it."""

    def __init__(self, seed: int, network: bool) -> None:
        super().__init__()
        self.v = nn.Parameter(0.3 * draw(N, seed=seed))
        self.inner = nn.Linear(N, N).double() if network else None
        if self.inner is not None:
            vector_to_parameters(0.3 * draw(N * N + N, seed=seed + 1), self.inner.parameters())

    def forward(self) -> Tensor:
        return self.v if self.inner is None else self.v + torch.tanh(self.inner(self.v))


def grouped(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    first, *rest = parameters
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": rest, "lr": 0.05, "momentum": 0.5}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=0.1, weight_decay=0.1)


OPTIMIZERS: list[Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.2),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.02, centered=True, momentum=0.5),
    lambda p: torch.optim.Adagrad(p, lr=0.1),
    grouped,
]


@dataclass(frozen=True)
class Program:
    """A program of two to four levels, drawn from `seed`."""

    seed: int

    def build(self, at: Tensor | None = None) -> tuple[nn.Module, hg.Engine, str]:
        """Return the top's module, its variables at `at` if given, an engine, and the top's name."""
        rng = random.Random(self.seed)
        names = "abcd"[: rng.choice([2, 3, 3, 4])]
        modules = {name: Curved(10 * self.seed + k, rng.random() < 0.5) for k, name in enumerate(names)}
        top = modules[names[-1]]
        if at is not None:
            vector_to_parameters(at.clone(), top.parameters())
        beside = rng.random() < 0.5
        levels: list[Any] = []
        for k, name in enumerate(names):
            sees = [other for j, other in enumerate(names) if j != k and (abs(j - k) == 1 or rng.random() < 0.5)]
            if beside and rng.random() < 0.7:
                sees.append("z")
            loss = self.loss(name, sees, names)
            parameters = list(modules[name].parameters())
            if name == names[-1]:
                sgd = torch.optim.SGD(parameters, lr=1e-12)
                levels.append(hg.Problem(name, module=top, loss=loss, optimizer=sgd, data=DATA[:1]))
                continue
            options: dict[str, Any] = {"after": "restart", "steps": rng.choice([1, 2, 3])}
            options["optimizer"] = rng.choice(OPTIMIZERS)(parameters)
            options["data"] = rng.choice([DATA, DATA[1:2]])
            options["method"] = rng.choice([hg.Unrolled(), hg.Unrolled(checkpoint="sqrt"), hg.Unrolled(retain=0.6)])
            options |= rng.choice([{}, {}, {"clip_norm": 0.3}, {"clip_value": 0.2}])
            above = names[k + 1]
            if rng.random() < 0.3:
                options["hyper"] = {"lr": lambda m, above=above: 0.1 * torch.sigmoid(getattr(m, above).v[0])}
            if rng.random() < 0.3:
                begin = {key: p.detach().clone() for key, p in modules[name].named_parameters()}
                options["start"] = lambda m, begin=begin, above=above: {
                    key: p + 0.1 * torch.tanh(getattr(m, above).v.sum()) for key, p in begin.items()
                }
            levels.append([hg.Problem(name, module=modules[name], loss=loss, **options)])
        if beside:
            z = Curved(10 * self.seed + 9, network=False)
            sgd = torch.optim.SGD(z.parameters(), lr=0.3)
            teacher = hg.Problem(
                "z", module=z, loss=drift, optimizer=sgd, data=DATA, steps=2, detach=True, after="restart"
            )
            levels[0].insert(rng.randrange(2), teacher)
        return top, engine(*levels), names[-1]

    def loss(self, name: str, sees: list[str], names: str) -> Callable[[Any, Tensor], Tensor]:
        """Return a curved loss of the problem in all that it sees."""
        mixing = {other: 0.4 * draw(N, N, seed=97 * self.seed + ord(other)) for other in sees}

        def loss(m: Any, batch: Tensor) -> Tensor:
            own = getattr(m, name)()
            value = 0.5 * (own**2).sum() + 0.1 * torch.log(torch.cosh(batch @ own)).sum()
            for other in sees:
                seen = getattr(m, other)()
                if other == "z":
                    value = value + torch.cos(2 * seen @ own)
                elif names.index(other) > names.index(name):
                    value = value - torch.tanh(mixing[other] @ seen) @ own
                else:
                    value = value + 0.3 * ((seen - 0.2) ** 2).sum() + 0.2 * torch.sin(seen @ own)
            return value

        return loss


def drift(m: Any, batch: Tensor) -> Tensor:
    return ((m.z.v - batch.mean(0)) ** 2).sum()


def check(seed: int) -> None:
    program = Program(seed)
    top, run, name = program.build()
    at = parameters_to_vector(top.parameters()).detach().clone()
    run.step()
    grad = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in top.parameters()])
    direction, epsilon = draw(at.numel(), seed=seed), 1e-6  # adaptive optimizers are strongly curved
    ahead, behind = (program.build(at + s * epsilon * direction)[1].step().read(f"{name}.loss") for s in (1, -1))
    expected = (ahead - behind) / (2 * epsilon)
    assert abs(float(grad @ direction) - expected) <= 1e-6 * max(abs(expected), 1e-2)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_program_equals_its_finite_differences(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 150))
def test_more_random_programs_equal_their_finite_differences(seed: int) -> None:
    check(seed)
