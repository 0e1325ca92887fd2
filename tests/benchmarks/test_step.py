"""The training benchmark: what its table says is what was measured, and its baselines train."""

import os
import re
import signal

import pytest
import torch

from benchmarks import step as bench
from benchmarks.__main__ import main
from benchmarks.baseline import RemoteBaseline
from benchmarks.plain_loop import PlainLoop, random_vae
from benchmarks.step import BenchOptions, Speed, bench_train, peak_flops
from sitdist.build.writer import build
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.errors import ConfigError, ProcessError
from sitdist.flow.interpolant import get_interpolant
from sitdist.model.flops import training_flops
from sitdist.model.sit import SiT
from sitdist.train.memory import memory_of_step


def small_model():
    torch.manual_seed(0)
    return SiT(input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=1, num_heads=2)


@pytest.mark.parametrize("with_vae", [False, True])
def test_the_plain_loop_learns_and_its_average_follows(with_vae):
    model, poses = small_model(), torch.randn(8, 4, 4)
    vae = random_vae((8, 8, 8, 8)) if with_vae else None
    samples = torch.rand(8, 3, 32, 32) if with_vae else torch.randn(8, 4, 4, 4)
    loop = PlainLoop(model, get_interpolant("linear"), samples, poses, 4, vae)
    for group in loop.optimizer.param_groups:
        group["lr"] = 1e-2
    before = model.blocks[0].mlp.fc1.weight.detach().clone()
    losses = [loop.step() for _ in range(30)]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    moved = model.blocks[0].mlp.fc1.weight.detach() - before
    averaged = loop.ema.blocks[0].mlp.fc1.weight - before
    share = float((averaged * moved).sum() / moved.square().sum())
    assert 0.0005 < share < 0.003  # 30 updates of decay 0.9999


def test_the_ratio_is_the_median_of_the_pairs_ratios():
    speed = Speed("fp32", ours=[1.0, 10.0, 2.0], baseline=[2.0, 10.0, 8.0], memory=None)
    assert speed.ratio == 2.0


@pytest.mark.distributed
def test_the_table_tells_the_rates_that_were_measured(monkeypatch):
    monkeypatch.setattr(bench, "_pair", lambda *_: (0.5, 2.0))
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 1e12)
    options = BenchOptions("SiT-S/8", latent=16, batch=4, pairs=2, backends=("fp32", "bf16"))
    report = bench_train(options)
    with torch.device("meta"):
        flops = 4 * training_flops(SiT(16, 8, 4, 384, 12, 6))
    rows = {line[:40].strip(): line[40:].split() for line in report.splitlines() if "fp32" in line or "bf16" in line}
    assert rows["plain loop, fp32, precomputed latents"][:2] == ["0.500", "2.0"]
    for backend in ("fp32", "bf16"):
        row = rows[f"sitdist, {backend}"]
        assert row[:2] == ["2.000", "8.0"]
        assert float(row[2].rstrip("%")) == pytest.approx(100 * flops / 0.5 / 1e12, abs=0.06)
        assert row[4] == "4.00"
        if row[3] != "-":  # weights, average and two moments of 33 million parameters, and gradients
            assert 0.5 < float(row[3]) < 3.0


@pytest.mark.parametrize(("computes", "expected"), [(True, ("fp32", "bf16")), (False, ("fp32",))])
def test_bf16_is_timed_by_itself_only_where_the_device_computes_in_it(monkeypatch, computes, expected):
    monkeypatch.setattr(bench, "computes_in_bf16", lambda cpu: computes)
    timed = []
    monkeypatch.setattr(bench, "bench_train", lambda options: timed.append(options.backends))
    main(["train"])
    main(["train", "--backends", "bf16-full"])
    assert timed == [expected, ("bf16-full",)]


@pytest.mark.distributed
def test_the_command_times_both_sides(capsys):
    arguments = "train --model SiT-S/8 --batch 2 --pairs 1 --backends fp32"
    assert main(arguments.split()) == 0
    ratio = re.search(r"sitdist, fp32 .* (\d+\.\d\d)  (\d+\.\d\d) to (\d+\.\d\d)", capsys.readouterr().out)
    assert ratio is not None
    assert ratio[1] == ratio[2] == ratio[3]


@pytest.mark.distributed
def test_a_plain_loop_whose_process_is_killed_is_told_in_one_line(tmp_path):
    options = BenchOptions("SiT-S/8", batch=2)
    config = bench.make_config(options, "fp32", tmp_path)
    build(parse(Recipe, bench.make_recipe(options), "bench"), tmp_path / "data")
    baseline = RemoteBaseline(config, None, torch.device("cpu"))
    assert baseline.seconds(1) > 0
    os.kill(baseline._process.pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match=r"the plain loop's process ended with exit code -9; .* a smaller --batch"):
        baseline.seconds(1)
    baseline.close()


def test_an_unknown_baseline_or_backend_is_refused():
    with pytest.raises(ConfigError, match="--baseline nothing: unknown; choose one of latents, vae"):
        bench_train(BenchOptions(baseline="nothing"))
    with pytest.raises(ConfigError, match=r"backend fp8: train\.precision = 'fp8'"):
        bench_train(BenchOptions(backends=("fp8",)))


def test_memory_is_what_a_step_takes_above_what_was_held():
    held = torch.ones(20_000_000)
    found = memory_of_step(lambda: torch.ones(50_000_000), 1_000_000_000, torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not tell")
    assert found == pytest.approx(1_200_000_000, rel=0.02)
    assert len(held) == 20_000_000


def test_a_measured_peak_is_a_rate():
    assert 1e8 < peak_flops(torch.device("cpu"), "fp32") < 1e14


def test_a_backend_names_a_precision_and_what_is_compiled(tmp_path):
    train = bench.make_config(BenchOptions(), "bf16-blocks", tmp_path).train
    assert (train.precision, train.compile) == ("bf16", "blocks")
    with pytest.raises(ConfigError, match=r"backend bf16-some: train\.compile = 'some'"):
        bench.make_config(BenchOptions(), "bf16-some", tmp_path)
