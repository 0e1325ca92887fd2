"""A run's weights as one file: what comes back is what the checkpoint held, and what cannot be written is said."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sitdist.cli import main as cli
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml
from sitdist.errors import CheckpointError, ConfigError, DataError
from sitdist.runs.checkpoint import convert, read_newest
from sitdist.train.trainer import train


@pytest.mark.parametrize(("suffix", "weights"), [(".safetensors", "ema"), (".pt", "model")])
def test_the_weights_of_a_run_come_back(tiny_run, tmp_path, capsys, suffix, weights):
    out = tmp_path / "new" / f"weights{suffix}"
    assert cli.run(["checkpoint", "convert", str(tiny_run), str(out), "--weights", weights]) == 0
    expected = read_newest(tiny_run, [weights]).tensors[weights]
    numbers = f"{sum(tensor.numel() for tensor in expected.values()):,}"
    assert f"{len(expected)} tensors, {numbers} numbers, of" in capsys.readouterr().out
    written = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_another_run_begins_with_what_was_written(tiny_run, tiny_yaml, tmp_path):
    convert(tiny_run, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    settings = [f"model.init_from={tmp_path / 'b.pt'}", "train.steps=1", "train.optimizer.lr=1e-30"]
    train(load_yaml(Config, tiny_yaml, settings), tmp_path / "run")
    expected, begun = read_newest(tiny_run).tensors["ema"], read_newest(tmp_path / "run").tensors["model"]
    assert all(torch.allclose(begun[name], expected[name]) for name in expected)


def test_what_cannot_be_written_is_said_and_nothing_is_lost(tiny_run, tmp_path):
    out = tmp_path / "there.pt"
    out.write_text("precious")
    for arguments, error, message in (
        ((tiny_run, out), DataError, "there.pt: already exists; give another name$"),
        ((tiny_run, tmp_path / "weights.bin"), ConfigError, r"end it with \.safetensors or \.pt"),
        ((tmp_path / "none", tmp_path / "a.pt"), CheckpointError, "none: has no whole checkpoint"),
        ((tmp_path, tmp_path / "a.pt"), CheckpointError, "has no whole checkpoint"),
        ((tiny_run, tmp_path / "a.pt", 7), CheckpointError, "step_00000007: has no manifest.json"),
        ((out, tmp_path / "a.pt", 7), ConfigError, "--step 7: .* is one file"),
        ((out, tmp_path / "a.pt"), CheckpointError, "there.pt: refused"),
    ):
        with pytest.raises(error, match=message):
            convert(*arguments)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.pt"]


FULL = """
import resource, sys
from pathlib import Path
from sitdist.cli import main as cli
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # as a disk that gets full: a write fails in its middle
for suffix in ("pt", "safetensors"):
    code = cli.run(["checkpoint", "convert", sys.argv[1], f"{sys.argv[2]}/weights.{suffix}"])
    print(code, [path.name for path in Path(sys.argv[2]).iterdir()])
"""


@pytest.mark.distributed
def test_a_disk_that_gets_full_is_one_line_and_leaves_no_file(tiny_run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tiny_run), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 []\n2 []\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    for line, suffix in zip(lines, ("pt", "safetensors"), strict=True):
        assert f"weights.{suffix}: cannot be written (" in line
        assert "File too large" in line
        assert "free space or name a folder you may write to" in line
