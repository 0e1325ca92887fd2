"""Imports run one way, file by file, and what is heavy is imported only when it is needed."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sitdist

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sitdist"

# A room may import what stands on a lower level; within a level, only what SAME_LEVEL names.
LEVELS = {
    "errors": 0,
    "checks": 1,
    "geometry": 2,
    "io": 2,
    "flow": 3,
    "model": 3,
    "config": 3,
    "distributed": 3,
    "dataset": 4,
    "scene": 4,
    "runs": 5,
    "inference": 6,
    "build": 7,
    "train": 7,
    "evaluate": 7,
    "cli": 8,
    "__main__": 9,
}
SAME_LEVEL = {  # a camera read from a file; a codec is trained, too; a config names solvers and estimators
    ("io", "geometry"),
    ("build", "train"),
    ("config", "flow"),
}
MATHS = ("geometry", "flow", "model")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for folder in ("sitdist", "benchmarks") for path in (ROOT / folder).rglob("*.py")}


def imports(path):
    """Every module that a file imports, anywhere in it; of ours, the file that is imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


IMPORTS = {module: imports(path) for module, path in MODULES.items()}


def room(module):
    """The folder or file of the package that a module belongs to; the package itself and benchmarks have none."""
    names = module.split(".")
    return names[1] if names[0] == "sitdist" and len(names) > 1 else None


def test_every_room_has_its_level():
    assert {room(module) for module in MODULES} - {None} == set(LEVELS)


def test_imports_run_one_way():
    pairs = [(own, other) for own in MODULES for other in IMPORTS[own] if room(own) and room(other)]
    pairs = [(own, other) for own, other in pairs if room(own) != room(other)]
    assert len(pairs) > 200
    wrong = [
        f"{own} imports {other}"
        for own, other in pairs
        if LEVELS[room(own)] <= LEVELS[room(other)] and (room(own), room(other)) not in SAME_LEVEL
    ]
    assert wrong == []


def test_the_package_imports_no_benchmark():
    assert [own for own in MODULES if room(own) for other in IMPORTS[own] if other.startswith("benchmarks")] == []


def test_no_file_imports_in_a_circle():
    ours = {own: {other for other in IMPORTS[own] if other in MODULES} for own in MODULES}
    ours.pop("sitdist")  # its names are imported when they are first asked for
    order = list(TopologicalSorter(ours).static_order())  # raises CycleError with the circle
    assert len(order) > 100


@pytest.mark.parametrize("own", MATHS)
def test_the_maths_sees_tensors_only(own):
    seen = {other.split(".")[0] for module in MODULES if room(module) == own for other in IMPORTS[module]}
    assert "torch" in seen
    assert not seen & {"accelerate", "webdataset", "pydantic", "yaml", "tensorboard"}


HEAVY = ("torch", "numpy", "diffusers", "accelerate", "webdataset", "pydantic")


ANSWERS = [  # arguments, exit code, and what they do not import
    (["--help"], 0, HEAVY),
    (["shards", "bild"], 2, HEAVY),
    (["render", "RUN", "--turntable", "x"], 2, ("torch",)),
    (["shards", "info", "DATASET"], 0, ("torch",)),
    (["shards", "info", "nowhere"], 2, ("torch",)),
    (["checkpoint", "list", "RUN"], 0, ("torch",)),
    (["checkpoint", "list", "nowhere"], 2, ("torch",)),
    (["train", "nowhere.yaml", "--out", "out"], 2, ("torch",)),
    (["eval", "nowhere"], 2, ("torch",)),
]


@pytest.mark.distributed
def test_what_needs_no_tensor_is_answered_without_importing_what_is_heavy(tiny_dataset, tiny_run, tmp_path):
    for words, code, heavy in ANSWERS:
        arguments = [{"DATASET": str(tiny_dataset), "RUN": str(tiny_run)}.get(word, word) for word in words]
        program = f"""
import sys
import sitdist
from sitdist.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    print(end.code or 0, [name for name in {heavy!r} if name in sys.modules])
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.splitlines()[-1] == f"{code} []", words


def test_the_public_names_are_there():
    assert set(sitdist.__all__) == set(dir(sitdist))
    for name in sitdist.__all__:
        assert getattr(sitdist, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        sitdist.lode  # noqa: B018
