"""An exported folder is all that inference needs: it gives the run's own numbers where there is nothing else."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sitdist
from sitdist.cli import main as cli
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.errors import CheckpointError, CodecError, DataError, SitdistError
from sitdist.evaluate.measures import MEASURES
from sitdist.evaluate.report.tables import results_markdown
from sitdist.flow.error_bars import LEVELS, Bars, Calibration, Trust
from sitdist.inference.calibration import RunCalibration
from sitdist.inference.export import export_run
from sitdist.io.atomic import file_sha256
from sitdist.io.files import write_json
from sitdist.runs.checkpoint import read_newest
from sitdist.train.trainer import train

USE = """
import sys, torch, sitdist
assert "torch" in sys.modules and "sitdist.inference.flow" not in sys.modules
torch.set_num_threads(1)
flow = sitdist.load(sys.argv[1])
pictures = flow.render(flow.turntable(3))
estimate = flow.estimate(pictures)
torch.save([pictures, estimate.camera_to_world, estimate.spread], sys.argv[2])
"""


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    assert cli.run(["export", str(tiny_run), str(folder)]) == 0
    return folder


@pytest.mark.distributed
def test_a_fresh_process_without_the_dataset_gives_the_runs_own_numbers(tiny_run, exported, tmp_path):
    alone = tmp_path / "elsewhere" / "model"
    shutil.copytree(exported, alone)
    assert not any(str(tiny_run.parent) in path.read_text() for path in alone.rglob("*.json"))
    subprocess.run([sys.executable, "-c", USE, str(alone), str(tmp_path / "out.pt")], check=True, cwd=tmp_path)
    flow = sitdist.load(tiny_run)
    pictures = flow.render(flow.turntable(3))
    estimate = flow.estimate(pictures)
    for theirs, ours in zip(
        torch.load(tmp_path / "out.pt"), (pictures, estimate.camera_to_world, estimate.spread), strict=True
    ):
        assert torch.equal(theirs, ours)


def test_the_folder_holds_the_averaged_weights_and_no_more_than_is_needed(tiny_run, exported):
    files = sorted(str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "codec/codec.json",
        "codec/weights.safetensors",
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    ema = read_newest(tiny_run, ["ema"]).tensors["ema"]
    weights = load_file(exported / "model.safetensors")
    assert weights.keys() == ema.keys()
    assert all(torch.equal(weights[name], ema[name]) for name in ema)
    manifest = json.loads((exported / "manifest.json").read_text())
    assert all(split["shards"] == [] for split in manifest["splits"].values())


def test_the_model_card_has_the_measured_results(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    bars = Bars(0.5, (0.0, 1.0, 2.0), LEVELS, 1.0)
    fitted = Calibration(bars, bars, Trust((0.0,) * 3, (1.0,) * 3, (-1.0, 2.0)), None)
    estimator = {"estimator": "one_step", "readout": "look_at"}
    calibration = RunCalibration(fitted, "0" * 64, estimator, "/some/place", "val", "1" * 64, 3).to_dict()
    write_json(run / "calibration.json", calibration)
    for name, psnr, step in (("test", 21.456, 6), ("other", 19.0, 3)):
        row = {key: {"mean": 0.1, "median": 0.1, "n": 64} for key in MEASURES}
        row |= {"name": "r in [3, 5]|<b>\n", "radius": [3, 5], "n": 64, "psnr": {"mean": psnr, "median": psnr, "n": 64}}
        row["rotation_error_deg"] = {"mean": 1.234, "median": 1.0, "n": 64, "share_under_5_deg": 1.0}
        metrics = {"run": "r", "dataset": "d", "split": name, "step": step, "estimator": "one_step", "rows": [row]}
        metrics |= {"generator": "heun", "generator_steps": 10, "seed": 0, "sigma": 0.1, "noise_floor": None}
        metrics |= {"function_evaluations": 1, "lpips": "not measured", "training_radius": [3.0, 5.0], "versions": {}}
        write_json(run / "eval" / name / "metrics.json", metrics | {"training_views": {"count": 9, "compared": 9}})
    export_run(run, tmp_path / "out", results=results_markdown)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sitdist\n")
    assert "| r in [3, 5]  b  n | 64 | 1.23 / 1.00 | 0.100 | 21.46 | 0.100 |" in card
    assert "Split `other` (of the weights after 3 steps), estimator `one_step`:" in card
    assert "Split `test`, estimator `one_step`:" in card
    written = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert written == json.loads(json.dumps(calibration)) | {"dataset": "tiny"}
    assert "fitted on 3 views of `val` for the estimator `one_step`, read out by `look_at` |" in card
    assert "| frame of the poses | the dataset's own |" in card


def test_an_older_step_is_exported(tiny_yaml, tmp_path):
    train(load_yaml(Config, tiny_yaml, ["train.checkpoint_every=2", "train.keep_checkpoints=9"]), tmp_path / "run")
    assert cli.run(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "2"]) == 0
    assert sitdist.load(tmp_path / "out").run.step == 2


def test_a_model_of_another_prediction_comes_back(tiny_yaml, tmp_path):
    train(load_yaml(Config, tiny_yaml, ["flow.prediction=x0", "train.steps=2"]), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    ours, theirs = sitdist.load(tmp_path / "run"), sitdist.load(tmp_path / "out")
    assert torch.equal(ours.render(ours.turntable(2)), theirs.render(theirs.turntable(2)))


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_there_is_kept_and_a_failure_leaves_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    assert cli.run(["export", str(tiny_run), str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.endswith("there: already exists; give another name\n")
    assert cli.run(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none: has no whole checkpoint" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sitdist.inference.export.save_file", full)
    with pytest.raises(DataError, match="No space left on device"):
        export_run(tiny_run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def edit(name, change):
    def spoil(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return spoil


def flip(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (flip, CheckpointError, r"model\.safetensors: damaged or altered"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            CheckpointError,
            r"model\.safetensors: cannot be read",
        ),
        (lambda folder: (folder / "manifest.json").unlink(), CheckpointError, r"manifest\.json: missing"),
        (lambda folder: shutil.rmtree(folder / "codec"), CodecError, r"codec\.json: cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointError, r"config\.json: damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), CheckpointError, "which is no sitdist model"),
        (
            edit("config.json", lambda v: v.update(format_version=9)),
            CheckpointError,
            "format_version 9 but this sitdist",
        ),
        (edit("config.json", lambda v: v.pop("framing")), CheckpointError, r"config\.json: 'framing' is missing"),
        (edit("config.json", lambda v: v["config"]["model"].update(depth=3)), CheckpointError, "tensor .* is absent"),
        (edit("manifest.json", lambda v: v["codec"].update(kind="vae")), CodecError, "kind is 'pca' but"),
    ],
)
def test_an_export_that_is_damaged_is_refused_in_one_line(exported, tmp_path, spoil, error, message):
    folder = shutil.copytree(exported, tmp_path / "model")
    spoil(folder)
    with pytest.raises(error, match=message) as refused:
        sitdist.load(folder)
    assert "\n" not in str(refused.value)


def reweigh(change):
    """Change the weights, with the hash to match."""

    def spoil(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        edit("config.json", lambda v: v.update(weights_sha256=file_sha256(path)))(folder)

    return spoil


def set_to(key, value, name="config.json"):
    """Set a key such as framing.size."""

    def change(values):
        *parents, last = key.split(".")
        for parent in parents:
            values = values[parent]
        values[last] = value

    return edit(name, change)


BIAS = "x_embedder.proj.bias"


@pytest.mark.parametrize(
    "spoil",
    [
        reweigh(lambda tensors: tensors[BIAS].fill_(math.nan)),
        reweigh(lambda tensors: tensors.update({BIAS: tensors[BIAS].to(torch.float8_e4m3fn)})),
        reweigh(lambda tensors: tensors.update({BIAS: torch.zeros(10**6)})),
        reweigh(lambda tensors: tensors.pop(BIAS)),
        reweigh(lambda tensors: tensors.clear()),
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        *(set_to("step", step) for step in (-1, "6", None)),
        *(set_to("weights_sha256", sha) for sha in ("", "x" * 64)),
        *(set_to("framing", preprocess) for preprocess in ({}, [], None, 16)),
        *(set_to("framing.size", size) for size in (0, 10**9, 32, "16")),
        set_to("framing.camera", [0.0, 0.0, 0.5, 0.5]),
        set_to("framing.camera", [math.nan, 1.0, 0.5, 0.5]),
        set_to("framing.camera", [1.0, 1.0, 0.5]),
        set_to("framing.camera", 1.0),
        *(set_to("framing.backgrounds", {"0": colour}) for colour in ([2.0, 0, 0], [-1.0, 0, 0], [0, 0], "red", None)),
        *(set_to("framing.backgrounds", {label: [0.5, 0.5, 0.5]}) for label in ("", "-1", "x", "9" * 5000)),
        *(set_to("config", config) for config in ([], {})),
        set_to("config.flow.unknown", 1),
        set_to("config.model.hidden_size", 10**7),
        set_to("unknown", 1),
        set_to("patch", 2, "codec/codec.json"),
        lambda folder: (folder / "manifest.json").write_text("{"),
        set_to("image_size", 10**9, "manifest.json"),
    ],
)
def test_an_absurd_export_is_refused_in_one_line_and_stays_as_it_was(exported, tmp_path, spoil):
    folder = shutil.copytree(exported, tmp_path / "model")
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SitdistError) as refused:
        sitdist.load(folder)
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_no_file_but_a_codecs_own_leaves_with_an_export(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "secret").write_text("mine")
    (run / "codec" / "notes.json").symlink_to(tmp_path / "secret")
    export_run(run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "codec").iterdir()} == {"codec.json", "weights.safetensors"}
    for path in (run / "codec").glob("[cw]*"):
        assert (tmp_path / "out" / "codec" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"rows": [1]}', '{"rows": 7}', '{"rows": [{"name": "x"}]}', "[" * 100_000]
)
def test_results_that_are_damaged_are_named_and_nothing_is_exported(tiny_run, tmp_path, text):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "eval" / "test").mkdir(parents=True)
    (run / "eval" / "test" / "metrics.json").write_text(text)
    with pytest.raises(DataError, match=r"metrics\.json: .*; run `sitdist eval` again"):
        export_run(run, tmp_path / "out", results=results_markdown)
    assert not (tmp_path / "out").exists()
