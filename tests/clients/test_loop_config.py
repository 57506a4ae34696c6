"""A configuration means what it says, or is refused by the name of the field."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from lom_client import Kind, LoopConfig, OnWarning

MS = 1_000_000


def make_config(**changes: Any) -> LoopConfig:
    values: dict[str, Any] = {"period_s": 0.02, "kinds": "position", "safe_action": [0.0, 0.5]}
    return LoopConfig(**(values | changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("period_s", 0.0),
        ("period_s", -0.1),
        ("period_s", math.nan),
        ("period_s", math.inf),
        ("kinds", "sideways"),
        ("kinds", ["position", "sideways"]),
        ("kinds", ["position"]),
        ("kinds", []),
        ("safe_action", [0.0, math.nan]),
        ("safe_action", None),
        ("safe_action", "text"),
        ("safe_action", [[0.0, 0.0]]),
        ("slew_per_s", [1.0, -1.0]),
        ("slew_per_s", math.nan),
        ("slew_per_s", [1.0, 1.0, 1.0]),
        ("acceleration_per_s2", 0.0),
        ("bounds_tolerance", math.nan),
        ("deadline_s", -0.001),
        ("deadline_s", 0.021),
        ("deadline_s", math.nan),
        ("max_age_s", 0.0),
        ("max_age_s", math.nan),
        ("hold_limit", -1),
        ("velocity_decay_s", 0.0),
        ("velocity_decay", 0.11),
        ("torque_hold", 0.021),
        ("stop_s", -1.0),
        ("recovery_ticks", 0),
        ("on_warning", "panic"),
        ("blend_ticks", -1),
        ("hysteresis_width", -1.0),
        ("hysteresis_width", math.inf),
        ("connect_deadline_s", 0.0),
        ("history_length", -1),
    ],
)
def test_a_bad_field_is_refused_by_name(field: str, value: Any) -> None:
    arguments = {field if field in FIELDS else f"{field}_s": value}
    with pytest.raises(ValueError, match=rf"{field}|low|safe_action must have"):
        make_config(**arguments)


FIELDS = {field.name for field in dataclasses.fields(LoopConfig)}


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((1.0, -1.0), "low"),
        ((math.nan, 1.0), "low"),
        ((-1.0, 0.4), "safe_action"),
        (([-1.0] * 3, [1.0] * 3), "safe_action"),
    ],
)
def test_bad_bounds_are_refused_at_once(bounds: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_config(action_bounds=bounds)


def test_a_number_stands_for_every_element_and_seconds_become_nanoseconds() -> None:
    config = make_config(safe_action=0.25, slew_per_s=2.0, on_warning="fallback", deadline_s=0.0, max_age_s=0.05)
    rules = config.rules([-1.0, -2.0, -3.0], 4.0)
    assert rules.kinds == (Kind.POSITION,) * 3
    assert rules.low == (-1.0, -2.0, -3.0)
    assert rules.high == (4.0, 4.0, 4.0)
    assert rules.safe_action == (0.25,) * 3
    assert rules.max_step == pytest.approx((0.04,) * 3)
    assert (rules.period_ns, rules.max_age_ns) == (20 * MS, 50 * MS)
    assert rules.on_warning is OnWarning.FALLBACK
    assert not rules.waits


def test_the_defaults() -> None:
    config = make_config()
    rules = config.rules(-1, 1)
    assert config.wait_s == pytest.approx(0.016)
    assert rules.waits
    assert (rules.max_age_ns, rules.hold_ticks, rules.stop_ticks, rules.recovery_ticks) == (40 * MS, 5, 20, 5)
    assert (rules.velocity_decay_ns, rules.torque_hold_ns, rules.stop_ns) == (100 * MS, 20 * MS, 100 * MS)
    assert (rules.has_fallback, rules.pins_bundle, rules.on_warning) == (False, False, OnWarning.FLAG)


def test_bounds_are_never_wider_than_was_said_though_commands_are_float32() -> None:
    low, high = 0.1, 0.7  # float32 says 0.10000000149 and 0.69999998808, float32(0.3) is above 0.3
    rules = make_config(safe_action=0.2).rules([low, -0.7], [high, 0.3])
    for bound, given in ((rules.low, (low, -0.7)), (rules.high, (high, 0.3))):
        assert all(np.float32(value) == value for value in bound)
        assert bound == pytest.approx(given, abs=1e-7)
    assert rules.low[0] >= low
    assert rules.low[1] >= -0.7
    assert rules.high[0] <= high
    assert rules.high[1] <= 0.3
