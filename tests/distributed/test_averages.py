"""Averages chosen afterwards are the same on any number of processes, and the doctor looks at all of them."""

import pytest
import torch

pytestmark = pytest.mark.distributed

AVERAGES = "train.averages={decays: [0.5], sigma_rels: [0.05, 0.1], snapshot_every: 5}"
SGD = ("train.optimizer.kind=sgd", "train.optimizer.lr=0.1")


def test_two_processes_keep_and_reconstruct_the_averages_of_one(train, tmp_path):
    from sitdist.runs.averages import read_average, reconstruct

    for world in (1, 2):
        train(world, tmp_path / f"{world}", "train.steps=10", *SGD, AVERAGES).run()
    pairs = [[read_average(tmp_path / run, 10, name) for run in "12"] for name in ("decay_0.5", "sigma_rel_0.1")]
    pairs.append([reconstruct(tmp_path / run, 0.08)[0] for run in "12"])
    for one, two in pairs:
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
    moved = pairs[0][0]["final_layer.linear.weight"] - pairs[1][0]["final_layer.linear.weight"]
    assert float(moved.abs().max()) > 1e-4
    assert torch.isfinite(moved).all()


def test_the_doctor_measures_between_two_processes(tiny_yaml, tmp_path):
    import ranks
    from tasks import doctor_to_file

    ranks.Ranks(tmp_path / "log", 2, doctor_to_file, tmp_path, str(tiny_yaml)).run()
    first, second = ((tmp_path / f"doctor_{rank}.txt").read_text() for rank in (0, 1))
    for said in (first, second):
        assert "No problems found." in said
        assert "6 samples per process, 6 at a time" in said
        assert "GB/s of gradients summed over processes" in said
    assert "a step" in first
