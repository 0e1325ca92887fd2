"""Training in one process: it learns, it goes on bit for bit, it stops clearly, and every setting does something."""

import json
import os
import shutil
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sitdist.build.writer import build
from sitdist.cli import main as cli
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.batches import BatchReader
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.distributed.accelerator import processes
from sitdist.errors import CheckpointError, CodecError, ConfigError, DataError, RunInterrupted
from sitdist.flow.interpolant import get_interpolant
from sitdist.inference.run import load_run
from sitdist.model.sit import SiT
from sitdist.runs.build import build_endpoint, build_model
from sitdist.runs.checkpoint import folder_of, list_checkpoints, read_newest
from sitdist.train.inputs import BatchSplit, make_inputs, split_batch
from sitdist.train.trainer import Trainer, train
from sitdist.train.validation import PeriodicValidation


def tensor_bytes(run, step):
    """The tensor files of a checkpoint: all that later steps depend on."""
    return {path.name: path.read_bytes() for path in sorted(folder_of(run, step).glob("*.safetensors"))}


def weights(run):
    return read_newest(run).tensors["model"]


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def inputs_of(batch, settings):
    flow = settings.flow
    return make_inputs(batch, settings, build_endpoint(flow), get_interpolant(flow.path, flow.prediction))


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def signal_after(monkeypatch):
    """Let the process get a signal in the middle of a step, counted from 0."""

    def arm(step: int, number: signal.Signals = signal.SIGTERM) -> None:
        accumulate = Trainer._accumulate_gradients

        def accumulate_and_signal(self, inputs):
            if self.step == step:
                os.kill(os.getpid(), number)
            return accumulate(self, inputs)

        monkeypatch.setattr(Trainer, "_accumulate_gradients", accumulate_and_signal)

    return arm


# --------------------------------------------------------------------------------------------------------- it learns


def test_the_loss_falls(config, tmp_path):
    train(config("train.steps=80", "train.log_every=20"), tmp_path)
    losses = [line["train/loss"] for line in lines(tmp_path)]
    assert [line["step"] for line in lines(tmp_path)] == [20, 40, 60, 80]
    assert losses[-1] < 0.7 * losses[0]


def test_a_run_repeats_bit_for_bit_and_another_seed_is_another_run(config, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(f"seed={seed}"), tmp_path / name)
    assert tensor_bytes(tmp_path / "a", 6) == tensor_bytes(tmp_path / "b", 6)
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "c")) > 1e-2


def test_accumulation_changes_nothing_but_rounding(config, tmp_path):
    sgd = ("train.optimizer.kind=sgd", "train.optimizer.lr=0.1")
    train(config(*sgd), tmp_path / "whole")
    train(config(*sgd, "train.max_batch_per_device=5"), tmp_path / "parts")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert largest_difference(whole, parts) < 1e-6
    start = build_model(config().model, load_manifest(config().data)).state_dict()
    assert largest_difference(whole, start) > 1e-3


def test_a_batch_is_split_into_equal_micro_batches_of_at_most_the_given_size():
    assert split_batch(12, 1, None) == BatchSplit(local=12, micro=12)
    assert split_batch(12, 1, 5) == BatchSplit(local=12, micro=4)
    assert split_batch(12, 2, 100) == BatchSplit(local=6, micro=6)
    assert split_batch(14, 2, 3) == BatchSplit(local=7, micro=1)


@pytest.mark.parametrize(("world", "nearest"), [(5, "10 or 15"), (8, "8 or 16"), (24, "24")])
def test_a_world_size_that_does_not_divide_the_batch_is_refused_with_the_nearest_batches(world, nearest):
    message = f"global_batch = 12: cannot be divided by {world} processes; set it to {nearest}, or start another number"
    with pytest.raises(ConfigError, match=message):
        split_batch(12, world, None)


