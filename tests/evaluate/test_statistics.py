"""Statistics against values that are known."""

import numpy as np
import pytest

from sitdist.errors import DataError
from sitdist.evaluate.statistics import THRESHOLDS, auc, summarize, summarize_columns


def test_summaries_are_over_all_values_named():
    summary = summarize([1.0, 2.0, 30.0, 4.0], rotation=True).to_dict()
    assert (summary["mean"], summary["median"], summary["n"]) == (9.25, 3.0, 4)
    assert (summary["q25"], summary["q75"]) == (1.75, 10.5)
    assert [summary[f"share_under_{angle}_deg"] for angle in THRESHOLDS] == [0.0, 0.25, 0.75, 0.75, 0.75, 0.75]
    plain = summarize([1.0]).to_dict()
    assert set(plain) == {"mean", "median", "n", "q25", "q75", "low", "high"}
    assert (plain["low"], plain["high"]) == (1.0, 1.0)
    with pytest.raises(DataError, match="1 of 2 values are not finite"):
        summarize([1.0, float("nan")])


def test_the_area_under_the_curve_is_that_of_the_counted_curve():
    errors = np.random.default_rng(0).exponential(12.0, 200)
    thresholds = np.linspace(0.0, 30.0, 20_001)
    curve = (errors[None] < thresholds[:, None]).mean(1)
    assert auc(errors) == pytest.approx(float(curve.mean()), abs=1e-3)
    assert auc(np.zeros(3)) == 1.0
    assert auc(np.full(3, 31.0)) == 0.0


def test_the_interval_covers_the_mean_of_normal_numbers_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(5.0, 2.0, (300, 60))
    intervals = [summarize(row.tolist()) for row in draws]
    covered = np.mean([each.low <= 5.0 <= each.high for each in intervals])
    assert 0.90 < covered < 0.985
    width = np.mean([each.high - each.low for each in intervals])
    assert width == pytest.approx(2 * 1.96 * 2.0 / 60**0.5, rel=0.1)


def test_the_seed_decides_the_interval_and_measures_are_resampled_together():
    values = np.random.default_rng(2).normal(size=40).tolist()
    assert summarize(values) == summarize(values)
    assert summarize(values, seed=1).low != summarize(values).low
    both = summarize_columns({"a": values, "b": [2 * value for value in values]}, set())
    assert both["b"].low == pytest.approx(2 * both["a"].low)
