"""A script that never heard of torch.distributed, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_engines as ec
import torch

HERE = Path(__file__).resolve().parent

SCRIPT = """
import json, os, sys
import torch
import pytest
import shared_engines as ec

torch.set_num_threads(1)
seen = ec.run(ec.two_levels, 2, "cg", torch.float64)
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(seen, file)
"""


@pytest.mark.slow
def test_the_bissl_example_under_torchrun_is_the_command_unchanged(tmp_path: Path) -> None:
    """Two processes share every batch; the first writes, in the same format as a process by itself."""
    command = ["-m", "ssl_tasks", "bissl", "--preset", "tiny", "--seeds", "1", "--method", "cg", "one-step"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for name, arguments in (("two", [*launcher, *command]), ("one", command)):
        out = tmp_path / name
        done = subprocess.run(
            [sys.executable, *arguments, "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("written: ") == 1
        found.append(json.loads((out / "results.json").read_text())["rows"])
    two, one = found
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("two", "one")]
    assert names[0] == names[1] and "figure.png" in names[0]
    assert [(row["arm"], set(row["measures"])) for row in two] == [(row["arm"], set(row["measures"])) for row in one]
    for ours, theirs in zip(two, one, strict=True):
        if not ours["arm"].startswith("BiSSL"):  # no engine in it: every process does the same
            assert ours["measures"] == theirs["measures"]
        assert all(value == value for value in ours["measures"].values())


@pytest.mark.slow  # three interpreters start
def test_a_script_under_torchrun_is_data_parallel(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "rank"
    script.write_text(SCRIPT)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(out)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads(Path(f"{out}{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert max(ec.gap(first, ec.run(ec.two_levels, 2, "cg", torch.float64))) <= 1e-10
