"""Radius bins, work units, and what they leave."""

import numpy as np
from records import record

from sitdist.evaluate.views import PICTURES_PER_BIN, ViewRef, make_units, merge_pictures, radius_bins, thinned


def references(bins):
    return [ViewRef(f"v{i:03d}", i, bin_ + 0.5, bin_) for i, bin_ in enumerate(bins)]


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


def test_pictures_are_merged_in_unit_order_with_their_bins():
    units = make_units(references([2, 1, 2, 1, 1]), batch=2)
    arrays = {}
    for unit in units:
        true = np.full((unit.pictures, 2, 2, 3), unit.number, np.uint8)
        keys = np.array([view.key for view in unit.views[: unit.pictures]])
        arrays[unit.name] = {"key": keys, "true": true, "rendered": true + 1}
    pictures = merge_pictures(arrays, units)
    assert pictures["key"].tolist() == ["v001", "v003", "v004", "v000", "v002"]
    assert pictures["bin"].tolist() == [1, 1, 1, 2, 2]
    assert pictures["true"][:, 0, 0, 0].tolist() == [0, 0, 1, 2, 2]
    assert (pictures["rendered"] == pictures["true"] + 1).all()


def test_views_are_thinned_evenly_over_the_bins():
    views = references([1, 1, 1, 1, 2, 2, 3])
    assert thinned(views, None) == thinned(views, 7) == views
    assert [view.key for view in thinned(views, 5)] == ["v000", "v001", "v004", "v005", "v006"]


def test_the_row_of_a_record_spells_out_the_poses_row_major():
    row = record("v000").row()
    assert row["true_00"] == 0.0
    assert row["true_03"] == 3.0
    assert row["true_23"] == 11.0
    assert "true" not in row
