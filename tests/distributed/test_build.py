"""Shards built by any number of processes, killed, out of disk or undisturbed, are the same bytes."""

import shutil
import signal
import subprocess

import pytest
import ranks
import yaml

from sitdist.build.writer import build
from sitdist.config.load import load_yaml
from sitdist.config.recipe import Recipe
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.verify import verify

pytestmark = pytest.mark.distributed

RECIPE = {
    "name": "shared",
    "image_size": 16,
    "codec": {"kind": "pca", "patch": 4, "fit_views": 16},
    "samples_per_shard": 7,
    "encode_batch": 4,
    "val_views": 6,
    "splits": {
        "train": [
            {"kind": "scene", "views": 31, "name": "chair"},
            {"kind": "scene", "views": 17, "label": 1, "background": [1.0, 1.0, 1.0]},
        ],
        "test": {"kind": "scene", "views": 12, "radius_bins": [1, 2, 4, 7], "seed": 1, "roll_deg": 20},
    },
}
GRACE = 20  # seconds after the first failure; all are expected to need about one


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "shared.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def expected(recipe, tmp_path_factory):
    """All files of the dataset, as this process alone builds them."""
    out = tmp_path_factory.mktemp("expected") / "out"
    build(load_yaml(Recipe, recipe), out)
    return contents(out)


@pytest.fixture
def start(recipe, tmp_path):
    """Start a build into `out` on some processes; `task` may do more than the command."""

    def run(world, out, task=None, task_arguments=()):
        arguments = ["shards", "build", str(recipe), "--out", str(out)]
        if task is None:
            return ranks.sitdist(tmp_path / "log", world, *arguments)
        return ranks.Ranks(tmp_path / "log", world, task, *task_arguments, *arguments)

    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_builds_the_same_bytes(start, expected, tmp_path, world):
    started = start(world, tmp_path / "out")
    started.run()
    assert contents(tmp_path / "out") == expected
    assert verify(tmp_path / "out") == []
    main, *others = started.errors_by_rank()
    assert "60/60 [" in main  # the progress line counts the views of all processes
    assert "view/s]" in main
    assert others == [""] * (world - 1)
    assert [(tmp_path / "log" / f"rank_{rank}.out").read_text() != "" for rank in range(world)] == [
        rank == 0 for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "own", "number", "then"), [(1, 0, 2, 2), (2, 0, 1, 2), (2, 1, 0, 4), (4, 2, 1, 1)])
def test_a_build_of_which_a_process_is_killed_goes_on_to_the_same_bytes(
    start, expected, tmp_path, world, own, number, then
):
    from tasks import build_and_die

    out = tmp_path / "out"
    codes = start(world, out, build_and_die, [own, number]).wait(grace=GRACE)
    assert codes[own] == -signal.SIGKILL
    assert all(code > 0 for rank, code in enumerate(codes) if rank != own)  # by themselves
    assert len(list(out.rglob(".sitdist-*.tmp"))) == 1  # it was cut off inside
    assert not (out / "manifest.json").exists()
    whole = {path: path.stat().st_mtime_ns for path in out.rglob("*.index.npz")}
    start(then, out).run()
    assert contents(out) == expected
    assert {path: path.stat().st_mtime_ns for path in whole} == whole  # what was whole is not made again


def mount(folder, *options):
    return subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 160 KiB; where nothing can be mounted, the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder, "-t", "tmpfs", "-o", "size=160k", "tmpfs")
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_gets_full_is_one_line_and_the_build_goes_on_when_there_is_room(
    start, expected, small_disk, tmp_path, world
):
    out = small_disk / "out"
    started = start(world, out)
    assert started.wait(grace=GRACE) == [2] * world, started.errors()
    lines = [line for line in started.errors().splitlines() if "error" in line]
    assert len(lines) == 1, started.errors()
    assert f"{out}/" in lines[0]
    assert "cannot be written (No space left on device); free space or name a folder you may write to" in lines[0]
    assert list(out.rglob("*.index.npz"))  # some of it is there
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob(".sitdist-*.tmp"))

    assert mount(small_disk, "-o", "remount,size=8m").returncode == 0
    start(world, out).run()
    assert contents(out) == expected


def test_what_is_wrong_with_the_recipe_is_said_once_and_leaves_nothing(recipe, tmp_path):
    arguments = ["shards", "build", recipe, "--out", tmp_path / "out", "--set", "val_views=48"]
    started = ranks.sitdist(tmp_path / "log", 2, *arguments)
    assert started.wait(grace=GRACE) == [2, 2]
    assert started.errors() == "sitdist: error: val_views 48 leaves none of the 48 training views to train on\n"
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_views(tmp_path):
    """Twice the views, all in one shard, where each takes 300 kB: 150 MB more on disk, at most 40 MB more in memory."""
    from tasks import build_large

    recipe = RECIPE | {"samples_per_shard": 100_000, "val_views": 0}
    peaks = []
    for views in (500, 1000):
        splits = {"train": {"kind": "scene", "views": 16}, "test": {"kind": "scene", "views": views, "seed": 1}}
        out = tmp_path / str(views)
        ranks.Ranks(tmp_path / "log", 1, build_large, recipe | {"splits": splits}, 300_000, out).run()
        assert load_manifest(out).splits["test"].shards[0].bytes > 300_000 * views
        peaks.append(int((out / "peak").read_text()))
        shutil.rmtree(out)
    print(f"peaks: {[round(peak / 1e6) for peak in peaks]} MB")
    assert peaks[1] - peaks[0] < 40e6
