"""Imports go down: a file imports its own layer's base or lower layers, applications only public names."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS: dict[str, float] = {
    "_memory": -1,
    "_calls": -0.9,
    "_convolutions": -0.8,
    "_flat": 0,
    "_again": 0,
    "_autocast": 0,
    "_autograd": 0,
    "_functional": 0,
    "_random": 0,
    "_eager": 0,
    "_untouched": 0,
    "_shards": 0,
    "_common_factor": 0,
    "_tape": 0,
    "_compiled_check": 0.05,
    "_stacked": 0.1,
    "_transposes": 0,
    "_compiled": 0.1,
    "_replayed": 0.2,
    "_result": 0,
    "history": 0,
    "store": 0,
    "shard_files": 0.6,
    "composite": 0.5,
    "loss_scale": 0.55,
    "distributed": 0.6,
    "distributed.ranks": 0.55,
    "averaged": 0.7,
    "operators": 1,
    "solvers": 2,
    "solvers.recycling": 2.5,
    "lanczos": 2.5,
    "optim": 3,
    "optim.bound": 3.1,
    "optim.torch_bridge": 3.2,
    "optim.binding": 3.3,
    "step": 3.4,
    "fused": 3.45,
    "trajectory": 3.5,
    "stationarity": 3.6,
    "product_check": 3.7,
    "replay_check": 3.7,
    "methods": 4,
    "problem": 5,
    "network": 5.3,
    "in_place": 5.4,
    "reads": 5.5,
    "graph": 6,
    "loaders": 6.1,
    "source": 6.2,
    "stepper": 6.3,
    "partials": 6.3,
    "snapshot": 6.4,
    "losses": 6.2,
    "start": 6.3,
    "evaluation": 6.4,
    "runner": 6.5,
    "saving": 6.55,
    "undo": 6.55,
    "faults": 6.9,
    "checks": 6.7,
    "coupling": 6.8,
    "stacked_tasks": 6.57,
    "tasks": 6.6,
    "loop": 7.55,
    "engine": 7.6,
    "callbacks": 7.5,
    "diagnosis": 7.7,
    "plot": 7.8,
    "costs": 7.8,
    "costs.communication": 7.75,
    "bench": 8,
    "bench.protocol": 8,
    "bench.problems": 8,
    "bench.problems.images": 7.95,
    "bench.problems.catalogue": 8.02,
    "bench.surroundings": 8,
    "bench.serving": 8.05,
    "bench.contenders": 8.05,
    "bench.worker": 8.1,
    "bench.bar": 8,
    "bench.weighing": 8,
    "bench.rivals": 8.05,
    "bench.rivals.holder": 8.03,
    "bench.reference": 8.1,
    "bench.upper_step": 8.05,
    "bench.communication": 8.1,
    "bench.claims": 8.1,
    "bench.claims.estimate": 8.15,
    "bench.claims_report": 8.2,
    "bench.measure": 8.2,
    "bench.pareto": 8.25,
    "bench.pool": 8.07,
    "bench.results": 8.3,
    "bench.suite": 8.4,
    "bench.figures": 8.4,
    "bench.report": 8.5,
    "bench.cli": 8.8,
    "testing": 9,
    "__main__": 10,
}
"""Names after `hypergrad.` and their layers, the most specific counts; fractions order the files of one layer."""


@dataclass(frozen=True)
class Import:
    """One absolute module name that a file imports, and where."""

    module: str
    line: int
    typing_only: bool


def _files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _imports(path: Path) -> list[Import]:
    """Return what a file imports; `from p import m` counts as `p.m` where that is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = _module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found: list[Import] = []
    for node in ast.walk(tree):
        only = node in typing_only
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.append(Import(inner if _is_module(inner) else module, node.lineno, only))
    return found


