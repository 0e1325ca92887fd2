"""What the tests with several processes share: their helpers can be imported, and a command to start."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # here and in the processes that are started

import ranks
import torch

from sitdist.runs.checkpoint import folder_of, read_newest


@pytest.fixture
def train(tiny_yaml, tmp_path):
    """Start `sitdist train` of the tiny config into `run` on some processes; `task` may do more than the command."""

    def start(world, run, *overrides, task=None, task_arguments=(), **variables):
        arguments = ["train", str(tiny_yaml), "--out", str(run), *ranks.settings(*overrides)]
        if task is None:
            return ranks.sitdist(tmp_path / "log", world, *arguments, **variables)
        return ranks.Ranks(tmp_path / "log", world, task, *task_arguments, *arguments, **variables)

    return start


@pytest.fixture
def weights():
    """The newest weights of a run as one vector."""

    def load(run):
        tensors = read_newest(run, ["model"]).tensors["model"]
        return torch.cat([tensors[name].flatten() for name in sorted(tensors)])

    return load


@pytest.fixture
def tensor_bytes():
    """The tensor files of a checkpoint: all that later steps depend on."""

    def load(run, step):
        return {path.name: path.read_bytes() for path in sorted(folder_of(run, step).glob("*.safetensors"))}

    return load
