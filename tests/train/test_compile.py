"""What makes a step faster or smaller changes nothing that it computes; and what looks closer sees what is there."""

import gc
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from sitdist.distributed.accelerator import make_accelerator
from sitdist.distributed.ddp import sum_of_squares
from sitdist.distributed.ranks import Ranks
from sitdist.errors import ConfigError
from sitdist.model.flops import training_flops
from sitdist.model.sit import SiT
from sitdist.runs.checkpoint import folder_of
from sitdist.train import compile as speed
from sitdist.train.compile import ScheduledCollection, compile_model, recompute_activations
from sitdist.train.monitor import Monitor
from sitdist.train.profiling import LayerNorms, layer_of
from sitdist.train.trainer import train


def model(seed=0):
    torch.manual_seed(seed)
    made = SiT(input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2)
    for parameter in made.parameters():  # no gate closed, so that every gradient says something
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def run(made):
    torch.manual_seed(1)
    out = made(torch.randn(3, 4, 4, 4), torch.rand(3), torch.zeros(3, dtype=torch.int64))
    out.square().mean().backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


FAULTS = """
import resource, torch
from sitdist.train.compile import keep_freed_memory
def work(times):
    for _ in range(times):
        blocks = [torch.ones(10_000_000) for _ in range(4)]  # 40 MB each
        del blocks  # before the next ones, which then lie where these lay
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work(4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
keep_freed_memory()
work(8)
print(given_back, faults())
"""


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.distributed
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="memory comes in large pages")
def test_kept_memory_is_not_cleared_page_by_page_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 10_000  # 640 MB in pages of 4 kB are 160,000
    assert kept < 1_000


def test_the_sum_of_squares_is_that_of_all_gradients_and_tells_of_one_that_is_not_finite():
    made = model()
    run(made)
    expected = sum(float(each.grad.double().square().sum()) for each in made.parameters() if each.grad is not None)
    assert float(sum_of_squares(made.parameters())) == pytest.approx(expected, rel=1e-5)
    for bad in (torch.nan, torch.inf):
        made.blocks[0].mlp.fc1.weight.grad[3, 5] = bad
        assert not sum_of_squares(made.parameters()).isfinite()


class Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("which", "gelus", "extra_products"), [("selective", 4, 0), ("all", 4, 12)])
def test_recomputed_activations_give_the_same_gradients_and_are_computed_twice(which, gelus, extra_products):
    plain, recomputing = model(), model()
    recompute_activations(recomputing, which)
    with Count() as plainly:
        expected = run(plain)
    with Count() as counted:
        found = run(recomputing)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (plainly.calls["gelu"], counted.calls["gelu"]) == (2, gelus)
    products = [sum(calls.get(name, 0) for name in ("mm", "addmm", "bmm")) for calls in (plainly.calls, counted.calls)]
    assert products[1] - products[0] >= extra_products - 2  # the last product of a block is not needed again
    assert (products[1] > products[0]) == (extra_products > 0)


