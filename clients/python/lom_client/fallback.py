"""What the robot does this tick: a pure function of what is known, so that a virtual clock can test it."""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from lom_api.reasons import Reason


class Source(StrEnum):
    """Where the values of a tick come from."""

    FRESH = "fresh"
    """The policy's answer to this tick's own observation."""
    HOLD = "hold"
    """The policy's newest answer to an earlier observation, still young enough."""
    SAFE = "safe"
    """The safe action."""


@dataclass(frozen=True, eq=False)
class FallbackRules:
    """What may be put out at all. **Shapes**: `low`, `high`, `safe_action` float32[A], environment units.

    Raises:
        ValueError: the safe action is not finite, not inside the bounds or of another shape; a bound is NaN or above
            its upper bound; the period or the hold limit is out of range.
    """

    low: NDArray[np.float32]
    high: NDArray[np.float32]
    safe_action: NDArray[np.float32]
    period_s: float
    hold_limit: int

    def __post_init__(self) -> None:
        if self.low.ndim != 1 or self.low.shape != self.high.shape or not (self.low <= self.high).all():
            raise ValueError("action bounds must be two vectors of one length, the lower one below the upper one")
        fault = self.fault_of(self.safe_action)
        if fault:
            raise ValueError(f"safe_action {self.safe_action} cannot be put out: {fault}")
        if not 0 < self.period_s <= 3600:
            raise ValueError(f"period_s must be above 0 and at most 3600, got {self.period_s}")
        if self.hold_limit < 0:
            raise ValueError(f"hold_limit must be 0 or more ticks, got {self.hold_limit}")

    def fault_of(self, values: NDArray[np.float32]) -> str:
        """Why these values must not be put out; empty when they may."""
        if values.shape != self.low.shape:
            return Reason.BAD_SHAPE
        if not np.isfinite(values).all():
            return Reason.NON_FINITE_ACTION
        if (values < self.low).any() or (values > self.high).any():
            return "ACTION_OUT_OF_BOUNDS"
        return ""

    def may_hold(self, answer: "Answer", tick: int, now: float) -> bool:
        """An answer serves `hold_limit` ticks beyond its own, and no longer than they take even if the loop stalls."""
        return (
            tick - answer.tick <= self.hold_limit and now - answer.observed_at <= (self.hold_limit + 1) * self.period_s
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """Event: the policy answered the observation of `tick`, taken at `observed_at` (monotonic seconds)."""

    tick: int
    observed_at: float
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Miss:
    """Event: there is no answer to the observation of `tick`, for `reason`."""

    tick: int
    reason: str


@dataclass(frozen=True, eq=False)
class LoopAction:
    """The output of one tick.

    Attributes:
        values: float32[A], finite and inside the bounds; the caller's own copy.
        source: where the values come from.
        age_s: seconds since the observation that the values answer; None for the safe action.
        reason: why there is no fresh answer; empty when there is.
        tick: count of this tick, from 1.
    """

    values: NDArray[np.float32]
    source: Source
    age_s: float | None
    reason: str
    tick: int


@dataclass(frozen=True, eq=False)
class LoopState:
    """What one tick leaves to the next: its number, and the newest sound answer."""

    tick: int = 0
    newest: Answer | None = field(default=None)


def decide(rules: FallbackRules, state: LoopState, event: Answer | Miss, now: float) -> tuple[LoopState, LoopAction]:
    """One tick: a fresh answer, else the newest one while it is young enough, else the safe action.

    Args:
        rules: what may be put out.
        state: what the tick before left; `LoopState()` before the first.
        event: the newest thing known when the tick must decide; it may belong to an earlier tick.
        now: monotonic seconds.
    """
    tick = state.tick + 1
    newest = state.newest
    reason = Reason.DEADLINE_EXCEEDED if event.tick != tick else ""
    if isinstance(event, Miss):
        reason = reason or event.reason
    else:
        fault = rules.fault_of(event.values)
        reason = fault or reason
        is_newer = newest is None or event.tick > newest.tick
        if not fault and is_newer and event.tick <= tick:
            newest = event

    if newest is not None and newest.tick == tick and rules.may_hold(newest, tick, now):
        output = _output(newest, Source.FRESH, "", tick, now)
    elif newest is not None and rules.may_hold(newest, tick, now):
        output = _output(newest, Source.HOLD, reason, tick, now)
    else:
        output = LoopAction(rules.safe_action.copy(), Source.SAFE, None, reason or "STALE", tick)
    return LoopState(tick, newest), output


def _output(answer: Answer, source: Source, reason: str, tick: int, now: float) -> LoopAction:
    return LoopAction(answer.values.copy(), source, now - answer.observed_at, reason, tick)
