"""FSDP2 and ZeRO train what DDP trains, and a run moves between all of them and any number of processes."""

import json

import pytest
import torch

from sitdist.runs.checkpoint import read_newest

pytestmark = pytest.mark.distributed

SGD = ("train.optimizer.kind=sgd", "train.optimizer.lr=0.1", "train.log_every=1")
BACKENDS = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
SHARED = [name for name in BACKENDS if name != "ddp"]


def losses(run):
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["train/loss"] for line in lines if "train/loss" in line], dtype=torch.float64)


def relative(found, expected):
    assert found.shape == expected.shape
    return float(((found - expected) / expected).abs().max())


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def of_one_process(tiny_yaml, tmp_path_factory):
    """The run of one process over twenty steps."""
    import ranks

    folder = tmp_path_factory.mktemp("one")
    arguments = ["train", str(tiny_yaml), "--out", str(folder / "run"), *ranks.settings("train.steps=20", *SGD)]
    ranks.sitdist(folder, 1, *arguments).run(120)
    return folder / "run"


@pytest.mark.parametrize(
    ("backend", "world"), [*((name, 2) for name in SHARED), *((name, 4) for name in ("ddp", "fsdp2", "zero2"))]
)
def test_every_backend_has_the_loss_curve_of_one_process(train, of_one_process, tmp_path, backend, world):
    run = tmp_path / "run"
    train(world, run, "train.steps=20", *SGD, **BACKENDS[backend]).run(120)
    one, many = losses(of_one_process), losses(run)
    assert len(one) == 20
    assert one.max() > 1.02 * one.min()  # it is no flat line
    assert relative(many, one) < 1e-4
    expected, found = (read_newest(where) for where in (of_one_process, run))
    assert found.state["backend"] == backend
    for kind in ("model", "ema"):
        assert expected.tensors[kind].keys() == found.tensors[kind].keys()
        assert largest_difference(found.tensors[kind], expected.tensors[kind]) < 1e-5


@pytest.mark.parametrize("backend", SHARED)
def test_accumulation_and_clipping_are_those_of_ddp(train, tmp_path, backend):
    settings = ("train.steps=5", *SGD, "train.max_batch_per_device=2", "train.optimizer.clip_norm=0.05")
    train(2, tmp_path / "ddp", *settings).run()
    train(2, tmp_path / "shared", *settings, **BACKENDS[backend]).run(120)
    assert relative(losses(tmp_path / "shared"), losses(tmp_path / "ddp")) < 1e-4
    lines = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("ddp", "shared")]
    before, after = (line["train/gradient_norm"] for line in lines)
    assert after == pytest.approx(before, rel=1e-4)
    assert before > 0.05  # so that there was something to clip


def test_a_run_moves_between_backends_and_numbers_of_processes(train, tmp_path):
    """With AdamW, whose state has to come along; in one piece it is trained by one process."""
    settings = ("train.optimizer.lr=1.0e-4", "train.log_every=1", "train.averages={decays: [0.5]}")
    train(1, tmp_path / "whole", "train.steps=12", *settings).run()
    run = tmp_path / "moved"
    for steps, world, backend in [(3, 2, "ddp"), (6, 2, "fsdp2"), (8, 4, "zero2"), (10, 2, "ddp"), (12, 1, "ddp")]:
        train(world, run, f"train.steps={steps}", *settings, **BACKENDS[backend]).run(120)
        assert read_newest(run, []).state["backend"] == backend
    assert relative(losses(run), losses(tmp_path / "whole")) < 1e-4
    whole, moved = (read_newest(tmp_path / name).tensors for name in ("whole", "moved"))
    assert whole["optimizer"].keys() == moved["optimizer"].keys()
    for name, value in whole["optimizer"].items():
        assert (moved["optimizer"][name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-9, name


@pytest.mark.parametrize("backend", ["fsdp2", "zero2"])
def test_a_run_in_parts_ends_bit_for_bit_like_one_in_a_piece(train, tensor_bytes, tmp_path, backend):
    train(2, tmp_path / "whole", **BACKENDS[backend]).run(120)
    train(2, tmp_path / "parts", "train.steps=2", **BACKENDS[backend]).run(120)
    train(2, tmp_path / "parts", **BACKENDS[backend]).run(120)
    assert tensor_bytes(tmp_path / "whole", 6) == tensor_bytes(tmp_path / "parts", 6)


@pytest.mark.parametrize("backend", ["fsdp2", "zero1"])
def test_validation_and_a_step_that_is_not_finite(train, tmp_path, backend):
    from tasks import train_with_nan_on

    settings = ("train.steps=6", "train.validate_every=3", "train.layer_norms_every=3", *SGD)
    runs = {name: tmp_path / name for name in ("ddp", backend)}
    for name, run in runs.items():
        started = train(2, run, *settings, task=train_with_nan_on, task_arguments=[1], **BACKENDS[name])
        started.run(120)
        assert started.errors().count("step 2 left out: the loss is not finite for samples") == 1
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs.values()]
    told = [{key: value for line in of_run for key, value in line.items()} for of_run in lines]
    for name in ("validation/psnr", "train_layers/activation/block_00"):
        assert told[1][name] == pytest.approx(told[0][name], rel=1e-3)
    if backend == "fsdp2":
        name = "train_layers/gradient/block_00"
        assert told[1][name] == pytest.approx(told[0][name], rel=1e-3)
    ours, theirs = (read_newest(run).tensors["model"] for run in runs.values())
    assert largest_difference(ours, theirs) < 1e-5
