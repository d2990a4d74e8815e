"""The code blocks of the pages run, and the table of methods is the one that the code gives."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = ["README.md", "docs/tutorial.md", "docs/extending.md"]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table_script():
    path = ROOT / "docs" / "_hooks" / "methods_table.py"
    spec = importlib.util.spec_from_file_location("methods_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_block_after_block(page: str, capsys, monkeypatch) -> None:
    text = read(page)
    blocks = list(BLOCK.finditer(text))
    assert blocks
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    torch.manual_seed(0)
    for block in blocks:
        padding = "\n" * text[: block.start(1)].count("\n")  # so that errors name the page's own lines
        exec(compile(padding + block[1], str(ROOT / page), "exec", dont_inherit=True), module.__dict__)
    capsys.readouterr()


def test_the_example_of_the_readme_has_25_lines() -> None:
    (example,) = BLOCK.findall(read("README.md"))
    assert len([line for line in example.splitlines() if line.strip()]) <= 25


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_the_table_of_methods_is_up_to_date(page: str) -> None:
    script = table_script()
    text = read(page)
    assert text == script.insert(text, script.table()), "run: python docs/_hooks/methods_table.py"


def test_every_exported_method_has_its_row() -> None:
    script = table_script()
    names = [kind.__name__ for kind in script.exported()]
    assert len(names) >= 8
    for name in names:
        assert f"| `{name}` |" in script.table()


def test_a_docstring_without_its_bias_is_named() -> None:
    class Nameless:
        """Nothing."""

    with pytest.raises(ValueError, match="docstring of Nameless has no paragraph 'Bias"):
        table_script()._sentence(Nameless, "Bias")
