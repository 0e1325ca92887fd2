"""Codecs fitted by several processes: the weights of one, ended together, and a folder that is whole or not there."""

import signal

import pytest
import ranks
import torch
import yaml
from safetensors.torch import load_file

from sitdist.model.codec import VaeCodec

pytestmark = pytest.mark.distributed

RECIPE = {
    "name": "small",
    "image_size": 16,
    "codec": {"kind": "pca"},
    "val_views": 0,
    "splits": {"train": {"kind": "scene", "views": 40, "supersample": 1}},
}
GRACE = 20  # seconds after the first failure; all are expected to need less than one


@pytest.fixture
def fit(tmp_path):
    """Start `sitdist codec fit` of a small codec into `out` on some processes; `task` may do more than the command."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    options = ["--channels", "4", "8", "--steps", "8", "--batch", "8", "--lr", "1e-3"]

    def start(world, out, *more, task=None, task_arguments=()):
        arguments = ["codec", "fit", str(recipe), "--out", str(out), *options, *more]
        if task is None:
            return ranks.sitdist(tmp_path / "log", world, *arguments)
        return ranks.Ranks(tmp_path / "log", world, task, *task_arguments, *arguments)

    return start


def weights(folder):
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def difference(folder, other):
    """Relative distance (L2) of the weights."""
    return torch.linalg.vector_norm(weights(folder) - weights(other)) / torch.linalg.vector_norm(weights(folder))


def test_two_processes_fit_the_weights_and_the_scale_of_one(fit, tmp_path):
    for world in (1, 2):
        fit(world, tmp_path / f"{world}").run()
    one, two = (VaeCodec(str(tmp_path / name)) for name in "12")
    assert difference(tmp_path / "1", tmp_path / "2") < 1e-3  # where a gradient is 0, AdamW turns rounding into steps
    assert one.scale == pytest.approx(two.scale, rel=1e-4)
    main, other = ((tmp_path / "log" / f"rank_{rank}.out").read_text() for rank in (0, 1))
    assert main.startswith(f"{tmp_path / '2'}: held-out round trip ")
    assert (other, main.count("\n")) == ("", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "log", "recipe.yaml"]


def test_without_gradient_sync_the_weights_are_others(fit, tmp_path):
    """The test above could not pass by accident: weights that were fitted apart lie far outside its bound."""
    from tasks import fit_without_sync

    fit(1, tmp_path / "1").run()
    fit(2, tmp_path / "2", task=fit_without_sync).run()
    apart = difference(tmp_path / "1", tmp_path / "2")
    assert apart > 1e-2, apart


def test_a_loss_that_is_not_finite_on_one_process_ends_both_with_one_line(fit, tmp_path):
    from tasks import fit_with_nan_on

    started = fit(2, tmp_path / "vae", task=fit_with_nan_on, task_arguments=[1])
    assert started.wait(grace=GRACE) == [2, 2], started.errors()
    (line,) = [line for line in started.errors().splitlines() if "error" in line]
    assert "sitdist: error: step 2: the loss is not finite (" in line
    assert "nothing was written; lower --lr" in line
    assert not list(tmp_path.glob("*vae*"))


def test_what_is_wrong_with_the_command_is_said_once_and_leaves_nothing(fit, tmp_path):
    started = fit(2, tmp_path / "vae", "--batch", "7")
    assert started.wait(grace=GRACE) == [2, 2]
    assert started.errors().startswith("sitdist: error: --batch 7: cannot be divided by 2 processes; give 6 or 8, or")
    assert started.errors().count("\n") == 1
    assert not list(tmp_path.glob("*vae*"))


@pytest.mark.parametrize("where", ["views", "step", "write"])
def test_a_fit_that_is_killed_leaves_no_codec_and_the_same_command_makes_one(fit, tmp_path, where):
    from tasks import fit_and_die

    codes = fit(1, tmp_path / "vae", task=fit_and_die, task_arguments=[where]).wait(grace=GRACE)
    assert codes == [-signal.SIGKILL]
    assert len(list(tmp_path.glob(".sitdist-*.tmp"))) == (where != "step")
    assert not (tmp_path / "vae").exists()
    fit(1, tmp_path / "vae").run()
    assert not list(tmp_path.glob(".sitdist-*.tmp"))
    assert VaeCodec(str(tmp_path / "vae")).channels == 4
