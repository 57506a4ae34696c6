"""How a control loop treats its robot."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lom_client.level_rules import (
    NS_PER_S,
    Kind,
    LevelRules,
    OnWarning,
    Vector,
    default_hold_ticks,
    default_recovery_ticks,
    default_stop_ticks,
)

Fallback: TypeAlias = Callable[[NDArray[np.float64], NDArray[np.float64] | None], ArrayLike]
"""Of the command before and of what was measured: float64[A] each, the latter None where the loop is not told."""

_WAIT_SHARE = 0.8
_LONGEST_S = 3600.0
_LONGEST_HISTORY = 10_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopConfig:
    """What each element of an action is, what may be put out, and when the loop gives up on the policy.

    A number for a vector stands for every element. What each level puts out, to the bit: `lom_client.levels`.

    Raises:
        ValueError: a field is out of range or contradicts another one; names it.
    """

    period_s: float
    """From tick to tick, above 0 and at most 3600."""
    kinds: str | Sequence[str]
    """`position`, `velocity` or `torque`, for all elements or for each: what may be held, and for how long, when no
    answer comes. There is no default: the wrong one moves a robot."""
    safe_action: ArrayLike
    """What is put out before anything is known, and what torques return to. Inside the bounds."""
    action_bounds: tuple[ArrayLike, ArrayLike] | None = None
    """Lower and upper bound. None asks the server when the loop is made; give them to start before the server."""
    bounds_tolerance: float = 0.1
    """An answer that is outside by at most this share of the range is cut to the bounds; beyond, it is a miss."""
    slew_per_s: ArrayLike | None = None
    """Largest change of the command per second, whatever it comes from. None: no limit."""
    acceleration_per_s2: ArrayLike | None = None
    """Largest change of that change. None: no limit."""
    deadline_s: float | None = None
    """Longest wait of a step for the answer to its own observation; None for 80 % of the period. 0 does not wait: a
    step takes the newest answer there is, usually that to the observation before."""
    max_age_s: float | None = None
    """Longest time from an observation to the use of its answer; None for two periods."""
    hold_limit: int | None = None
    """Misses in a row that are bridged by holding; None for 5, but not above 100 ms."""
    stop_limit: int | None = None
    """Misses in a row that stop the robot; None for 20, but not above 500 ms."""
    recovery_ticks: int | None = None
    """Good answers in a row that end the fallback or allow a rearm; None for 5, and at least 50 ms."""
    velocity_decay_s: float = 0.1
    """A held velocity is zero after this time; at most 0.1."""
    torque_hold_s: float = 0.02
    """A torque is held for this time; at most 0.02."""
    stop_s: float = 0.1
    """How long a stop takes; 0 for at once."""
    fallback: Fallback | None = None
    """Acts under FALLBACK. A pure function that answers within 200 µs; it is tried when the loop is made, and stops the
    robot where it fails later. None: positions stay, velocities go to zero, torques to the safe action."""
    on_warning: OnWarning | str = OnWarning.FLAG
    """What becomes of answers whose scores warn: `ignore`, `flag`, or `fallback` after three in a row."""
    frozen_ticks: int = 10
    """Identical observations in a row that are flagged; 0 for never."""
    blend_ticks: int = 5
    """Ticks over which the policy takes over again, from a fallback or another bundle; 0 for at once."""
    pins_bundle: bool = False
    """Refuse every bundle but the first one that answers."""
    variant: str | None = None
    """As for `PolicyClient.act`."""
    hysteresis_width: float = 0.0
    """As for `PolicyClient.act`, with the mode that acted last as the previous one; 0 for none."""
    connect_deadline_s: float = 5.0
    """Longest wait for the bounds, where the server is asked for them."""
    history_length: int = 0
    """How many of the last commands and rejections `ControlLoop.history` remembers."""

    def __post_init__(self) -> None:
        if self.action_bounds is None:
            self.rules(-np.inf, np.inf)  # finds whatever is wrong with any bounds
        else:
            self.rules(*self.action_bounds)
        if not 0 <= self.wait_s <= self.period_s:
            raise ValueError(f"deadline_s must be between 0 and the period {self.period_s}, got {self.deadline_s}")
        if not (math.isfinite(self.hysteresis_width) and self.hysteresis_width >= 0):
            raise ValueError(f"hysteresis_width must be 0 or more, got {self.hysteresis_width}")
        if not 0 < self.connect_deadline_s <= _LONGEST_S:
            raise ValueError(
                f"connect_deadline_s must be above 0 and at most {_LONGEST_S}, got {self.connect_deadline_s}"
            )
        if not 0 <= self.history_length <= _LONGEST_HISTORY:
            raise ValueError(f"history_length must be between 0 and {_LONGEST_HISTORY}, got {self.history_length}")

    @property
    def wait_s(self) -> float:
        """The deadline, None resolved."""
        return _WAIT_SHARE * self.period_s if self.deadline_s is None else self.deadline_s

    def rules(self, low: ArrayLike, high: ArrayLike) -> LevelRules:
        """What the levels go by, for a robot with these bounds.

        Raises:
            ValueError: a field is out of range, or does not go with the bounds.
        """
        period_ns = _nanoseconds("period_s", self.period_s)
        hold_ticks = default_hold_ticks(period_ns) if self.hold_limit is None else self.hold_limit
        if hold_ticks < 0:
            raise ValueError(f"hold_limit must be 0 or more ticks, got {hold_ticks}")
        lows, highs, safe = (
            _numbers(name, values) for name, values in (("low", low), ("high", high), ("safe_action", self.safe_action))
        )
        slew = _numbers("slew_per_s", () if self.slew_per_s is None else self.slew_per_s)
        acceleration = _numbers(
            "acceleration_per_s2", () if self.acceleration_per_s2 is None else self.acceleration_per_s2
        )
        kinds = np.asarray(self.kinds)
        # The bounds know best how many elements there are.
        width = next((len(values) for values in (lows, highs, kinds, safe) if values.ndim), 1)
        return LevelRules(
            period_ns=period_ns,
            kinds=_kinds(_for_each(kinds, width)),
            low=_inward(_for_each(lows, width), math.inf),
            high=_inward(_for_each(highs, width), -math.inf),
            safe_action=_for_each(safe, width),
            slew_per_s=_for_each(slew, width),
            acceleration_per_s2=_for_each(acceleration, width),
            waits=self.wait_s > 0,
            has_fallback=self.fallback is not None,
            bounds_tolerance=self.bounds_tolerance,
            max_age_ns=2 * period_ns if self.max_age_s is None else _nanoseconds("max_age_s", self.max_age_s),
            hold_ticks=hold_ticks,
            stop_ticks=default_stop_ticks(period_ns, hold_ticks) if self.stop_limit is None else self.stop_limit,
            recovery_ticks=default_recovery_ticks(period_ns) if self.recovery_ticks is None else self.recovery_ticks,
            velocity_decay_ns=_nanoseconds("velocity_decay_s", self.velocity_decay_s),
            torque_hold_ns=_nanoseconds("torque_hold_s", self.torque_hold_s),
            stop_ns=_nanoseconds("stop_s", self.stop_s),
            on_warning=_on_warning(self.on_warning),
            frozen_ticks=self.frozen_ticks,
            blend_ticks=self.blend_ticks,
            pins_bundle=self.pins_bundle,
        )


def _nanoseconds(name: str, seconds: float) -> int:
    # Written so that NaN fails as well.
    if not 0 <= seconds <= _LONGEST_S:
        raise ValueError(f"{name} must be between 0 and {_LONGEST_S}, got {seconds}")
    if seconds == 0 and name in ("period_s", "max_age_s", "velocity_decay_s"):
        raise ValueError(f"{name} must be above 0, got 0")
    return round(seconds * NS_PER_S)


def _numbers(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, or one for each element") from None
    if numbers.ndim > 1:
        raise ValueError(f"{name} must have one dimension, got {numbers.ndim}")
    return numbers


def _for_each(values: NDArray[Any], width: int) -> tuple[Any, ...]:
    return tuple(np.broadcast_to(values, width).tolist() if values.ndim == 0 else values.tolist())


def _inward(bounds: Vector, towards: float) -> Vector:
    """Bounds that float32 can say, none of them wider: commands are float32."""
    rounded = np.array(bounds, dtype=np.float32)
    is_outside = rounded < bounds if towards > 0 else rounded > bounds
    return tuple(np.where(is_outside, np.nextafter(rounded, np.float32(towards)), rounded).tolist())


def _kinds(names: Sequence[str]) -> tuple[Kind, ...]:
    try:
        return tuple(Kind(name) for name in names)
    except ValueError:
        raise ValueError(f"kinds must be position, velocity or torque, got {str(list(names))[:64]}") from None


def _on_warning(name: str) -> OnWarning:
    try:
        return OnWarning(name)
    except ValueError:
        raise ValueError(f"on_warning must be ignore, flag or fallback, got {str(name)[:64]!r}") from None
