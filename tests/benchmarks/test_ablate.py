"""The method's known mistakes: each is what it says, all run through trainer and evaluator, and a table comes out."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import ablate as module
from benchmarks.__main__ import main
from benchmarks.ablate import VARIANTS, ablate
from benchmarks.rewrite import rewrite
from sitdist.build.writer import build
from sitdist.config.experiment import ModelConfig
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.verify import verify
from sitdist.errors import ConfigError
from sitdist.geometry.packing import PoseStatistics
from sitdist.model.codec import latent_mean, load_codec

MODEL = ModelConfig(patch_size=2, hidden_size=32, depth=1, num_heads=2)
BY_NAME = {variant.name: variant for variant in VARIANTS}
TRAIN, TEST = range(48), range(12)  # of the tiny dataset


@pytest.fixture
def changed(tiny_dataset, tmp_path):
    """The tiny dataset with one mistake in it."""

    def write(name):
        change = BY_NAME[name].change(tiny_dataset, "test")
        rewrite(tiny_dataset, tmp_path / name, f"tiny-{name}", change.statistics, change.moments)
        assert verify(tmp_path / name) == []
        assert load_manifest(tmp_path / name).name == f"tiny-{name}"
        return tmp_path / name

    return write


def pictures(dataset, split, indices):
    moments = ShardReader(dataset, split).moments(indices).float()
    return load_codec(dataset / "codec").decode(latent_mean(moments))


def test_a_dataset_rewritten_without_a_change_has_the_same_samples(tiny_dataset, tmp_path):
    rewrite(tiny_dataset, tmp_path / "same", "same")
    assert verify(tmp_path / "same") == []
    for split in ("train", "val", "test"):
        for path in (tiny_dataset / split).glob("*"):
            assert (tmp_path / "same" / split / path.name).read_bytes() == path.read_bytes()


def test_flips_mirror_half_of_the_training_views_and_no_others(changed, tiny_dataset):
    data = changed("flips")
    before, after = pictures(tiny_dataset, "train", TRAIN), pictures(data, "train", TRAIN)
    error = [(after - kind).abs().flatten(1).mean(1) for kind in (before, before.flip(-1))]
    mirrored = error[0] > 0
    assert 14 < int(mirrored.sum()) < 34
    assert (error[1] < error[0])[mirrored].double().mean() > 0.9  # the codec of four numbers a patch is not symmetric
    assert error[1][mirrored].mean() < 0.5 * error[0][mirrored].mean()
    assert torch.equal(pictures(data, "test", TEST), pictures(tiny_dataset, "test", TEST))
    readers = [ShardReader(folder, "train") for folder in (tiny_dataset, data)]
    assert torch.equal(*(reader.moments_and_poses(TRAIN)[1] for reader in readers))


def test_half_range_latents_are_of_pictures_of_half_the_contrast(changed, tiny_dataset):
    data = changed("half_range")
    for split, indices in (("train", TRAIN), ("test", TEST)):
        before, after = (pictures(folder, split, indices).mean((1, 2, 3)) for folder in (tiny_dataset, data))
        torch.testing.assert_close(after, 0.5 + 0.5 * before, rtol=0, atol=0.03)  # brightness of every picture
    assert load_manifest(data).codec_psnr is None


def test_test_statistics_are_those_of_the_evaluated_views(changed):
    data = changed("test_statistics")
    poses = ShardReader(data, "test").camera_to_world()
    statistics = PoseStatistics.from_dict(load_manifest(data).statistics)
    torch.testing.assert_close(statistics.mean[:3], poses.mean(0)[:3])
    packed = ShardReader(data, "test").moments_and_poses(TEST)[1]
    assert packed[:, :3, 3].std(0, correction=0).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_joint_statistics_make_all_entries_together_have_deviation_one(changed):
    packed = ShardReader(changed("joint_statistics"), "train").moments_and_poses(TRAIN)[1][:, :3]
    assert packed.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert packed.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert packed[:, :, 3].std().item() > 1.5 * packed[:, :, :3].std().item()


def test_packed_intrinsics_survive_other_statistics(tmp_path):
    recipe = {
        "name": "zoom",
        "image_size": 16,
        "packing": "intrinsics",
        "codec": {"kind": "pca", "fit_views": 8},
        "val_views": 4,
        "splits": {"train": {"kind": "scene", "views": 12, "supersample": 1, "fov_range_deg": [20.0, 60.0]}},
    }
    build(parse(Recipe, recipe, "zoom"), tmp_path / "data")
    for name in ("test_statistics", "joint_statistics"):
        change = BY_NAME[name].change(tmp_path / "data", "val")
        rewrite(tmp_path / "data", tmp_path / name, name, change.statistics)
        assert verify(tmp_path / name) == []
        assert "intrinsics" in load_manifest(tmp_path / name).statistics


@pytest.mark.distributed  # nine runs
def test_every_variant_runs_once_and_the_table_states_what_the_evaluations_measured(
    tiny_dataset, tmp_path, monkeypatch
):
    text = ablate(tiny_dataset, tmp_path, 2, model=MODEL)
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()[4:]}
    assert list(rows) == list(BY_NAME)
    for name, cells in rows.items():
        metrics = json.loads((tmp_path / name / "eval" / "metrics.json").read_text())
        row = max(metrics["rows"], key=lambda each: each["n"])
        assert row["n"] == 12
        assert cells[2] == f"{row['rotation_error_deg']['mean']:.2f}"
        assert cells[5] == f"{row['psnr']['mean']:.2f}"
    floors = {name: float(cells[-1]) for name, cells in rows.items()}
    assert floors["sigma_0"] == 0.0
    assert floors["gain_10"] < 0.2 * floors["baseline"] < floors["baseline"] < floors["sigma_0.2"] < floors["sigma_1"]
    assert float(rows["half_range"][6]) < float(rows["baseline"][6]) - 3.0  # the codec's ceiling
    assert (tmp_path / "table.md").read_text() == text
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.height == 16 * (1 + len(VARIANTS))
    assert "joint_statistics" in (tmp_path / "table.html").read_text()

    def never(*_, **__):
        raise AssertionError("a finished variant is run again")

    for name in ("train", "evaluate", "rewrite"):
        monkeypatch.setattr(module, name, never)
    assert ablate(tiny_dataset, tmp_path, 2, model=MODEL) == text
    with pytest.raises(ConfigError, match="was begun with steps 2, not 3; give another --out"):
        ablate(tiny_dataset, tmp_path, 3, model=MODEL)


def test_the_command_names_its_mistakes(tiny_dataset, tmp_path, capsys, monkeypatch):
    assert main(["ablate", str(tiny_dataset), "--out", str(tmp_path), "--split", "train"]) == 2
    assert "--split train: not to be evaluated" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ablate", str(tiny_dataset), "--out", str(tmp_path)]) == 2
    assert "runs in one process; start it without a launcher" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
