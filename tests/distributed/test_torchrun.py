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
