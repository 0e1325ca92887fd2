"""Radius bins, work units, and the merge that wants every view exactly once."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from records import record

from sitdist.errors import DataError
from sitdist.evaluate.units import (
    PICTURES_PER_BIN,
    ViewRef,
    is_finished,
    make_units,
    merge_pictures,
    merge_records,
    radius_bins,
    write_unit,
)


def references(bins):
    return [ViewRef(f"v{i:03d}", i, bin_ + 0.5, bin_) for i, bin_ in enumerate(bins)]


def write(folder, units):
    for unit in units:
        picture = np.full((unit.pictures, 2, 2, 3), unit.number, np.uint8)
        write_unit(folder, unit, [record(view.key, bin=view.bin) for view in unit.views], picture, picture + 1)


def test_a_radius_on_an_edge_starts_the_upper_bin_and_the_last_bin_is_closed():
    bins, limits = radius_bins([3.0, 3.999, 4.0, 4.0 - 1e-12, 5.0, 5.0 + 1e-12], None)
    assert limits == (3, 5)
    assert bins == [3, 3, 4, 4, 4, 4]


def test_radii_outside_the_limits_have_no_bin():
    bins, _ = radius_bins([0.9, 1.0, 6.5, 7.0, 7.1], (1, 7))
    assert bins == [None, 1, 6, 6, None]


def test_units_hold_one_bin_each_and_all_views_once():
    views = references([1, 2, 1, 2, 1, 1, 2])
    units = make_units(views, batch=3)
    assert [[view.key for view in unit.views] for unit in units] == [
        ["v000", "v002", "v004"],
        ["v005"],
        ["v001", "v003", "v006"],
    ]
    assert [unit.number for unit in units] == [0, 1, 2]


def test_the_first_views_of_every_bin_leave_their_pictures():
    units = make_units(references([1] * (PICTURES_PER_BIN + 3) + [2]), batch=3)
    assert [unit.pictures for unit in units] == [3, 1, 0, 1]


def test_merge_gives_every_view_once_sorted_by_key(tmp_path):
    units = make_units(references([2, 1, 2, 1, 1]), batch=2)
    write(tmp_path, reversed(units))
    records = merge_records(tmp_path, units)
    assert [record.key for record in records] == ["v000", "v001", "v002", "v003", "v004"]
    pictures = merge_pictures(tmp_path, units)
    assert pictures["key"].tolist() == ["v001", "v003", "v004", "v000", "v002"]
    assert pictures["bin"].tolist() == [1, 1, 1, 2, 2]
    assert pictures["true"][:, 0, 0, 0].tolist() == [0, 0, 1, 2, 2]
    assert (pictures["rendered"] == pictures["true"] + 1).all()


def test_merge_names_missing_views(tmp_path):
    units = make_units(references([1] * 5), batch=2)
    write(tmp_path, [units[0], units[2]])
    assert not is_finished(tmp_path, units[1])
    with pytest.raises(DataError, match=r"2 views missing .*\(v002, v003\); start the evaluation again"):
        merge_records(tmp_path, units)


def test_merge_names_duplicate_and_foreign_views(tmp_path):
    units = make_units(references([1] * 4), batch=2)
    write(tmp_path, units)
    (tmp_path / "unit_00007.jsonl").write_text(json.dumps(asdict(record("v001"))) + "\n")
    with pytest.raises(DataError, match=r"1 views there more often .*\(v001\); delete the folder"):
        merge_records(tmp_path, units)
    (tmp_path / "unit_00007.jsonl").write_text(json.dumps(asdict(record("stranger"))) + "\n")
    with pytest.raises(DataError, match=r"\(stranger\)"):
        merge_records(tmp_path, units)


def test_a_write_that_was_cut_off_does_not_count_as_a_finished_unit(tmp_path):
    units = make_units(references([1, 1]), batch=2)
    (tmp_path / ".unit_00000.jsonl.123.tmp").write_text('{"key": "v000", "la')
    assert not is_finished(tmp_path, units[0])
    write(tmp_path, units)
    assert len(merge_records(tmp_path, units)) == 2


def test_a_value_that_is_not_finite_stops_with_the_view_and_its_name(tmp_path):
    (unit,) = make_units(references([1]), batch=1)
    bad = replace(record("v000"), psnr=float("nan"))
    with pytest.raises(DataError, match="view v000: psnr is not finite"):
        write_unit(tmp_path, unit, [bad], np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8))
    assert not is_finished(tmp_path, unit)


def test_the_row_of_a_record_spells_out_the_poses_row_major():
    row = record("v000").row()
    assert row["true_00"] == 0.0
    assert row["true_03"] == 3.0
    assert row["true_23"] == 11.0
    assert "true" not in row
