"""The noise floor predicted for a sigma is the one measured by packing, adding noise and unpacking."""

import pytest

from sitdist.cli import main as cli
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.evaluate.baselines import SIGMAS, Floors, noise_floor
from sitdist.geometry.packing import PoseStatistics


@pytest.fixture(scope="module")
def floors(tiny_dataset):
    return Floors.of(tiny_dataset)


@pytest.mark.parametrize("sigma", [0.02, 0.2, 1.0])
def test_the_predicted_floor_is_the_measured_one(floors, tiny_dataset, sigma):
    poses = ShardReader(tiny_dataset, "train").camera_to_world().repeat(12, 1, 1)  # 576: less scatter of the mean
    statistics = PoseStatistics.from_dict(load_manifest(tiny_dataset).statistics)
    measured = noise_floor(poses, statistics, sigma, (4, 4, 4), seed=3)
    predicted = [floors.at(sigma), Floors.of(tiny_dataset, seed=1).at(sigma), Floors.of(tiny_dataset, seed=2).at(sigma)]
    assert sum(floor.rotation_deg for floor in predicted) / 3 == pytest.approx(measured.rotation_deg, rel=0.12)
    assert sum(floor.translation for floor in predicted) / 3 == pytest.approx(measured.translation, rel=0.12)


def test_an_entry_keeps_two_sigma_over_l(floors):
    assert floors.latent == (4, 4, 4)
    assert floors.entry_deviation(0.3) == pytest.approx(2 * 0.3 / 4)


def test_the_floor_of_the_largest_sigma_is_just_below_the_target(floors):
    for target in (0.1, 2.0, 10.0):
        largest = floors.largest_below(target)
        assert floors.at(largest).rotation_deg < target
        assert floors.at(1.001 * largest).rotation_deg >= target
    assert floors.largest_below(181.0) is None


def test_the_command_prints_a_row_a_sigma_and_names_the_largest(tiny_dataset, floors, capsys):
    assert cli.run(["sigma", str(tiny_dataset), "--target-deg", "2"]) == 0
    text = capsys.readouterr().out
    rows = {line.split("|")[0].strip(): line for line in text.splitlines() if line.count("|") == 3}
    assert {f"{sigma:g}" for sigma in SIGMAS} < set(rows)
    named = text.splitlines()[-1].rpartition(" ")[2]
    assert text.splitlines()[-1] == f"Largest sigma with a floor below 2 deg: {named}"
    assert float(named) == pytest.approx(floors.largest_below(2.0), rel=0.01)
    assert "not below 2 deg" in rows["1"]
    assert "not below" not in rows[named]
    assert f"{floors.at(1.0).rotation_deg:.3f}" in rows["1"]