def _layer_of(module: str) -> float | None:
    """Return the layer of `hypergrad.x...`; None for the catalogue `hypergrad` itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return None
    assert parts[1] in LAYERS, f"{module} has no layer: add {parts[1]!r} to LAYERS in tests/test_layers.py"
    return LAYERS.get(".".join(parts[1:4]), LAYERS.get(".".join(parts[1:3]), LAYERS[parts[1]]))


def _is_base(module: str) -> bool:
    """Return whether a module serves its own layer: `base`, or a private file."""
    name = module.split(".")[-1]
    return name == "base" or name.startswith("_") or module == "hypergrad.testing.problems"


def _complaint(path: Path, item: Import) -> str | None:
    module = _module_name(path)
    own, other = _layer_of(module), _layer_of(item.module)
    assert own is not None
    if other is None:
        return None if own >= LAYERS["bench"] else "the catalogue `hypergrad` stands above every file but the tests'"
    if path.name == "__init__.py" and item.module.startswith(module + "."):
        return None
    same_layer = int(own) == int(other)
    if other < own or (same_layer and (_is_base(item.module) or item.typing_only)):
        return None
    return f"layer {own:g} may import its layer's base and lower layers, {item.module} is of layer {other:g}"


RIVALS = set((ROOT / "hypergrad" / "bench" / "rivals").glob("*/worker.py"))
"""Run by other interpreters, in one of which `hypergrad` is another library."""
HYPERGRAD = [path for path in _files("hypergrad") if path != ROOT / "hypergrad" / "__init__.py" and path not in RIVALS]
APPLICATIONS = _files("ssl_tasks", "examples")


@pytest.mark.parametrize("path", HYPERGRAD, ids=lambda path: str(path.relative_to(ROOT)))
def test_hypergrad_imports_go_down(path: Path) -> None:
    complaints = [
        f"{path.relative_to(ROOT)}:{item.line}: {complaint}"
        for item in _imports(path)
        if item.module.split(".")[0] == "hypergrad" and (complaint := _complaint(path, item))
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("path", HYPERGRAD, ids=lambda path: str(path.relative_to(ROOT)))
def test_hypergrad_does_not_know_its_applications(path: Path) -> None:
    roots = {item.module.split(".")[0] for item in _imports(path)}
    layer = _layer_of(_module_name(path))
    drawing = {"matplotlib"} if layer is not None and layer >= LAYERS["plot"] else set()  # by the command line only
    assert not roots & ({"ssl_tasks", "examples", "tests", "sklearn", "matplotlib", "tqdm", "torchvision"} - drawing)


@pytest.mark.parametrize(
    "path",
    [p for p in _files("hypergrad") if p.name == "__init__.py"],
    ids=lambda path: str(path.parent.name),
)
def test_init_files_are_catalogues(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, (ast.Assign, ast.AnnAssign)) and "__" in ast.unparse(node).split("=")[0]
        allowed = docstring or names or isinstance(node, (ast.Import, ast.ImportFrom))
        assert allowed, f"{path.relative_to(ROOT)}:{node.lineno}: an __init__ only re-exports"


@pytest.mark.parametrize("path", APPLICATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_applications_use_public_names_only(path: Path) -> None:
    where = path.relative_to(ROOT)
    for item in _imports(path):
        if item.module.split(".")[0] == "hypergrad":
            assert item.module == "hypergrad", f"{where}:{item.line}: say `import hypergrad as hg`, not {item.module}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hypergrad":
            raise AssertionError(f"{where}:{node.lineno}: say `import hypergrad as hg`")
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("hg."):
            private = [name for name in ast.unparse(node).split(".") if name.startswith("_")]
            assert not private, f"{where}:{node.lineno}: {ast.unparse(node)} is not public"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from hypergrad.solvers.cg import CG", ["hypergrad.solvers.cg"]),
        ("from hypergrad._flat import Layout", ["hypergrad._flat"]),
        ("from .base import Solver", ["hypergrad.solvers.base"]),
        ("from .. import _flat", ["hypergrad._flat"]),
        ("import hypergrad as hg", ["hypergrad"]),
    ],
)
def test_the_parser_names_modules(text: str, expected: list[str], monkeypatch, tmp_path: Path) -> None:
    for name in ("hypergrad/_flat.py", "hypergrad/solvers/base.py", "hypergrad/solvers/cg.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    path = tmp_path / "hypergrad" / "solvers" / "new.py"
    path.write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [item.module for item in _imports(path)] == expected


def test_an_import_that_goes_up_is_found(monkeypatch, tmp_path: Path) -> None:
    for name in ("hypergrad/engine.py", "hypergrad/solvers/base.py", "hypergrad/solvers/minres.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    path = tmp_path / "hypergrad" / "solvers" / "cg.py"
    path.write_text("import hypergrad.engine\nfrom .base import Solver\nfrom .minres import MINRES\nimport hypergrad\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    refused = [item.module for item in _imports(path) if _complaint(path, item)]
    assert refused == ["hypergrad.engine", "hypergrad.solvers.minres", "hypergrad"]
