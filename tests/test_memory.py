"""Freed memory stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import torch
{imported}

block = torch.empty(20 << 20, dtype=torch.uint8)
for line in open("/proc/self/maps"):
    first, last = (int(number, 16) for number in line.split()[0].split("-"))
    if first <= block.data_ptr() < last:
        print(line.split()[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the threshold is glibc's")
def test_after_the_import_large_blocks_lie_where_freed_memory_is_kept() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}

    def place(imported: str) -> str:
        command = [sys.executable, "-c", PROGRAM.format(imported=imported)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert place("import hypergrad") == "[heap]"
    assert place("") != "[heap]"
