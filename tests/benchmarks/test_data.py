"""The benchmark measures what it names, and its ratios are to the baselines that it names."""

import re
import shutil

import pytest
import torch

from benchmarks import measure as bench
from benchmarks.__main__ import main
from benchmarks.measure import Measure, Way, format_table, measure
from benchmarks.views import bench_views
from sitdist.build.writer import build
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.model.autoencoder import make_vae


def test_ratios_are_to_the_fastest_baselines_of_one_process_and_of_any_number():
    lines = format_table(
        "reading",
        "samples/s",
        [
            Measure("slow", 50.0, True),
            Measure("stock", 100.0, True),
            Measure("many", 400.0, True, 3),
            Measure("us", 800),
        ],
    )
    assert [line.split()[-2:] for line in lines[1:5]] == [
        ["0.50", "0.12"],
        ["1.00", "0.25"],
        ["4.00", "1.00"],
        ["8.00", "2.00"],
    ]
    assert lines[5:] == [
        "  (1) to 'stock', the fastest baseline of one process",
        "  (2) to 'many', the fastest baseline of any number of processes",
    ]
    alone = format_table("x", "y", [Measure("stock", 100.0, True), Measure("us", 50.0)])
    assert [line.split()[-1] for line in alone[:3]] == ["(1)", "1.00", "0.50"]
    assert len(alone) == 4


def test_the_best_of_all_rounds_counts_and_the_ways_take_turns():
    calls = []

    def way(name, rates):
        return Way(name, lambda: calls.append(name) or rates.pop())

    found = measure([way("a", [1.0, 3.0, 2.0]), way("b", [5.0, 4.0, 6.0])])
    assert [each.rate for each in found] == [3.0, 6.0]
    assert calls == ["a", "b"] * 3


@pytest.mark.distributed
def test_everything_is_measured_in_one_run(tiny_dataset, ball_scene, capsys):
    arguments = [
        "--samples",
        "64",
        "--batch",
        "16",
        "--views",
        "8",
        "--scene",
        str(ball_scene),
        "--synthetic",
        "100000",
    ]
    assert main(["data", str(tiny_dataset), *arguments]) == 0
    printed = capsys.readouterr().out
    for title in (
        "reading .* samples/s",
        "rendering the built-in object, 16x16 .* views/s",
        f"rendering {ball_scene}, 16x16 .* views/s",
        "encoding, 8 views at a time, one thread .* views/s",
        "building, pca codec, 1 thread .* MB/s",
    ):
        assert re.search(rf"^{title} +ratio \(1\)", printed, re.MULTILINE), title
    for way in (
        "webdataset, by batch, 2 workers",
        "sitdist reader, resident",
        "one thread, empty space not skipped",
        "random AutoencoderKL, fp32",
        "random AutoencoderKL, bf16",
        "the dataset's codec, pca",
        "webdataset, writing finished samples",
        "sitdist shards build",
    ):
        found = re.search(rf"^  {way} +\d+ +([\d,.]+) +([\d.]+)", printed, re.MULTILINE)
        assert found, way
        assert float(found[1].replace(",", "")) > 0
    share = float(re.search(r"bf16 latents differ from those of fp32 by ([\d.]+)% of their deviation", printed)[1])
    assert 0.0 < share < 10.0
    assert "synthetic: 100000 samples in 10 shards" in printed
    assert "time to the first batch at step 1000000" in printed
    rate, size = re.search(
        r"([\d.]+) views/s of .*ball are rendered, encoded and written, ([\d.]+) kB each", printed
    ).groups()
    megabytes = float(re.search(r"sitdist shards build +1 +([\d.]+)", printed)[1])
    assert float(rate) * float(size) / 1e3 == pytest.approx(megabytes, rel=0.1)


@pytest.mark.distributed
def test_the_scene_and_the_vae_are_the_datasets_own(ball_scene, tmp_path, monkeypatch):
    torch.manual_seed(0)
    make_vae(16, (4, 8)).save_pretrained(tmp_path / "vae")
    moved = shutil.copytree(ball_scene, tmp_path / "moved")
    source = {"kind": "scene", "views": 3, "scene": str(moved), "supersample": 1}
    recipe = {
        "name": "own",
        "image_size": 16,
        "codec": {"kind": "vae", "path": str(tmp_path / "vae"), "dtype": "bf16"},
        "val_views": 0,
        "splits": {"train": [{"kind": "scene", "views": 2, "label": 1, "seed": 1}, source]},
    }
    build(parse(Recipe, recipe, "own"), tmp_path / "out")
    shutil.rmtree(tmp_path / "vae")  # the one in the dataset is used
    monkeypatch.setattr(bench, "ROUNDS", 1)
    printed = "\n".join(bench_views(str(tmp_path / "out"), 2, None))
    assert f"rendering {moved}, 16x16" in printed
    assert "the dataset's AutoencoderKL, bf16" in printed
    assert "pca" not in printed
    assert "building, vae codec, 1 thread" in printed
    shutil.rmtree(moved)
    printed = "\n".join(bench_views(str(tmp_path / "out"), 2, None))
    assert "rendering the recipe's scene: not measured (" in printed
    assert "moved/scene.json: no such file" in printed
    assert "views/s of the built-in object are rendered" in printed


def test_a_scene_that_is_not_there_is_named_before_anything_is_measured(tiny_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "machine", None)  # which begins the report
    arguments = ["--samples", "16", "--batch", "16", "--views", "1", "--scene", str(tmp_path / "nowhere")]
    assert main(["data", str(tiny_dataset), *arguments]) == 2
    assert "nowhere/scene.json: no such file; make a scene with `sitdist scene fit`" in capsys.readouterr().err
