"""Freed memory stays with the process: blocks of some size always, all of them during a call."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from hypergrad import _memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is told is glibc")

PLACE = """
import torch

def is_kept(mebibytes):
    block = torch.empty(mebibytes << 20, dtype=torch.uint8)
    for line in open("/proc/self/maps"):
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= block.data_ptr() < last:
            return line.split()[-1] == "[heap]"
"""

DURING = """
import hypergrad as hg

def loss(lower, upper, batch):
    found.append(is_kept(80))
    return ((lower["w"] - upper["c"]) ** 2).sum()

def descend():
    return hg.descend(loss, lower, upper, optimizer=hg.optim.SGD(lr=0.25), batches=[None])

found, lower, upper = [], {"w": torch.zeros(2)}, {"c": torch.ones(2, requires_grad=True)}
"""

ENGINE = """
inner, outer = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
problems = [
    hg.Problem("inner", module=inner, loss=lambda m, batch: (m.inner(batch) - m.outer(batch)).square().mean(), steps=1,
               optimizer=torch.optim.SGD(inner.parameters(), lr=0.1), data=[torch.ones(3, 2)],
               method=hg.Implicit(hg.CG(2))),
    hg.Problem("outer", module=outer, loss=lambda m, batch: (found.append(is_kept(80)), m.inner(batch).mean())[1],
               optimizer=torch.optim.SGD(outer.parameters(), lr=0.1), data=[torch.ones(3, 2)]),
]
engine = hg.Engine(problems)
"""


def _run(program: str, **environment: str) -> list[str]:
    """Return the lines that a program prints in a process of its own, where `environment` alone tells glibc."""
    inherited = {key: value for key, value in os.environ.items() if key not in _memory.CHOSEN}
    command = [sys.executable, "-c", PLACE + program]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_after_the_import_blocks_of_some_size_are_kept() -> None:
    assert _run("print(is_kept(20))") == ["False"]
    assert _run("import hypergrad; print(is_kept(20), is_kept(80))") == ["True False"]


RESPONSE = "hg.best_response(hg.solved(loss, lower), upper, method=hg.Implicit(hg.CG(2)))['w'].sum()"

CALLS = [
    ("", "descend()"),
    (
        "traj = hg.solved(loss, lower)",
        "hg.hypergradient(lambda w, u, b: w['w'].sum(), traj, upper, method=hg.Implicit(hg.CG(2)))",
    ),
    (f"out = {RESPONSE}", "out.backward()"),
    (f"out = {RESPONSE}", "torch.autograd.grad(out, upper['c'], create_graph=True)"),
    (ENGINE, "engine.step()"),
]


def test_during_a_call_larger_ones_are_kept_too_and_after_it_no_longer() -> None:
    each = [f"{set_up}\nfound.clear()\n{call}\nprint(set(found), is_kept(320))" for set_up, call in CALLS]
    assert _run("\n".join([DURING, *each])) == ["{True} False"] * len(CALLS)


def test_a_call_ends_when_the_first_one_begun_does_and_by_an_exception_too() -> None:
    program = """
from hypergrad._calls import under_way

try:
    with under_way():
        descend()
        print(is_kept(80))
        raise KeyError
except KeyError:
    print(is_kept(320))
"""
    assert _run(DURING + program) == ["True", "False"]


@pytest.mark.parametrize("variable", _memory.CHOSEN)
def test_where_the_environment_says_what_to_keep_it_is_left_so(variable: str) -> None:
    value = "glibc.malloc.mmap_threshold=1048576" if variable == "GLIBC_TUNABLES" else "1048576"
    assert _run(f"{DURING}descend()\nprint(is_kept(20), found)", **{variable: value}) == ["False [False]"]
