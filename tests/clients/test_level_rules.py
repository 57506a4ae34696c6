"""Rules that contradict themselves never reach a robot."""

import math
from dataclasses import replace
from typing import Any

import pytest

from lom_client.level_rules import Kind, default_hold_ticks, default_recovery_ticks, default_stop_ticks
from tests.clients.level_traces import MS, make_rules


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("period_ns", 0),
        ("period_ns", -1),
        ("period_ns", 3601 * 10**9),
        ("kinds", ()),
        ("kinds", ("position", "sideways")),
        ("low", (-1.0,)),
        ("low", (math.nan, -1.0)),
        ("low", (1.5, -1.0)),
        ("low", (math.inf, -1.0)),
        ("low", (-1.0, math.nan)),
        ("safe_action", (0.0,)),
        ("safe_action", (0.0, math.nan)),
        ("safe_action", (0.0, 1.0000001)),
        ("slew_per_s", (1.0,)),
        ("slew_per_s", (1.0, 0.0)),
        ("slew_per_s", (1.0, -1.0)),
        ("slew_per_s", (math.nan, 1.0)),
        ("acceleration_per_s2", (1.0, math.nan)),
        ("acceleration_per_s2", (0.0, 1.0)),
        ("acceleration_per_s2", (1.0, 1e-300)),
        ("acceleration_per_s2", (1.0, 1.0, 1.0)),
        ("bounds_tolerance", math.nan),
        ("bounds_tolerance", -0.1),
        ("bounds_tolerance", 1.1),
        ("max_age_ns", 0),
        ("hold_ticks", -1),
        ("stop_ticks", 5),
        ("recovery_ticks", 0),
        ("velocity_decay_ns", 0),
        ("velocity_decay_ns", 100 * MS + 1),
        ("torque_hold_ns", -1),
        ("torque_hold_ns", 20 * MS + 1),
        ("stop_ns", -1),
        ("on_warning", "panic"),
        ("warning_ticks", 0),
        ("frozen_ticks", -1),
        ("blend_ticks", -1),
    ],
)
def test_a_contradiction_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}"):
        replace(make_rules(), **{field: value})


def test_what_follows_from_rules() -> None:
    rules = make_rules(
        20 * MS,
        low=(-1.0, -math.inf),
        high=(3.0, 5.0),
        slew_per_s=(2.0, math.inf),
        acceleration_per_s2=(math.inf, 50.0),
    )
    assert rules.tolerance == pytest.approx((0.4, 0.0))
    assert rules.max_step == pytest.approx((0.04, math.inf))
    assert rules.max_step_change == pytest.approx((math.inf, 0.02))
    assert make_rules().max_step == make_rules().max_step_change == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("period_ms", "hold", "stop", "recovery"),
    [(1, 5, 20, 50), (4, 5, 20, 13), (20, 5, 20, 5), (30, 3, 16, 5), (100, 1, 5, 5), (1000, 0, 1, 5)],
)
def test_defaults_are_ticks_below_a_time(period_ms: int, hold: int, stop: int, recovery: int) -> None:
    period_ns = period_ms * MS
    assert default_hold_ticks(period_ns) == hold
    assert default_stop_ticks(period_ns, hold) == stop
    assert default_stop_ticks(period_ns, 30) == 31
    assert default_recovery_ticks(period_ns) == recovery


def test_every_kind_is_known_by_its_name() -> None:
    assert [Kind(name) for name in ("position", "velocity", "torque")] == list(Kind)


def test_an_upper_bound_is_a_number() -> None:
    for high in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=r"^low\[0\] must be a number at or below high\[0\]"):
            replace(make_rules(), high=(high, 1.0))
