"""Imports run one way, and what is heavy is imported only when it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sitdist"

# Each may import what stands on a lower level; within a level, only what SAME_LEVEL names.
LEVELS = {
    "__main__": 9,
    "cli": 8,
    "commands": 7,
    "export": 5,
    "api": 5,
    "viewer": 6,
    "evaluate": 4,
    "train": 4,
    "data": 4,
    "scene": 2,
    "flow": 2,
    "model": 2,
    "geometry": 1,
    "io": 1,
    "checks": 1,
    "errors": 0,
    # plumbing beside the maths: for the upper levels only
    "heartbeat": 2,
    "runtime": 3,
    "config": 3,
    "runs": 3,
}
SAME_LEVEL = {("io", "geometry"), ("api", "export"), ("evaluate", "train"), ("evaluate", "data"), ("train", "data")}
MATHS = ("geometry", "flow", "model", "scene")


def imports(path):
    """Every module that a file imports, anywhere in it, as (name, line)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def part(module):
    """The folder or file of the package that a module belongs to; the package itself has none."""
    names = module.split(".")
    return names[1] if names[0] == "sitdist" and len(names) > 1 and names[1] in LEVELS else None


def files():
    return [(path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")) for path in sorted(PACKAGE.rglob("*.py"))]


def allowed(importer, imported):
    return LEVELS[importer] > LEVELS[imported] or importer == imported or (importer, imported) in SAME_LEVEL


def test_every_file_has_its_level():
    assert {own for _, own in files()} - {"__init__"} == set(LEVELS)


def test_imports_run_one_way():
    checked = [
        (f"{path.relative_to(PACKAGE)}:{line}: {own} imports {imported}", allowed(own, imported))
        for path, own in files()
        for module, line in imports(path)
        if own != "__init__" and (imported := part(module)) is not None
    ]
    assert len(checked) > 50
    assert [line for line, good in checked if not good] == []


@pytest.mark.parametrize("own", MATHS)
def test_the_maths_sees_tensors_only(own):
    seen = {module.split(".")[0] for path, folder in files() if folder == own for module, _ in imports(path)}
    assert "torch" in seen
    assert not seen & {"accelerate", "webdataset", "pydantic", "yaml", "tensorboard"}


HEAVY = ("torch", "numpy", "diffusers", "accelerate", "webdataset", "pydantic")


@pytest.mark.distributed
def test_the_package_and_the_command_line_do_not_import_what_is_heavy():
    code = f"""
import sys
import sitdist, sitdist.cli
code = sitdist.cli.main.run(["shards", "bild"])
print(code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
