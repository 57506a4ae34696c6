"""What a robot may be told, and for how long: the constants of `lom_client.levels`."""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TypeAlias

Vector: TypeAlias = tuple[float, ...]

NS_PER_S = 1_000_000_000
_LONGEST_PERIOD_NS = 3600 * NS_PER_S
# Below, the arithmetic of braking could overflow.
_SMALLEST_LIMIT = 1e-9
_LONGEST_VELOCITY_DECAY_NS = 100_000_000
_LONGEST_TORQUE_HOLD_NS = 20_000_000
_HOLD_TICKS, _HOLD_NS = 5, 100_000_000
_STOP_TICKS, _STOP_NS = 20, 500_000_000
_RECOVERY_TICKS, _RECOVERY_NS = 5, 50_000_000


class Kind(StrEnum):
    """What one element of an action commands."""

    POSITION = "position"
    """Repeating it keeps the robot where it is."""
    VELOCITY = "velocity"
    """Repeating it keeps the robot moving, so that it decays to zero instead."""
    TORQUE = "torque"
    """Repeating it accelerates the robot, so that it is held for an instant only. Also the kind of whatever is none of
    the others."""


class OnWarning(StrEnum):
    """What becomes of answers whose scores warn."""

    IGNORE = "ignore"
    FLAG = "flag"
    """They are used, and flagged."""
    FALLBACK = "fallback"
    """They are used and flagged until several in a row warn; then the fallback acts."""


@dataclass(frozen=True, kw_only=True)
class LevelRules:
    """**Units**: times in nanoseconds; actions in environment units, those per second where the name says so.

    Vectors have one number for each element of an action; `inf` is no limit.

    Raises:
        ValueError: a field is out of range or contradicts another one; names it.
    """

    period_ns: int
    kinds: tuple[Kind, ...]
    low: Vector
    high: Vector
    safe_action: Vector
    """What is put out where nothing better is known, and what torques return to; inside the bounds."""
    waits: bool = True
    """Only the answer to a tick's own observation is fresh; else any that is new and young enough."""
    has_fallback: bool = False
    """A function of the user's gives the fallback's actions; else each element goes to its rest."""
    bounds_tolerance: float = 0.1
    """How far outside an answer may be and still be used, cut to the bounds: a share of the range."""
    slew_per_s: Vector = ()
    """Largest change of a command; empty for no limit."""
    acceleration_per_s2: Vector = ()
    """Largest change of that change; empty for no limit."""
    max_age_ns: int
    """Longest time from an observation to the use of its answer."""
    hold_ticks: int
    """Misses in a row that are bridged by holding."""
    stop_ticks: int
    """Misses in a row that stop the robot."""
    recovery_ticks: int
    """Good answers in a row that end the fallback, or allow a rearm."""
    velocity_decay_ns: int = _LONGEST_VELOCITY_DECAY_NS
    torque_hold_ns: int = _LONGEST_TORQUE_HOLD_NS
    stop_ns: int = 100_000_000
    """How long a stop takes; 0 stops within one tick."""
    on_warning: OnWarning = OnWarning.FLAG
    warning_ticks: int = 3
    """Answers in a row whose warning counts under `OnWarning.FALLBACK`."""
    frozen_ticks: int = 10
    """Identical observations in a row that are flagged; 0 for never."""
    blend_ticks: int = 5
    """Ticks over which the policy takes over again; 0 for at once."""
    pins_bundle: bool = False
    """Use the answers of the first bundle only."""

    def __post_init__(self) -> None:
        _require_range("period_ns", self.period_ns, 1, _LONGEST_PERIOD_NS)
        if not self.kinds or not all(kind in list(Kind) for kind in self.kinds):
            raise ValueError(f"kinds must name position, velocity or torque for each element, got {list(self.kinds)}")
        self._check_vectors()
        if not 0 <= self.bounds_tolerance <= 1:
            raise ValueError(f"bounds_tolerance must be between 0 and 1, got {self.bounds_tolerance}")
        _require_range("max_age_ns", self.max_age_ns, 1, 10 * _LONGEST_PERIOD_NS)
        _require_range("hold_ticks", self.hold_ticks, 0, 1000)
        _require_range("stop_ticks", self.stop_ticks, self.hold_ticks + 1, 100_000)
        _require_range("recovery_ticks", self.recovery_ticks, 1, 100_000)
        _require_range("velocity_decay_ns", self.velocity_decay_ns, 1, _LONGEST_VELOCITY_DECAY_NS)
        _require_range("torque_hold_ns", self.torque_hold_ns, 0, _LONGEST_TORQUE_HOLD_NS)
        _require_range("stop_ns", self.stop_ns, 0, 10 * NS_PER_S)
        if self.on_warning not in list(OnWarning):
            raise ValueError(f"on_warning must be ignore, flag or fallback, got {str(self.on_warning)[:64]!r}")
        _require_range("warning_ticks", self.warning_ticks, 1, 100_000)
        _require_range("frozen_ticks", self.frozen_ticks, 0, 100_000)
        _require_range("blend_ticks", self.blend_ticks, 0, 100_000)

    def _check_vectors(self) -> None:
        width = len(self.kinds)
        for name in ("low", "high", "safe_action", "slew_per_s", "acceleration_per_s2"):
            values = getattr(self, name)
            if len(values) != width and not (name in ("slew_per_s", "acceleration_per_s2") and not values):
                raise ValueError(f"{name} must have {width} numbers, one for each element, got {len(values)}")
        for index, (low, high, safe) in enumerate(zip(self.low, self.high, self.safe_action, strict=True)):
            if not low <= high or (math.isinf(low) and low == high):  # NaN fails the comparison too
                raise ValueError(f"low[{index}] must be a number at or below high[{index}], got {low} and {high}")
            if not (math.isfinite(safe) and low <= safe <= high):
                raise ValueError(f"safe_action[{index}] must be between {low} and {high}, got {safe}")
        for name in ("slew_per_s", "acceleration_per_s2"):
            for index, limit in enumerate(getattr(self, name)):
                if not limit >= _SMALLEST_LIMIT:
                    raise ValueError(f"{name}[{index}] must be {_SMALLEST_LIMIT} or more, got {limit}")

    @cached_property
    def tolerance(self) -> Vector:
        """How far outside the bounds each element may be."""
        ranges = (high - low for low, high in zip(self.low, self.high, strict=True))
        return tuple(self.bounds_tolerance * width if math.isfinite(width) else 0.0 for width in ranges)

    @cached_property
    def max_step(self) -> Vector:
        """Largest change of each element from tick to tick."""
        period_s = self.period_ns / 1e9
        return tuple(limit * period_s for limit in self.slew_per_s) or (math.inf,) * len(self.kinds)

    @cached_property
    def max_step_change(self) -> Vector:
        """Largest difference between two such changes."""
        period_s = self.period_ns / 1e9
        return tuple(limit * period_s * period_s for limit in self.acceleration_per_s2) or (math.inf,) * len(self.kinds)


def default_hold_ticks(period_ns: int) -> int:
    """5 ticks, but not above 100 ms."""
    return min(_HOLD_TICKS, _HOLD_NS // period_ns)


def default_stop_ticks(period_ns: int, hold_ticks: int) -> int:
    """20 ticks, but not above 500 ms, and more than are held."""
    return max(hold_ticks + 1, min(_STOP_TICKS, _STOP_NS // period_ns))


def default_recovery_ticks(period_ns: int) -> int:
    """5 ticks, and at least 50 ms."""
    return max(_RECOVERY_TICKS, -(-_RECOVERY_NS // period_ns))


def _require_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
