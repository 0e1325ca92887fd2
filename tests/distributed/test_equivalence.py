"""Any number of processes sees the same samples and noise and trains to the same weights, up to summation order."""

import pytest
import torch

pytestmark = pytest.mark.distributed

SGD = ("train.optimizer.kind=sgd", "train.optimizer.lr=0.1")
ADAMW = ("train.optimizer.lr=1.0e-4",)
STEPS = "train.steps=20"


@pytest.fixture
def seen(train, tmp_path):
    """What every global batch held, joined over the ranks of a run."""
    from tasks import train_and_record

    def record(world, run, *overrides, steps=range(3), **options):
        folder = tmp_path / f"seen_{run}_{world}_{steps.stop}"
        folder.mkdir()
        train(world, tmp_path / run, *overrides, task=train_and_record, task_arguments=[folder], **options).run()
        return [joined(folder, step, world) for step in steps]

    return record


def joined(folder, step, world):
    parts = [torch.load(folder / f"step_{step}_rank_{rank}.pt") for rank in range(world)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "keys"}
    return whole | {"keys": [key for part in parts for key in part["keys"]]}


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a["keys"] == b["keys"]
        for name in ("positions", "x0", "x1", "t", "drop_labels"):
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_samples_noise_and_times_on_any_number_of_processes(seen, world):
    one, many = seen(1, "one", "train.steps=3"), seen(world, "many", "train.steps=3")
    assert_same(many, one)
    assert len({key for batch in one for key in batch["keys"]}) == 36  # and they are not all the same
    assert not torch.equal(one[0]["x0"], one[1]["x0"])


def test_appearances_are_the_same_on_two_processes_and_after_a_resume(
    seen, train, views_dataset, tensor_bytes, tmp_path
):
    varied = (f"data={views_dataset}", "appearance={roll_deg: 5}", "train.steps=4")
    one, two = seen(1, "one", *varied, steps=range(4)), seen(2, "two", *varied, steps=range(4))
    assert_same(two, one)
    clean = seen(1, "clean", *varied[::2], steps=range(4))
    for batch, other in zip(one, clean, strict=True):
        same = (batch["x1"] == other["x1"]).flatten(1).all(1)
        assert torch.equal(same, batch["t"] != 1)
    train(2, tmp_path / "parts", *varied[:2], "train.steps=2").run()
    train(2, tmp_path / "parts", *varied).run()
    assert tensor_bytes(tmp_path / "parts", 4) == tensor_bytes(tmp_path / "two", 4)


def test_two_processes_train_to_the_weights_of_one(train, weights, tmp_path):
    for world in (1, 2):
        train(world, tmp_path / f"{world}", STEPS, *SGD).run()
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert (one - two).abs().max() < 1e-6


def test_two_processes_that_accumulate_train_to_the_weights_of_one(train, weights, tmp_path):
    train(1, tmp_path / "1", STEPS, *SGD).run()
    train(2, tmp_path / "2", STEPS, *SGD, "train.max_batch_per_device=2").run()
    assert (weights(tmp_path / "1") - weights(tmp_path / "2")).abs().max() < 1e-6


def test_without_gradient_sync_the_weights_are_others(train, weights, tmp_path):
    """The two tests above could not pass by accident: weights that were trained apart lie far outside their bound."""
    from tasks import train_without_sync

    train(1, tmp_path / "1", STEPS, *SGD).run()
    train(2, tmp_path / "2", STEPS, *SGD, task=train_without_sync).run()
    assert (weights(tmp_path / "1") - weights(tmp_path / "2")).abs().max() > 1e-3


def test_two_processes_train_to_the_weights_of_one_with_adamw(train, weights, tmp_path):
    train(1, tmp_path / "start", "train.steps=1", "train.optimizer.lr=1.0e-12").run()
    for world in (1, 2):
        train(world, tmp_path / f"{world}", STEPS, *ADAMW).run()
    one, two, start = weights(tmp_path / "1"), weights(tmp_path / "2"), weights(tmp_path / "start")
    assert (one - two).norm() < 1e-3 * one.norm()
    assert (one - two).norm() < 1e-3 * (one - start).norm()  # also measured by how far they have come


def test_two_processes_resumed_as_one_go_on_with_the_same_samples_and_noise(seen, train, weights, tmp_path):
    expected = seen(1, "whole", *SGD, "train.steps=6", steps=range(3, 6))
    train(2, tmp_path / "moved", *SGD, "train.steps=3").run()
    found = seen(1, "moved", *SGD, "train.steps=6", steps=range(3, 6))
    assert_same(found, expected)
    assert (weights(tmp_path / "whole") - weights(tmp_path / "moved")).abs().max() < 1e-6


@pytest.mark.parametrize("world", [3, 4])
def test_more_than_two_processes_resume_bit_for_bit(train, tensor_bytes, tmp_path, world):
    """With three addends the order of a sum matters, and with it how gradients are put into buckets."""
    train(world, tmp_path / "whole").run()
    train(world, tmp_path / "parts", "train.steps=2").run()
    train(world, tmp_path / "parts").run()
    assert tensor_bytes(tmp_path / "whole", 6) == tensor_bytes(tmp_path / "parts", 6)


def test_nodes_that_split_the_shards_share_none_of_them(seen):
    """The tiny dataset's three shards hold samples 0 to 15, 16 to 31 and 32 to 47; the second node has the second."""
    nodes = seen(2, "nodes", "train.steps=3", "reader.split_by_node=true", LOCAL_WORLD_SIZE="1")
    one = seen(2, "one", "train.steps=3", "reader.split_by_node=true", LOCAL_WORLD_SIZE="2")
    assert_same(one, seen(2, "plain", "train.steps=3"))
    for batch, same in zip(nodes, one, strict=True):
        second = [16 <= int(key) < 32 for key in batch["keys"]]
        assert second == [False] * 6 + [True] * 6
        assert torch.equal(batch["t"], same["t"])  # drawn by position, whatever is read
