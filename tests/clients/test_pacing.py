"""The schedule, under a virtual clock and once under the real one."""

import time
from itertools import islice

import pytest

from lom_client import paced_ticks


class VirtualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 0.0001  # a sleep is always a little late


def test_lateness_never_adds_up() -> None:
    clock = VirtualClock()
    for tick in islice(paced_ticks(0.01, clock=clock, sleep=clock.sleep), 10_000):
        assert tick.late_s < 0.00011
        assert tick.skipped == 0
        assert clock.now - 100.0 == pytest.approx(tick.index * 0.01, abs=0.0002)
        clock.now += 0.007


def test_an_overrun_loses_the_ticks_that_are_over_and_nothing_bursts() -> None:
    clock = VirtualClock()
    ticks = paced_ticks(0.01, clock=clock, sleep=clock.sleep)
    next(ticks)
    clock.now += 0.035
    late = next(ticks)
    assert (late.index, late.skipped) == (3, 2)
    assert late.late_s == pytest.approx(0.005)
    after = next(ticks)
    assert (after.index, after.skipped) == (4, 0)
    assert clock.now - 100.0 == pytest.approx(0.04, abs=0.0002)


@pytest.mark.parametrize("period_s", [0, -1, float("nan")])
def test_a_period_must_be_positive(period_s: float) -> None:
    with pytest.raises(ValueError, match="period_s"):
        next(paced_ticks(period_s))


def test_the_real_clock_is_kept() -> None:
    began_at = time.monotonic()
    indices = [tick.index for tick in islice(paced_ticks(0.01), 20)]
    assert time.monotonic() - began_at >= 0.01 * indices[-1]
    assert indices == sorted(set(indices))
