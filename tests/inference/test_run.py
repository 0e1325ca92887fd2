"""A run as every command loads it: which weights it has, and configs of earlier versions."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml

from sitdist.cli.main import run as command
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.errors import ConfigError
from sitdist.flow.estimate import EstimateOptions
from sitdist.inference.calibration import load_calibration
from sitdist.inference.load import load
from sitdist.inference.run import load_run
from sitdist.runs.averages import read_average
from sitdist.runs.checkpoint import check_same_config, folder_of, read_checkpoint
from sitdist.train.trainer import train


@pytest.fixture(scope="module")
def averaged(tiny_yaml, tmp_path_factory):
    """A run that is evaluated with another average than its EMA; never write into it."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    settings = ["train.steps=3", "train.averages={sigma_rels: [0.1]}", "evaluate.average=sigma_rel_0.1"]
    train(load_yaml(Config, tiny_yaml, settings), folder)
    return folder


def has_weights(model, tensors) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_every_command_uses_the_average_that_the_config_names(averaged, tmp_path):
    average, ema = read_average(averaged, 3, "sigma_rel_0.1"), read_checkpoint(folder_of(averaged, 3)).tensors["ema"]
    assert has_weights(load_run(averaged).model, average)
    assert has_weights(load(averaged).run.model, average)
    assert has_weights(load_run(averaged, average=None).model, ema)
    assert not has_weights(load_run(averaged, average=None).model, average)
    assert command(["export", str(averaged), str(tmp_path / "export")]) == 0
    exported = load(tmp_path / "export")
    assert has_weights(exported.run.model, average)
    assert exported.run.config.evaluate.average is None


@pytest.fixture
def old(tiny_run, tmp_path):
    """A run as versions left it that had more estimators, and called one of them otherwise."""
    run = shutil.copytree(tiny_run, tmp_path / "old")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluate"] |= {"estimator": "source", "estimator_draws": 4, "estimator_time": 0.97}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text()) | {"config": config}
        (folder / "state.json").write_text(json.dumps(state))
        data, manifest = (folder / "state.json").read_bytes(), json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_a_run_of_an_earlier_version_opens_and_goes_on(old, tiny_yaml, caplog):
    assert load_run(old).config.evaluate.estimator == "euler_249"
    (old / "config.yaml").unlink()
    loaded = load_run(old)
    assert loaded.config.evaluate.estimator == "euler_249"
    check_same_config(read_checkpoint(folder_of(old, loaded.step), ()), loaded.config)
    assert not caplog.records  # nothing is said of keys that every run of then has


def test_a_config_that_a_user_gives_may_have_the_old_name_but_not_the_old_keys(tiny_yaml):
    assert load_yaml(Config, tiny_yaml, ["evaluate.estimator=source"]).evaluate.estimator == "euler_249"
    for override in ("evaluate.estimator_time=0.9", "evaluate.estimator_draws=4"):
        with pytest.raises(ConfigError, match=r"unknown key 'evaluate.estimator_"):
            load_yaml(Config, tiny_yaml, [override])
    for override in ("evaluate.estimator=renoised", "evaluate.estimator=draws", "evaluate.readout=weighted"):
        with pytest.raises(ConfigError, match=r"evaluate\.(estimator|readout) = "):
            load_yaml(Config, tiny_yaml, [override])


def test_a_calibration_of_an_earlier_version_holds(tiny_run, tmp_path, monkeypatch):
    for module in ("sitdist.inference.calibration", "sitdist.flow.error_bars"):
        monkeypatch.setattr(f"{module}.FEWEST", 12)  # views of the tiny dataset's test split
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert command(["calibrate", str(run), "--split", "test", "--estimator", "euler_249"]) == 0
    values = json.loads((run / "calibration.json").read_text())
    values["estimator"] |= {"estimator": "source", "draws": 4, "time": 0.97, "seed": 0}
    (run / "calibration.json").write_text(json.dumps(values))
    kept, why_not = load_calibration(run, load_run(run), EstimateOptions("euler_249"))
    assert kept is not None, why_not
