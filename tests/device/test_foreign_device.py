"""On a device whose values cannot be read, every method, solver and optimizer runs, on that device alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("foreign_device_script.py")


def test_nothing_is_read_back_and_no_devices_are_mixed():
    """One process, since registering a device cannot be undone; the script says how it watches."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    failed = {name: error for name, error in report["cases"].items() if error is not None}
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
    assert len(report["cases"]) > 80
    uncaught = [name for name, error in report["controls"].items() if error is None]
    assert not uncaught, f"the watch is blind to {uncaught}"
