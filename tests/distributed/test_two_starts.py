"""Two processes started on one folder at the same moment: one works, the other stops and names it; nothing is lost."""

import os
import re
import socket

import pytest
import ranks
import yaml

from sitdist.runs.checkpoint import list_checkpoints

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STARTS = 20
RECIPE = {
    "name": "twice",
    "image_size": 16,
    "codec": {"kind": "pca", "patch": 4, "fit_views": 16},
    "samples_per_shard": 100,
    "encode_batch": 4,
    "val_views": 0,
    "splits": {"train": {"kind": "scene", "views": 1500}},  # several seconds, so that both are there at once
}


@pytest.fixture(scope="module")
def commands(tiny_yaml, tiny_run, tmp_path_factory):
    """What is started twice: the words before --out, and those after it, by kind."""
    recipe = tmp_path_factory.mktemp("twice") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    steps = ranks.settings("train.steps=240", "train.checkpoint_every=80")
    return {
        "train": (["train", tiny_yaml], steps),
        "eval": (["eval", tiny_run, "--split", "test", "--batch", 1], []),
        "build": (["shards", "build", recipe], []),
    }


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    """What a single start of a kind leaves."""
    done = {}

    def result(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            before, after = commands[kind]
            ranks.sitdist(folder / "log", 1, *before, "--out", folder / "out", *after).run(180)
            done[kind] = results(kind, folder / "out")
        return done[kind]

    return result


def results(kind, out):
    """The files that a command of a kind is started for, by name."""
    found = {
        "train": lambda: [path for folder in list_checkpoints(out) for path in folder.glob("*.safetensors")],
        "eval": lambda: [out / "records.csv", out / "images.npz"],
        "build": lambda: [path for path in out.rglob("*") if path.is_file() and path.name != "sitdist.lock"],
    }[kind]()
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.mark.parametrize("kind", ["train", "eval", "build"])
def test_one_of_two_works_and_the_other_stops_with_its_name(commands, undisturbed, tmp_path, kind):
    from tasks import start_together

    expected = undisturbed(kind)
    before, after = commands[kind]
    for attempt in range(STARTS):
        folder = tmp_path / str(attempt)
        out, gate = folder / "out", folder / "gate"
        gate.mkdir(parents=True)
        words = [str(word) for word in (*before, "--out", out, *after)]
        both = [ranks.Ranks(folder / f"log{own}", 1, start_together, gate, own, 2, *words) for own in range(2)]
        codes = [each.wait(180)[0] for each in both]
        said = [each.errors() for each in both]
        assert sorted(codes) == [0, 2], said
        stopped = codes.index(2)
        errors = [line for line in said[stopped].splitlines() if line.startswith("sitdist: error: ")]
        assert len(errors) == 1, said[stopped]
        assert "Traceback" not in said[0] + said[1]
        holder = re.search(r"in use by process (\d+) on (\S+), since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", errors[0])
        assert holder, errors[0]
        assert holder.groups() == ((gate / str(1 - stopped)).read_text(), socket.gethostname())
        assert str(out) in errors[0]
        assert results(kind, out) == expected, attempt
        assert not list(out.rglob(".sitdist-*"))
        assert os.path.lexists(out / "sitdist.json")
