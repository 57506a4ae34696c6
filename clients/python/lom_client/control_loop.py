"""A policy inside a fixed-rate control loop: an action every tick, whatever the server does.

This is not a safety function: the robot's own limits and its emergency stop stay in force.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lom_api.reasons import Reason
from lom_client.client import PolicyClient
from lom_client.errors import PolicyError
from lom_client.fallback import Answer, FallbackRules, LoopAction, LoopState, Miss, Source, decide
from lom_client.pacing import Tick, paced_ticks


@dataclass(frozen=True)
class LoopCounters:
    """What happened since the loop began. `fresh + held + safe == ticks`; `misses` counts ticks that were not fresh,
    by reason."""

    ticks: int = 0
    fresh: int = 0
    held: int = 0
    safe: int = 0
    longest_miss_run: int = 0
    misses: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Question:
    tick: int
    observed_at: float
    over_at: float
    observation: NDArray[Any]


class ControlLoop:
    """Turns one observation per tick into one action per tick, in time, finite and inside the bounds.

    Each tick puts its observation into a mailbox of one slot and waits for the answer, at most `deadline_s`. Without
    one it repeats the newest answer for up to `hold_limit` ticks, then it puts out the safe action, until an answer
    comes again. At most one request is under way; none is repeated.

    **Threads**: `step` and `ticks` belong to one control thread; `counters` and `close` may be called from any. All
    I/O happens in one worker thread of this loop, which ends with `close`. The client is the caller's: it may be
    shared, and is not closed here.
    """

    def __init__(
        self,
        client: PolicyClient,
        *,
        period_s: float,
        safe_action: ArrayLike,
        action_bounds: tuple[ArrayLike, ArrayLike] | None = None,
        hold_limit: int = 5,
        deadline_s: float | None = None,
        variant: str | None = None,
        connect_deadline_s: float = 5.0,
    ) -> None:
        """Everything that can be wrong with the configuration is found here; `step` never raises.

        Args:
            client: asks the policy.
            period_s: seconds from tick to tick.
            safe_action: `[A]`, what is put out when there is nothing better, before the first answer too.
            action_bounds: lower and upper bound, `[A]` each. None asks the server now; give them to start a loop
                whose server is not there yet.
            hold_limit: ticks for which an answer may be repeated.
            deadline_s: longest wait of one tick; None for 80 % of the period, which leaves the rest to the loop's body.
            variant: as for `PolicyClient.act`.
            connect_deadline_s: longest wait for the bounds, when the server is asked for them.

        Raises:
            ValueError: an argument is out of range or contradicts another, the safe action outside the bounds included.
            PolicyError: the bounds were asked of the server, and it did not give them.
        """
        if action_bounds is None:
            space = client.get_spec(deadline_s=connect_deadline_s).action
            action_bounds = (space.low, space.high)
        low, high, safe = (np.array(values, dtype=np.float32) for values in (*action_bounds, safe_action))
        self._rules = FallbackRules(low, high, safe, period_s, hold_limit)
        self._deadline_s = 0.8 * period_s if deadline_s is None else deadline_s
        if not 0 < self._deadline_s <= period_s:
            raise ValueError(f"deadline_s must be above 0 and at most the period {period_s}, got {deadline_s}")

        self._client = client
        self._variant = variant
        self._state = LoopState()
        self._counters = LoopCounters()
        self._miss_run = 0
        # Guards the two slots and nothing else: nobody does I/O while holding it.
        self._slots = threading.Condition()
        self._question: _Question | None = None
        self._outcome: Answer | Miss = Miss(0, "")
        self._closed = False
        self._worker = threading.Thread(target=self._answer_questions, name="lom-control-loop", daemon=True)
        self._worker.start()

    @property
    def counters(self) -> LoopCounters:
        """A snapshot that does not change."""
        return self._counters

    def step(self, observation: ArrayLike) -> LoopAction:
        """The action of this tick, after at most `deadline_s`. Never raises, whatever the observation or the server.

        Args:
            observation: `[O]`, environment units; copied, so the caller may overwrite it afterwards.
        """
        observed_at = time.monotonic()
        tick = self._state.tick + 1
        event: Answer | Miss
        try:
            own_copy = np.array(observation)
        except Exception:  # a foreign object's own conversion may raise anything
            event = Miss(tick, Reason.BAD_SHAPE)
        else:
            event = self._ask(_Question(tick, observed_at, observed_at + self._deadline_s, own_copy))
        self._state, output = decide(self._rules, self._state, event, time.monotonic())
        self._count(output)
        return output

    def ticks(self) -> Iterator[Tick]:
        """The loop's schedule, for `for tick in loop.ticks(): ...`; ends when the loop is closed. See `paced_ticks`."""
        for tick in paced_ticks(self._rules.period_s):
            if self._closed:
                return
            yield tick

    def close(self) -> None:
        """Ends the worker thread; every later `step` is a miss. Blocks for about `deadline_s` at most."""
        with self._slots:
            self._closed = True
            self._slots.notify_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: _Question) -> Answer | Miss:
        with self._slots:
            self._question = question
            self._slots.notify_all()
            while self._outcome.tick != question.tick and not self._closed:
                remaining_s = question.over_at - time.monotonic()
                if remaining_s <= 0:
                    break
                self._slots.wait(remaining_s)
            return Miss(question.tick, "LOOP_CLOSED") if self._closed else self._outcome

    def _answer_questions(self) -> None:
        while True:
            with self._slots:
                while self._question is None and not self._closed:
                    self._slots.wait()
                if self._closed or self._question is None:
                    return
                question, self._question = self._question, None
            outcome = self._answer(question)
            with self._slots:
                self._outcome = outcome
                self._slots.notify_all()

    def _answer(self, question: _Question) -> Answer | Miss:
        remaining_s = question.over_at - time.monotonic()
        if remaining_s <= 0:
            return Miss(question.tick, Reason.DEADLINE_EXCEEDED)
        try:
            answer = self._client.act(question.observation, deadline_s=remaining_s, variant=self._variant)
        except PolicyError as error:
            return Miss(question.tick, error.reason)
        except Exception:  # a defect of ours must cost one tick, not the thread that feeds the robot
            return Miss(question.tick, "CLIENT_DEFECT")
        return Answer(question.tick, question.observed_at, answer.actions)

    def _count(self, output: LoopAction) -> None:
        before = self._counters
        is_fresh = output.source is Source.FRESH
        self._miss_run = 0 if is_fresh else self._miss_run + 1
        self._counters = LoopCounters(
            ticks=before.ticks + 1,
            fresh=before.fresh + is_fresh,
            held=before.held + (output.source is Source.HOLD),
            safe=before.safe + (output.source is Source.SAFE),
            longest_miss_run=max(before.longest_miss_run, self._miss_run),
            misses=before.misses if is_fresh else Counter(before.misses) + Counter([output.reason]),
        )
