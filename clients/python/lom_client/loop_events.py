"""What a control loop has to tell somebody, told outside its control thread."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from lom_client.levels import Command, Flag, Level

_LOGGER = logging.getLogger(__name__)
_NS = 1e-9
_LONGEST_GOODBYE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class LevelChanged:
    """Tick `tick` is of another level than the one before, for `reason`; empty where the policy acts again."""

    tick: int
    before: Level
    after: Level
    reason: str


@dataclass(frozen=True, kw_only=True)
class BundleChanged:
    """From tick `tick` on another bundle answers."""

    tick: int
    bundle_digest: str
    version: int


@dataclass(frozen=True, kw_only=True)
class OutOfDistribution:
    """At tick `tick` the answers' scores begin to warn."""

    tick: int


@dataclass(frozen=True, kw_only=True)
class LoopStalled:
    """Nobody has called `step` since tick `tick`, for so many seconds."""

    tick: int
    stalled_s: float


@dataclass(frozen=True, kw_only=True)
class RecordingEnded:
    """The recorder of this loop records no longer, for `reason`; the loop goes on."""

    reason: str


LoopEvent: TypeAlias = LevelChanged | BundleChanged | OutOfDistribution | LoopStalled | RecordingEnded


def events_between(before: Command | None, command: Command) -> list[LoopEvent]:
    """What is worth telling of `command`, which follows `before`."""
    events: list[LoopEvent] = []
    level = Level.DEGRADED if before is None else before.level
    if command.level is not level:
        events.append(LevelChanged(tick=command.sequence, before=level, after=command.level, reason=command.reason))
    if Flag.BUNDLE_CHANGED in command.flags:
        reply = command.reply
        events.append(
            BundleChanged(
                tick=command.sequence,
                bundle_digest=reply.bundle_digest if reply else "",
                version=reply.version if reply else 0,
            )
        )
    if Flag.OUT_OF_DISTRIBUTION in command.flags and not (before and Flag.OUT_OF_DISTRIBUTION in before.flags):
        events.append(OutOfDistribution(tick=command.sequence))
    return events


class EventReporter:
    """Calls the hook in a thread of its own, and watches that the loop goes on.

    **Threads**: any.
    """

    def __init__(
        self, hook: Callable[[LoopEvent], object], last_step: Callable[[], tuple[int, int]], stall_ns: int
    ) -> None:
        """`last_step` gives the number of the last tick, 0 before the first, and its time."""
        self._hook = hook
        self._last_step = last_step
        self._stall_ns = stall_ns
        self._events: queue.SimpleQueue[LoopEvent | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lom-control-loop-events", daemon=True)
        self._thread.start()

    def report(self, event: LoopEvent) -> None:
        """Has it told; does not block."""
        self._events.put(event)

    def close(self) -> None:
        """Ends the thread, unless the hook holds it up."""
        self._events.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(_LONGEST_GOODBYE_S)

    def _run(self) -> None:
        stalled_at = 0
        while True:
            tick, stepped_ns = self._last_step()
            silence_ns = time.monotonic_ns() - stepped_ns
            is_due = tick > 0 and tick != stalled_at
            if is_due and silence_ns >= self._stall_ns:
                stalled_at = tick
                self._tell(LoopStalled(tick=tick, stalled_s=silence_ns * _NS))
                continue
            try:
                event = self._events.get(timeout=(self._stall_ns - silence_ns if is_due else self._stall_ns) * _NS)
            except queue.Empty:
                continue
            if event is None:
                return
            self._tell(event)

    def _tell(self, event: LoopEvent) -> None:
        try:
            self._hook(event)
        except Exception:
            _LOGGER.exception("the hook of a control loop raised")
