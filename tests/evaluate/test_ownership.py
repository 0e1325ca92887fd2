"""Where commands of evaluation write and where they do not, and requests that cannot be met: one line, exit code 2."""

import json
import shutil

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.pose import Errors, bench_pose
from sitdist.cli import main as cli
from sitdist.errors import ConfigError, DataError, OutOfMemoryError
from sitdist.evaluate.evaluator import EvalOptions, evaluate
from sitdist.evaluate.likelihood import split_likelihood
from sitdist.evaluate.measures import BINS_AT_MOST
from sitdist.io.ownership import only_writer

RECIPE = """
name: cameras
image_size: 16
codec: {kind: pca, fit_views: 8}
val_views: 2
splits: {train: {kind: scene, views: 6}, test: {kind: scene, views: 3, seed: 1}}
"""


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """The report has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sitdist.evaluate.report.write_report", lambda folder: folder / "report.html")
        yield


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that must be refused in one line, with nothing changed in tmp_path; gives the line."""

    def run(*arguments):
        before = everything(tmp_path)
        program = benchmarks.main if arguments[0] in ("ablate", "pose", "data") else cli.run
        assert program([str(argument) for argument in arguments]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sitdist: error: ")]
        assert len(lines) == 1
        assert everything(tmp_path) == before
        return lines[0]

    return run


def theirs(folder):
    """A folder of somebody else."""
    folder.mkdir(parents=True)
    (folder / "holiday.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("command", [["eval", "RUN"], ["ablate", "DATA", "--steps", "1"]])
def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_is(command, tiny_run, tiny_dataset, tmp_path, refused):
    words = [{"RUN": str(tiny_run), "DATA": str(tiny_dataset)}.get(word, word) for word in command]
    assert "not empty, and no" in refused(*words, "--out", theirs(tmp_path / "theirs"))
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(*words, "--out", tmp_path / "file")
    with only_writer(tmp_path / "cache", "cache"):
        pass
    assert "holds a sitdist cache, not a" in refused(*words, "--out", tmp_path / "cache")
    shutil.copytree(tiny_run, tmp_path / "run")
    assert f"{tmp_path / 'run'}: " in refused(*words, "--out", tmp_path / "run")


def test_an_experiments_folder_that_is_not_ours_is_refused_before_anything_is_written(tiny_run, tmp_path, refused):
    theirs(tmp_path / "new" / "turntable")
    (tmp_path / "new" / "sitdist.json").write_text('{"kind": "evaluation"}')
    for experiment in ("turntable", "all"):
        line = refused("eval", tiny_run, "--out", tmp_path / "new", "--experiment", experiment)
        assert f"{tmp_path / 'new' / 'turntable'}: not empty" in line


def test_an_evaluation_in_use_and_one_of_before_there_were_marks(tiny_run, tmp_path, refused, caplog):
    options = EvalOptions(split="test", max_views=2, out=tmp_path / "out")
    command = ("eval", tiny_run, "--split", "test", "--max-views", "2", "--out", tmp_path / "out")
    evaluate(tiny_run, options)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    with only_writer(tmp_path / "out", "evaluation"):
        assert "in use by process" in refused(*command)
    for name in ("sitdist.json", "sitdist.lock"):
        (tmp_path / "out" / name).unlink()
    for unit in (tmp_path / "out" / "units").glob("*.jsonl"):  # as it was written before units had a checksum
        unit.write_text("".join(unit.read_text().splitlines(keepends=True)[1:]))
    assert "with seed 0, not 3; give another --out" in refused(*command, "--seed", "3")
    evaluate(tiny_run, options)
    assert "has no checksum, as those of earlier versions; measured again (2 of 2 units)" in caplog.text
    again = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert again["rows"] == metrics["rows"]
    assert list((tmp_path / "out" / "claims").iterdir()) == []


def test_an_ablation_in_use_or_of_another_plan(tiny_dataset, tmp_path, refused):
    command = ("ablate", tiny_dataset, "--out", tmp_path / "out", "--steps", "1")
    with only_writer(tmp_path / "out", "ablation"):
        assert "in use by process" in refused(*command)
    (tmp_path / "out" / "ablation.json").write_text('{"steps": 7}')
    assert "was begun with dataset None, not " in refused(*command)
    (tmp_path / "out" / "ablation.json").write_text("[")
    assert "ablation.json: damaged" in refused(*command)


def test_a_background_does_not_make_an_evaluation_another_one(tiny_run, tmp_path):
    options = EvalOptions(split="test", max_views=1, out=tmp_path / "out", set=("evaluate.background=[1, 1, 0.5]",))
    assert evaluate(tiny_run, options) == evaluate(tiny_run, options)


def test_a_plan_that_is_not_one_is_refused(tiny_run, tmp_path, refused):
    command = ("eval", tiny_run, "--split", "test", "--max-views", "1", "--out", tmp_path / "out")
    evaluate(tiny_run, EvalOptions(split="test", max_views=1, out=tmp_path / "out"))
    for text in ("", "[]", '{"seed": NaN}', "[" * 100_000, json.dumps({"seed": "x" * 10**6})):
        (tmp_path / "out" / "plan.json").write_text(text)
        line = refused(*command)
        assert str(tmp_path / "out") in line
        assert len(line) < 600


FILES = {
    "likelihood": ["likelihood", "RUN", "--views", "2", "--steps", "1", "--probes", "1", "--out", "FILE"],
    "bench pose": ["pose", "RUN", "--views", "1", "--json", "FILE"],
    "ema reconstruct": ["ema", "reconstruct", "RUN", "--sigma-rel", "0.1", "--out", "FILE"],
    "shards cameras": ["shards", "cameras", "RECIPE", "--split", "test", "--out", "FILE"],
    "its transforms": ["shards", "cameras", "RECIPE", "--split", "test", "--out", "OTHER", "--transforms", "FILE"],
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_is_refused_before_any_work_is_done(
    name, tiny_run, tmp_path, refused, capsys, monkeypatch
):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    places = {"RUN": tiny_run, "FILE": tmp_path / "file", "RECIPE": tmp_path / "recipe.yaml", "OTHER": tmp_path / "o"}
    words = [str(places.get(word, word)) for word in FILES[name]]
    with monkeypatch.context() as patch:
        for work in ("sitdist.evaluate.likelihood.load_run", "benchmarks.pose.load_run"):
            patch.setattr(work, None)
        patch.setattr("sitdist.runs.averages.reconstruct", None)
        patch.setattr("sitdist.build.camera_path.recipe_cameras", None)
        (tmp_path / "file").write_text("mine")
        assert f"{tmp_path / 'file'}: already exists; give another name or --overwrite" in refused(*words)
        (tmp_path / "file").unlink()
        (tmp_path / "file").mkdir()
        assert f"{tmp_path / 'file'}: already exists; give another name" in refused(*words, "--overwrite")
    (tmp_path / "file").rmdir()
    (tmp_path / "file").write_text("mine")
    if name in ("likelihood", "shards cameras", "its transforms"):
        assert cli.run([*words, "--overwrite"]) == 0
        assert (tmp_path / "file").read_text() != "mine"


def test_what_is_no_run_is_not_calibrated(tiny_dataset, tmp_path, refused):
    assert f"{tmp_path / 'theirs'}: " in refused("calibrate", theirs(tmp_path / "theirs"), "--split", "val")


# ------------------------------------------------------------------------------------------------------------ requests


@pytest.fixture(scope="module")
def with_an_empty_split(tiny_dataset, tmp_path_factory):
    """The tiny dataset with a split `none` of no views."""
    folder = shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("data") / "tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["none"] = manifest["splits"]["test"] | {"count": 0, "shards": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("split", ["nowhere", "none", "../test", ""])
def test_a_split_that_is_not_there_or_empty(split, tiny_run, with_an_empty_split, tmp_path, refused):
    more = ("--split", split, "--data", with_an_empty_split)
    for command in (["eval", tiny_run, "--out", tmp_path / "out"], ["likelihood", tiny_run], ["calibrate", tiny_run]):
        line = refused(*command, *more)
        assert "split" in line
        assert not (tmp_path / "out").exists()
    if split != "none":
        assert f"no split '{split}'" in refused("pose", tiny_run, "--split", split)


@pytest.mark.parametrize(
    "values",
    [
        {"views": 0},
        {"probes": 0},
        {"steps": 0},
        {"batch": 0},
        {"steps": 10**9},
        {"probes": 10**9},
    ],
)
def test_likelihoods_that_cannot_be_had(values, tiny_run):
    (name,) = values
    error = OutOfMemoryError if name == "probes" and values[name] else ConfigError
    with pytest.raises(error, match=r"GB of memory" if error is OutOfMemoryError else rf"--{name} "):
        split_likelihood(tiny_run, **values)


def test_densities_that_are_not_finite_are_not_written(tiny_run, tmp_path, monkeypatch):
    def diverged(model, path, latents, *_):
        return torch.full((len(latents),), torch.nan, dtype=torch.float64)

    monkeypatch.setattr("sitdist.evaluate.likelihood.log_likelihood", diverged)
    with pytest.raises(DataError, match="its log density is nan; the checkpoint has diverged"):
        split_likelihood(tiny_run, views=2, out=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_benches_of_poses_that_cannot_be_had(tiny_run, monkeypatch):
    for views, batch in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match=r"--(views|batch) 0: expected"):
            bench_pose([tiny_run], "test", views, batch, "cpu")
    monkeypatch.setattr("benchmarks.pose.WAYS", ())
    with pytest.raises(OutOfMemoryError, match=r"a batch of 1,000,000,000 views: .* GB of memory"):
        bench_pose([tiny_run], "test", 1, 10**9, "cpu")
    with pytest.raises(DataError, match="not finite"):
        Errors.of(torch.full((1, 4, 4), torch.nan), torch.eye(4)[None])


def test_more_synthetic_samples_than_a_dataset_can_have(tiny_dataset, refused):
    assert "--synthetic 1000000000000: expected" in refused("data", tiny_dataset, "--synthetic", "1000000000000")


@pytest.mark.parametrize(
    "options",
    [
        {"radii": (1, 10**9), "views_per_radius": 1},
        {"radii": (1, BINS_AT_MOST + 1), "views_per_radius": 1000},
        {"radii": (1, float("inf")), "split": "test"},
        {"radii": (1, 2.5), "split": "test"},
        {"views_per_radius": True},
        {"max_views": 0},
    ],
)
def test_views_that_cannot_be_evaluated_are_refused_at_once(options, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match=r"--(radii|views-per-radius|max-views) "):
        evaluate(tiny_run, EvalOptions(**options, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