@pytest.mark.parametrize("which", ["selective", "all"])
def test_a_run_that_recomputes_ends_in_the_same_weights(config, tmp_path, which):
    train(config("train.steps=2"), tmp_path / "a")
    train(config("train.steps=2", f"train.activation_checkpointing={which}"), tmp_path / "b")
    a, b = ((folder_of(tmp_path / name, 2) / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.distributed
@pytest.mark.parametrize(("which", "compilations"), [("off", 0), ("blocks", 1), ("full", 1), ("graphs", 1)])
def test_compiled_parts_compute_the_same_under_the_same_names(monkeypatch, which, compilations):
    graphs = []

    def backend(graph, inputs, options=None):
        graphs.append(graph)
        assert options == (speed.CUDA_GRAPHS if which == "graphs" else None)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(speed, "BACKEND", backend)
    compiled, plain = model(), model()
    compile_model(compiled, which)
    found, expected = run(compiled), run(plain)
    assert len(graphs) == compilations
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_a_run_compiles_what_its_config_says(config, tmp_path, monkeypatch):
    graphs = []
    torch._dynamo.reset()
    monkeypatch.setattr(speed, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    train(config("train.steps=2", "train.compile=blocks"), tmp_path / "a")
    assert graphs
    train(config("train.steps=3"), tmp_path / "a")  # it may change in a run
    with pytest.raises(ConfigError, match="compile: blocks hides; remove one"):
        config("train.compile=blocks", "train.layer_norms_every=2")


@pytest.mark.distributed
def test_every_pass_of_a_cuda_graph_begins_with_a_word_and_no_others(config, tmp_path, monkeypatch):
    begun = []
    torch._dynamo.reset()
    monkeypatch.setattr(speed, "BACKEND", lambda graph, inputs, options=None: graph.forward)
    monkeypatch.setattr("sitdist.train.trainer.begin_forward", lambda: begun.append(True))
    train(config("train.steps=2", "train.compile=full"), tmp_path / "a")
    assert begun == []  # the word takes seconds to import
    train(config("train.steps=2", "train.compile=graphs", "train.max_batch_per_device=6"), tmp_path / "b")
    assert len(begun) == 4  # two steps of two halves


def test_garbage_is_collected_on_schedule_and_by_python_afterwards(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    collection = ScheduledCollection()
    assert not gc.isenabled()
    for step in (1, speed.COLLECT_EVERY - 1, speed.COLLECT_EVERY, speed.COLLECT_EVERY + 1):
        collection.after_step(SimpleNamespace(step=step))
    assert collected == [True]
    collection.close()
    assert gc.isenabled()


# ------------------------------------------------------------------------------------------------------- looking closer


def test_layer_norms_are_those_of_the_gradients_and_of_what_blocks_give():
    made = model()
    norms = LayerNorms(made, every=2, monitor=None, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    norms.before_step(0)
    run(made)
    norms.after_backward()
    assert norms.norms == {}
    made.zero_grad()
    seen = []
    made.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    norms.before_step(1)
    gradients = run(made)
    norms.after_backward()
    found = norms.norms
    of_block = [gradient.flatten() for name, gradient in gradients.items() if name.startswith("blocks.1.")]
    assert found["gradient/block_01"] == pytest.approx(float(torch.cat(of_block).norm()) / 4.0, rel=1e-5)
    assert found["activation/block_01"] == pytest.approx(float(seen[0].square().mean().sqrt()), rel=1e-5)
    assert {"gradient/x_embedder", "gradient/final_layer", "activation/block_00"} <= set(found)
    assert layer_of("blocks.11.mlp.fc1.weight") == "block_11"


def test_a_run_tells_layer_norms_at_their_interval_and_trains_the_same(config, tmp_path):
    settings = ("train.steps=4", "train.validate_every=4")
    train(config(*settings), tmp_path / "a")
    train(config(*settings, "train.layer_norms_every=2"), tmp_path / "b")
    read = {name: EventAccumulator(str(tmp_path / name / "tensorboard")).Reload() for name in "ab"}
    assert [event.step for event in read["b"].Scalars("train_layers/gradient/block_01")] == [2, 4]
    assert not any(tag.startswith("train_layers/") for tag in read["a"].Tags()["scalars"])
    assert "validation/rotation_errors" in read["a"].Tags()["images"]
    assert {"train_speed/checkpoint_share", "train_speed/memory_gb", "train_speed/tflops_per_device"} <= set(
        read["a"].Tags()["scalars"]
    )
    a, b = ((folder_of(tmp_path / name, 4) / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_the_logged_rate_of_operations_is_that_of_the_samples(config, tmp_path):
    train(config("train.steps=3"), tmp_path)
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    flops = training_flops(SiT(4, 2, 4, 32, 2, 2))
    assert line["train_speed/tflops_per_device"] == pytest.approx(line["train/samples_per_second"] * flops / 1e12)


def test_a_profile_covers_the_steps_asked_for(config, tmp_path):
    train(config("train.steps=4", "train.profile={start: 1, steps: 2}"), tmp_path)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_1_to_2_rank_0.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2


def test_the_settings_are_on_the_page_of_hyperparameters(config, tmp_path):
    accelerator = make_accelerator()
    settings = config("train.steps=7")
    Monitor(tmp_path, accelerator, Ranks(accelerator), settings).close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = read.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"train.optimizer.lr" in content


def test_a_tracker_is_told_settings_and_values_and_one_that_is_not_installed_is_refused(config, tmp_path, monkeypatch):
    told = []

    class Fake:
        requires_logging_directory = False

        def __init__(self, name):
            told.append(name)

        def store_init_configuration(self, values):
            told.append(values["train.steps"])

        def log(self, values, step):
            told.append((step, "train/loss" in values))

        def finish(self):
            told.append("finish")

    settings = config("train.steps=2", "train.log_every=1", "train.tracker=wandb")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    with pytest.raises(ConfigError, match=r"train\.tracker = 'wandb': the package is not installed; pip install it"):
        train(settings, tmp_path / "a")
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb"])
    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"wandb": Fake})
    train(settings, tmp_path / "b")
    assert told == ["tiny", 2, (1, True), (2, True), "finish"]
