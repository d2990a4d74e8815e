"""The rivals: what is said of a missing one, how their environments are pinned, and whether each is set up right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypergrad.bench import pool, reference
from hypergrad.bench.pool import AUTOGRAD, Pool
from hypergrad.bench.problems.catalogue import build
from hypergrad.bench.protocol import Offer, Request

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "hypergrad" / "bench" / "rivals"
LIBRARIES = [name for name in pool.rivals() if name != AUTOGRAD]


@dataclass(frozen=True)
class Case:
    """One contender on one problem, and between which bounds its relative error lies in float64."""

    library: str
    problem: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    below: float = 1e-6
    above: float = 0.0

    def __str__(self) -> str:
        return f"{self.library}-{self.problem}-{Offer(self.method, self.settings).label}"


BY_HAND = [
    Case(AUTOGRAD, "ridge", "cg", {"rtol": 1e-12}, below=1e-9),
    Case(AUTOGRAD, "logistic", "cg", {"rtol": 1e-12}, below=1e-8),
    Case(AUTOGRAD, "maml", "unroll", below=1e-12),
    Case(AUTOGRAD, "learned_rates", "unroll", below=1e-12),
]

# little is asked of a Neumann series, the condition number being 504; a lower bound: known to be wrong
THEIRS = [
    Case("torchopt", "ridge", "cg", {"rtol": 1e-12}, below=1e-9),
    Case("torchopt", "ridge", "normal_cg", {"rtol": 1e-10}, below=1e-6),
    Case("torchopt", "maml", "loop", below=1e-12),
    Case("torchopt", "maml", "vmap", below=1e-12),
    # the lower run stops short of the tasks' solutions
    Case("torchopt", "imaml", "cg", {"rtol": 1e-12}, below=0.05),
    Case(AUTOGRAD, "imaml", "cg", {"rtol": 1e-12}, below=0.05),
    Case("higher", "maml", "unroll", below=1e-12),
    Case("higher", "learned_rates", "unroll", below=1e-12),
    Case("boat", "ridge", "CG", {"k": 80, "tolerance": 1e-10, "lr": 0.19}, below=1e-7),
    Case("boat", "maml", "NGD+IAD", below=1e-12),
    Case("betty", "ridge", "neumann", {"neumann_iterations": 4000, "neumann_alpha": 0.19}, below=1e-4),
    Case("betty", "ridge", "cg", {"cg_iterations": 20, "cg_alpha": 1.0}, below=1e3, above=0.3),
    Case("moskomule", "ridge", "cg", {"num_iters": 20, "lr": 1.0}, below=1e3, above=0.3),
    Case("moskomule", "ridge", "nystrom", {"rank": 196, "rho": 1e-4}, below=1e-2),
]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(tmp_path_factory.mktemp("logs")) as running:
        yield running


def error(case: Case, workers: Pool, folder: Path) -> float:
    """Return the relative error of a contender's gradient."""
    ask = Request(case.problem, case.method, case.settings, dtype="float64", repeats=1, warmup=0, out=str(folder))
    answer = workers.ask(case.library, ask)
    assert answer.ok and answer.gradient is not None, answer.error
    exact = reference.exact(build(case.problem, dtype=torch.float64)).gradient
    with np.load(folder / answer.gradient) as found:
        assert set(found.files) == set(exact)
        off = {name: torch.from_numpy(found[name]) - value for name, value in exact.items()}
    size = torch.cat([value.reshape(-1) for value in exact.values()]).norm()
    return float(torch.cat([value.reshape(-1) for value in off.values()]).norm() / size)


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_what_is_written_by_hand_is_right(case: Case, workers: Pool, tmp_path: Path) -> None:
    assert error(case, workers, tmp_path) < case.below


@pytest.mark.slow
@pytest.mark.parametrize("case", THEIRS, ids=str)
def test_each_library_is_as_right_or_wrong_as_documented(case: Case, workers: Pool, tmp_path: Path) -> None:
    if pool.missing(case.library) is not None:
        pytest.skip(f"make rival-{case.library} makes the environment that this needs")
    assert case.above <= error(case, workers, tmp_path) < case.below


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("ridge", ["cg (rtol=0.01)", "cg (rtol=0.0001)", "cg (rtol=1e-06)"]),
        ("maml", ["unroll"]),
        ("imaml", ["unroll", "cg (rtol=0.01)", "cg (rtol=0.0001)", "cg (rtol=1e-06)"]),
    ],
)
def test_what_is_offered_by_hand(problem: str, labels: list[str], workers: Pool) -> None:
    answer = workers.ask(AUTOGRAD, Request(problem))
    assert answer.ok, answer.error
    assert [offer.label for offer in answer.offers] == labels


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_environment_is_an_error_that_names_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pool, "_ENVIRONMENTS", tmp_path)
    with pytest.raises(ValueError, match=f"'{name}' has no environment.*`make rivals`, or `make rival-{name}`"):
        pool.chosen([name])
    assert name in pool.chosen(None)[1]


def test_make_rivals_makes_all_of_them() -> None:
    found = re.search(r"^RIVALS := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert found is not None
    assert found.group(1).split() == LIBRARIES


@pytest.mark.parametrize("name", LIBRARIES)
def test_requirements_are_pinned(name: str) -> None:
    lines = (FOLDER / name / "requirements.txt").read_text("utf-8").splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line), line
    assert not any(line.startswith("torch==") for line in lines), "torch is the Makefile's to pin"


def test_the_hand_written_file_knows_no_library() -> None:
    text = (FOLDER / AUTOGRAD / "worker.py").read_text("utf-8")
    assert not re.search(r"(import|from) (hypergrad|higher|torchopt|betty|functorch)", text)
