"""The learning rate at chosen steps."""

import math

import pytest

from sitdist.train.schedule import learning_rate


def test_warm_up_is_linear_and_ends_at_the_base_rate():
    rates = [learning_rate(step, base=2.0, steps=100, warmup_steps=4) for step in range(6)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_the_rate_is_constant_by_default_and_never_zero_at_the_first_step():
    assert [learning_rate(step, base=0.3, steps=10) for step in (0, 5, 9)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    ("step", "share"),
    [(10, 1.0), (35, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))), (60, 0.55), (110, 0.1), (500, 0.1)],
)
def test_cosine_falls_from_the_end_of_the_warm_up_to_the_final_ratio(step, share):
    rate = learning_rate(step, base=1e-3, steps=110, kind="cosine", warmup_steps=10, final_ratio=0.1)
    assert rate == pytest.approx(1e-3 * share)


def test_a_warm_up_longer_than_the_run_is_not_an_error():
    assert learning_rate(1, base=1.0, steps=2, kind="cosine", warmup_steps=10) == pytest.approx(0.2)
    assert learning_rate(10, base=1.0, steps=2, kind="cosine", warmup_steps=10) == pytest.approx(1.0)