@pytest.mark.parametrize(
    "override",
    [
        "train.optimizer.clip_norm=0.01",
        "train.optimizer.weight_decay=10.0",
        "train.schedule.warmup_steps=50",
        "train.schedule.kind=cosine",
        "train.precision=bf16",
        "train.optimizer.betas=[0.5, 0.6]",
        "model.class_dropout_prob=0.9",
        "model.learn_sigma=true",
        "model.mlp_ratio=2.0",
        "model.mlp=swiglu",
        "flow.sigma=1.0",
        "flow.gain=3.0",
        "flow.layout=interleaved",
        "flow.endpoint=gaussian",
        "flow.path=gvp",
        "flow.share_at_one=0.8",
        "flow.weight_at_one=10",
        "flow.prediction=x0",
    ],
)
def test_every_setting_of_the_training_changes_the_weights(config, tmp_path, override):
    train(config("train.steps=3"), tmp_path / "a")
    train(config("train.steps=3", override), tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    changed = [name for name in a if name not in b or not torch.equal(a[name], b[name])]
    assert any(name.startswith("blocks.") for name in changed)


def test_a_loss_weight_changes_the_weights_and_a_run_that_predicts_x0_is_loaded_as_a_velocity(config, tmp_path):
    flow = ("train.steps=3", "flow.prediction=x0", "flow.share_at_zero=0.0", "train.validate_every=3")
    train(config(*flow), tmp_path / "a")
    train(config(*flow, "flow.loss_weight=velocity"), tmp_path / "b")
    assert largest_difference(weights(tmp_path / "a"), weights(tmp_path / "b")) > 1e-3
    loaded = load_run(tmp_path / "a")
    network = build_model(config().model, loaded.manifest)
    network.load_state_dict(read_newest(tmp_path / "a").tensors["ema"])
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([1e-3, 1.0]), torch.zeros(2, dtype=torch.int64)
    velocity = (x - network(x, t, y)) / t.reshape(-1, 1, 1, 1)  # on the linear path
    torch.testing.assert_close(loaded.model(x, t, y), velocity)
    assert (loaded.interpolant.t_zero, loaded.interpolant.t_one) == (1e-3, 1.0)


def test_times_of_a_weighted_loss_keep_away_from_where_it_is_infinite(config, tiny_dataset):
    batch = BatchReader(ShardReader(tiny_dataset, "train"), 0, 48).batch(0)
    shares = ("flow.share_at_zero=0.0", "flow.share_at_one=0.0")
    plain = inputs_of(batch, config(*shares)).t.double()
    weighted = config(*shares, "flow.prediction=x0", "flow.loss_weight=likelihood")
    t = inputs_of(batch, weighted).t.double()
    torch.testing.assert_close(t, 1e-3 + 0.998 * plain, rtol=0, atol=1e-6)


def test_a_run_starts_from_the_weights_it_is_given_and_says_so(config, tmp_path, capfd):
    train(config("train.steps=2"), tmp_path / "a")
    source = folder_of(tmp_path / "a", 2) / "ema.safetensors"
    settings = config(f"model.init_from={source}", "train.steps=1", "train.optimizer.lr=1e-12")
    train(settings, tmp_path / "b")
    assert largest_difference(weights(tmp_path / "b"), read_newest(tmp_path / "a").tensors["ema"]) < 1e-9
    assert largest_difference(read_newest(tmp_path / "b").tensors["ema"], weights(tmp_path / "b")) < 1e-9
    assert f"started from {source}: kept " in capfd.readouterr().err
    shutil.move(source, tmp_path / "moved")  # a run that goes on needs the file no more
    train(config(f"model.init_from={source}", "train.steps=2", "train.optimizer.lr=1e-12"), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"ema.safetensors: cannot be read .*; give a SiT checkpoint"):
        train(settings, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_without_label_dropout_no_label_is_dropped(config, tiny_dataset):
    batch = BatchReader(ShardReader(tiny_dataset, "train"), 0, 48).batch(0)
    assert inputs_of(batch, config("model.class_dropout_prob=0.0")).drop_labels is None
    dropped = inputs_of(batch, config("model.class_dropout_prob=0.5")).drop_labels
    assert 10 < int(dropped.sum()) < 38


def test_deterministic_asks_torch_for_it_and_only_then(config, tmp_path):
    train(config("train.steps=1", "train.deterministic=true"), tmp_path / "a")
    assert torch.are_deterministic_algorithms_enabled()
    train(config("train.steps=1"), tmp_path / "b")
    assert not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------------------------------ it is watched


def test_validation_and_pictures_are_in_tensorboard_at_their_interval(config, tmp_path):
    train(config("train.steps=5", "train.validate_every=2"), tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    read.Reload()
    for name in ("rotation_error_deg", "rotation_error_deg_median", "translation_error", "translation_error_median"):
        events = read.Scalars(f"validation/{name}")
        assert [event.step for event in events] == [2, 4, 5]
        assert events[-1].value == pytest.approx(lines(tmp_path)[-1][f"validation/{name}"])
    pictures = read.Images("validation/generated_above_true")
    assert [picture.step for picture in pictures] == [2, 4, 5]
    assert (pictures[0].width, pictures[0].height) == (2 * 18 + 2, 2 * 18 + 2)  # 2 columns, 2 rows of 16 pixels
    tags = set(read.Tags()["scalars"])
    assert {"train/loss", "train/lr", "train/gradient_norm", "train/samples_per_second"} <= tags
    assert {"train/data_wait_share", "train/loss_by_t/0", "train/loss_by_t/1"} <= tags


@pytest.mark.parametrize(
    ("overrides", "there", "absent"),
    [
        (("flow.endpoint=gaussian",), "psnr", "rotation_error_deg"),
        (("flow.share_at_one=1.0", "flow.share_at_zero=0.0"), "rotation_error_deg", "psnr"),
    ],
)
def test_validation_tells_what_the_model_can_do_and_nothing_else(config, tmp_path, overrides, there, absent):
    train(config("train.steps=2", "train.validate_every=1", *overrides), tmp_path)
    values = lines(tmp_path)[-1]
    assert f"validation/{there}" in values
    assert f"validation/{absent}" not in values
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    read.Reload()
    assert ("validation/generated_above_true" in read.Tags()["images"]) == (there == "psnr")


def test_the_gaussian_endpoint_is_trained_with_every_samples_own_pose(config, tmp_path, tiny_dataset, monkeypatch):
    seen, forward = [], SiT.forward

    def look(self, x, t, y, drop_labels=None, pose=None):
        seen.append(pose)
        return forward(self, x, t, y, drop_labels, pose)

    monkeypatch.setattr(SiT, "forward", look)
    settings = config("train.steps=1", "train.max_batch_per_device=5", "flow.endpoint=gaussian")
    train(settings, tmp_path)
    batch = BatchReader(ShardReader(tiny_dataset, "train"), settings.seed, 12).batch(0)
    assert len(seen) == 3  # micro-batches of 4
    assert torch.equal(torch.cat(seen), batch.packed_pose)


def test_validation_changes_nothing_in_the_training(config, tmp_path):
    train(config("train.steps=4"), tmp_path / "a")
    train(config("train.steps=4", "train.validate_every=1"), tmp_path / "b")
    assert tensor_bytes(tmp_path / "a", 4) == tensor_bytes(tmp_path / "b", 4)


def test_the_picture_shows_the_true_views_below_the_generated_ones(config, tmp_path, tiny_dataset):
    with processes() as (accelerator, ranks):
        opened = Trainer(config("train.validate_every=1"), tmp_path, accelerator, ranks)
        (validation,) = (each.validation for each in opened.hooks if isinstance(each, PeriodicValidation))
        picture = validation.measure(opened.state.ema.model).picture  # [3, 2 + 18 + 18, 2 + 18 + 18]
        opened.close()
    true = ShardReader(tiny_dataset, "val").images([0, 1])
    torch.testing.assert_close(picture[:, 20:36, 2:18], true[0])
    torch.testing.assert_close(picture[:, 20:36, 20:36], true[1])
    assert (picture[:, 2:18, 2:18] - true[0]).abs().mean() > 0.01


# ---------------------------------------------------------------------------------------------------------- it goes on


def test_a_stopped_run_goes_on_bit_for_bit_and_leaves_the_same_lines(config, tmp_path, signal_after, monkeypatch):
    settings = ("train.schedule.kind=cosine", "train.log_every=1", "train.validate_every=3")
    train(config(*settings), tmp_path / "whole")
    signal_after(3)
    with pytest.raises(RunInterrupted, match="stopped after step 4 of 6; go on with the same command"):
        train(config(*settings), tmp_path / "stopped")
    monkeypatch.undo()
    assert [folder.name for folder in list_checkpoints(tmp_path / "stopped")] == ["step_00000004"]
    train(config(*settings), tmp_path / "stopped")
    assert tensor_bytes(tmp_path / "whole", 6) == tensor_bytes(tmp_path / "stopped", 6)
    timing = {"train/samples_per_second", "train/data_wait_share"}
    timing |= {"train_speed/checkpoint_share", "train_speed/memory_gb", "train_speed/tflops_per_device"}
    kept = [
        [{k: v for k, v in line.items() if k not in timing} for line in lines(tmp_path / run)]
        for run in ("whole", "stopped")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_exit_code_75_with_a_line_that_says_how_to_go_on(
    tiny_yaml, tmp_path, capfd, signal_after, monkeypatch, number
):
    arguments = ["train", str(tiny_yaml), "--out", str(tmp_path)]
    signal_after(1, number)
    assert cli.run(arguments) == 75
    assert "sitdist: stopped after step 2 of 6; go on with the same command" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.undo()
    assert cli.run(arguments) == 0
    assert read_newest(tmp_path).step == 6


def test_a_signal_in_the_last_step_is_a_finished_run(tiny_yaml, tmp_path, signal_after):
    signal_after(5)
    assert cli.run(["train", str(tiny_yaml), "--out", str(tmp_path)]) == 0


def test_a_run_resumes_from_before_a_damaged_checkpoint(config, tmp_path):
    settings = config("train.checkpoint_every=2")
    train(settings, tmp_path)
    expected = tensor_bytes(tmp_path, 6)
    for step in (4, 6):
        (folder_of(tmp_path, step) / "ema.safetensors").write_bytes(b"")
    train(settings, tmp_path)
    assert tensor_bytes(tmp_path, 6) == expected


def test_precision_auto_goes_on_elsewhere_and_says_what_differs(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    train(config("train.precision=auto", "train.steps=1"), tmp_path / "run")
    assert read_newest(tmp_path / "run").state["precision"] == "no"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    train(config("train.precision=auto", "train.steps=2"), tmp_path / "run")
    assert "was trained in fp32 and this device goes on in bf16" in capsys.readouterr().err


def test_a_finished_run_says_so_and_stays(tiny_yaml, tmp_path, capfd):
    arguments = ["train", str(tiny_yaml), "--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    before = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "tensorboard" not in path.parts
    }
    capfd.readouterr()
    assert cli.run([*arguments, "--resume"]) == 0
    assert f"{tmp_path}: finished, all 6 steps are trained; train.steps set higher goes on" in capfd.readouterr().err
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "tensorboard" not in path.parts
    } == before


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(config, tmp_path):
    train(config(), tmp_path)
    (folder_of(tmp_path, 6) / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in it is whole; put one back, or start another run"):
        train(config("train.steps=7"), tmp_path)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000006"]


def test_a_run_is_not_overwritten_and_not_continued_as_another(config, tmp_path, tiny_dataset):
    run = tmp_path / "run"
    train(config(), run)
    written = (run / "config.yaml").read_text()
    remedy = "set it back, or start another run with another --out"
    with pytest.raises(
        ConfigError, match=rf"train.optimizer.lr is 0.5 but .*step_00000006 was trained with 0.01; {remedy}"
    ):
        train(config("train.optimizer.lr=0.5"), run)
    with pytest.raises(ConfigError, match=r"train.steps = 5: .*step_00000006 has already seen 6; set it higher"):
        train(config("train.steps=5"), run)
    other = tmp_path / "other"
    shutil.copytree(tiny_dataset, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"name": "other"}))
    with pytest.raises(CheckpointError, match=r"other/manifest.json: SHA-256 .* was trained on .*give the dataset it"):
        train(config(f"data={other}"), run)
    assert (run / "config.yaml").read_text() == written
    moved = tmp_path / "moved"
    shutil.copytree(tiny_dataset, moved)
    train(config("train.steps=7", f"data={moved}"), run)
    assert read_newest(run).step == 7


# --------------------------------------------------------------------------------------------------- it stops clearly


def test_an_altered_byte_of_the_dataset_stops_the_training_by_its_name(config, tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset, tmp_path / "data")
    tar = tmp_path / "data" / "train" / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"00001.tar: sample 0000000\d\d: altered bytes"):
        train(config(f"data={tmp_path / 'data'}"), tmp_path / "run")


@pytest.fixture(scope="module")
def without_validation_views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "novel"
    recipe = {"name": "novel", "image_size": 16, "codec": {"kind": "pca"}, "val_views": 0, "encode_batch": 4}
    build(parse(Recipe, recipe | {"splits": {"train": {"kind": "scene", "views": 8}}}, "novel"), folder)
    return folder


def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(config, tmp_path, without_validation_views):
    for overrides, message in {
        ("train.precision=fp16",): "train.precision = 'fp16': there is no fp16 training on a CPU; use fp32 or bf16",
        ("model.patch_size=3",): "model.patch_size = 3: does not divide the dataset's 4x4 latents; choose a divisor",
        ("train.validate_every=1", f"data={without_validation_views}"): (
            "train.validate_every = 1: .*novel has no validation views; build it with val_views above 0"
        ),
    }.items():
        with pytest.raises(ConfigError, match=message):
            train(config(*overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=r"nowhere: no dataset: manifest.json is missing"):
        train(config("data=nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_codec_that_did_not_encode_the_dataset_is_refused_with_both_values(config, tmp_path, tiny_dataset):
    shutil.copytree(tiny_dataset, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["codec"]["weights_sha256"] = "0" * 64
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CodecError, match=f"weights_sha256 is '[0-9a-f]{{64}}' but .* was encoded with '{'0' * 64}'"):
        train(config("train.validate_every=1", f"data={tmp_path / 'data'}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_knows_too_few_labels_is_refused(config, tiny_dataset):
    manifest = load_manifest(tiny_dataset)
    manifest.objects[0].label = 2
    message = "model.num_classes = 1: the dataset tiny has 3 labels; set it to 3 or more"
    with pytest.raises(ConfigError, match=message):
        build_model(config().model, manifest)
    build_model(config("model.num_classes=3").model, manifest)


def test_a_folder_that_cannot_be_written_is_one_clear_error(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/run: cannot be written \(Not a directory\)"):
        train(config(), tmp_path / "file" / "run")
