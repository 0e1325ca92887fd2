"""Evaluations and builds that are killed at random moments go on to the bytes of undisturbed ones."""

import csv
import random
import shutil
import signal
import time

import pytest
import ranks
import yaml

from sitdist.dataset.verify import verify

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

KILLS = 10  # on one process, and as many on two
RECIPE = {
    "name": "killed",
    "image_size": 16,
    "codec": {"kind": "pca", "patch": 4, "fit_views": 32},
    "samples_per_shard": 8,
    "encode_batch": 4,
    "val_views": 8,
    "splits": {
        "train": {"kind": "scene", "views": 200, "supersample": 4},
        "test": {"kind": "scene", "views": 40, "seed": 1, "supersample": 4},
    },
}


def with_kills(start, last, seconds, generator):
    """Start a command again and again, and kill it at a random moment, until the `last` file that it writes is there;
    how often it died.
    """
    kills = 0
    while not last.exists():
        started = start()
        time.sleep(generator.uniform(0.1, 1.0) * seconds)
        codes = started.kill()
        assert set(codes) <= {0, -signal.SIGKILL}, started.errors()
        kills += any(codes)
    return kills


def timed(start):
    """Seconds of an undisturbed start."""
    begun = time.monotonic()
    start().run(180)
    return time.monotonic() - begun


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory, tiny_dataset):
    """The fork server has imported everything before anything is timed."""
    ranks.sitdist(tmp_path_factory.mktemp("warm"), 1, "shards", "info", tiny_dataset).run(180)


@pytest.mark.parametrize("world", [1, 2])
def test_builds_killed_at_random_moments_go_on_to_the_same_bytes(tmp_path, world):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))

    def start(out):
        return ranks.sitdist(tmp_path / "log", world, "shards", "build", recipe, "--out", out)

    seconds = timed(lambda: start(tmp_path / "undisturbed"))
    expected, generator, died = contents(tmp_path / "undisturbed"), random.Random(20 + world), 0
    out = tmp_path / "out"
    while died < KILLS:
        died += with_kills(lambda: start(out), out / "manifest.json", seconds, generator)
        assert contents(out) == expected
        assert verify(out) == []
        shutil.rmtree(out)


@pytest.mark.parametrize("world", [1, 2])
def test_evaluations_killed_at_random_moments_have_every_view_once(tmp_path, tiny_run, world):
    def start(out):
        words = ["eval", tiny_run, "--split", "test", "--batch", 1, "--out", out]
        return ranks.sitdist(tmp_path / "log", world, *words)

    seconds = timed(lambda: start(tmp_path / "undisturbed"))
    expected, generator, died = records(tmp_path / "undisturbed"), random.Random(30 + world), 0
    out = tmp_path / "out"
    while died < KILLS:
        died += with_kills(lambda: start(out), out / "report.html", seconds, generator)
        assert records(out) == expected
        assert len({row["key"] for row in expected}) == len(expected) == 12
        shutil.rmtree(out)


def records(out):
    with (out / "records.csv").open(newline="") as file:
        return list(csv.DictReader(file))
