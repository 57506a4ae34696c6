"""Means over seeds and their intervals."""

import numpy as np
import pytest

from lom.study.statistics import confidence_interval, mean_and_interval, mean_and_worst


def test_the_interval_of_many_values_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = confidence_interval(values)
    half_width = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.03)


def test_of_two_values_a_quarter_of_all_resamples_is_each_of_them_alone() -> None:
    assert confidence_interval([1.0, 2.0]) == (1.0, 2.0)
    assert confidence_interval([1.0, 2.0], level=0.4) == (1.5, 1.5)


def test_values_that_agree_have_an_interval_without_width() -> None:
    assert mean_and_interval([0.5, 0.5, 0.5]) == "0.500 [0.500, 0.500]"


def test_the_worst_is_the_least_unless_small_is_good() -> None:
    assert mean_and_worst([1.0, 2.0, 3.0]) == "2.000 (1.000)"
    assert mean_and_worst([1.0, 2.0, 3.0], max, digits=1) == "2.0 (3.0)"
