import ast
import subprocess
import sys
from pathlib import Path

import pytest

import replaystore

PACKAGE = Path(replaystore.__file__).parent
LAYER = {
    "errors": 0,
    "bounds": 1,
    "decoding": 0,
    "finding": 0,
    "compiled": 1,
    "states": 1,
    "field": 1,
    "files": 1,
    "handover": 1,
    "limiter": 1,
    "orders": 2,
    "recycler": 1,
    "sum_tree": 1,
    "schema": 2,
    "codec": 2,
    "foresight": 2,
    "index": 2,
    "metadata": 3,
    "flat": 3,
    "packed": 3,
    "ring": 3,
    "episodes": 3,
    "strata": 3,
    "slots": 3,
    "leaves": 3,
    "spans": 4,
    "root": 4,
    "head": 4,
    "windows": 4,
    "samplers": 4,
    "stats": 5,
    "sequences": 5,
    "goals": 5,
    "transforms": 6,
    "prioritized": 5,
    "sampler_file": 5,
    "appender": 5,
    "commit": 5,
    "evictions": 5,
    "arena": 5,
    "reader": 6,
    "room": 6,
    "writer": 6,
    "verify": 9,
    "catalog": 7,
    "checkpoints": 8,
    "contents": 9,
    "going_back": 9,
    "opening": 9,
    "repair": 10,
    "reservoir": 9,
    "view": 8,
    "selection": 9,
    "store": 10,
    "mixtures": 10,
    "batches": 10,
    "loader": 11,
    "dataset": 12,
    "spaces": 11,
    "recorder": 12,
    "sb3_rows": 12,
    "mixed_dataset": 13,
    "bench": 13,
    "sb3": 13,
    "cli": 14,
    "__init__": 15,
}


def imported_modules(path):
    """Modules of the package that a file imports, wherever the statement stands in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [f"replaystore.{node.module or alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "replaystore":
            names = [f"replaystore.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        parts = {name.split(".")[1] for name in names if name.startswith("replaystore.")}
        found |= {part if part in LAYER else "__init__" for part in parts}
        found |= {"__init__" for name in names if name == "replaystore"}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down(path):
    for name in imported_modules(path):
        assert LAYER[name] < LAYER[path.stem], f"{path.stem} must not import {name}"


def test_every_module_has_a_layer():
    assert {path.stem for path in PACKAGE.iterdir() if path.suffix in (".py", ".pyi")} == LAYER.keys()


def test_every_import_statement_is_found(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import replaystore\nfrom replaystore import store\nif 1:\n  from . import head\n"
        "def f():\n  import replaystore.codec as c\n  from replaystore.flat import x\n  from .ring import y\n"
        "import numpy, replaystored\n"
    )
    assert imported_modules(source) == {"__init__", "store", "head", "codec", "flat", "ring"}


@pytest.mark.parametrize("module", ["torch", "gymnasium", "zarr", "tqdm"])
def test_the_package_loads_without(module):
    code = f"import sys, replaystore; assert {module!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
