"""A policy inside a fixed-rate control loop: an action every tick, whatever the server does.

This library is not a certified safety function: the robot's own limits and its emergency stop stay in force.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lom_client.client import PolicyClient
from lom_client.fallback import GuardedFallback
from lom_client.flight_recorder import FlightRecorder
from lom_client.level_rules import NS_PER_S, LevelRules, Vector
from lom_client.levels import (
    Command,
    Event,
    Flag,
    Level,
    LoopState,
    Output,
    Rearm,
    Source,
    Stop,
    Switch,
    Tick,
    advance,
    may_rearm,
)
from lom_client.loop_config import LoopConfig
from lom_client.loop_counters import LoopCounters, LoopTally, Record
from lom_client.loop_events import EventReporter, LoopEvent, RecordingEnded, events_between
from lom_client.loop_io import LoopIo, PolicyProcess, ProcessIo, ThreadIo
from lom_client.loop_messages import (
    Question,
    UnusableObservationError,
    pack_observation,
    unpack_refusal,
    unpack_reply,
)
from lom_client.observations import Observations
from lom_client.pacing import Tick as ScheduledTick
from lom_client.pacing import paced_ticks

_LOGGER = logging.getLogger(__name__)
_STALLED_PERIODS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopAction:
    """The output of one tick.

    Attributes:
        values: float32[A], finite and inside the bounds; the caller's own copy.
        source: where the values come from.
        level: how much of the policy is left.
        age_s: seconds since the observation that the values go back to; None where they go back to none.
        reason: why the policy does not act; empty when it does.
        detail: more of the reason, for a person; may be empty.
        flags: what else there is to know.
        tick: count of this tick, from 1.
        mode: the component that acts; None where the variant chooses none, and without the policy.
        version: the policy's; None without the policy.
        bundle_digest: of the bundle that acts; empty without the policy.
    """

    values: NDArray[np.float32]
    source: Source
    level: Level
    age_s: float | None
    reason: str
    detail: str
    flags: Flag
    tick: int
    mode: int | None
    version: int | None
    bundle_digest: str


@dataclass(frozen=True, kw_only=True)
class _Regime:
    """What a generation of questions and answers goes by."""

    generation: int
    rules: LevelRules
    fallback: GuardedFallback | None
    source: str
    variant: str | None
    hysteresis_width: float
    wait_ns: int

    @property
    def budget_ns(self) -> int:
        """How long an answer is worth waiting for, from its observation."""
        return self.wait_ns or self.rules.max_age_ns


class ControlLoop:
    """Turns one observation per tick into one action per tick: in time, finite, inside the bounds and the limits.

    Each tick leaves its observation for whoever does the asking, takes what was answered, and goes down as far as it
    must: the policy's action, what was commanded before as long as its kind allows, the fallback, a stop that only
    `rearm` ends. At most one request is under way; none is repeated. `docs/control_loop.md` says when which.

    **Threads**: `step` and `ticks` belong to one control thread, which does no I/O. Everything else may be called from
    any thread. A `PolicyClient` is asked in a thread of this loop; it is the caller's, and not closed here. A
    `PolicyProcess` is asked by a process of this loop. `step` in a process that was forked off stops: its reason is
    `FORKED`.
    """

    def __init__(
        self,
        policy: PolicyClient | PolicyProcess,
        config: LoopConfig,
        *,
        on_event: Callable[[LoopEvent], object] | None = None,
        recorder: FlightRecorder | None = None,
    ) -> None:
        """Everything that can be wrong with the configuration is found here; `step` never raises.

        Args:
            policy: who is asked, and whether in a thread or in a process.
            config: how the robot is treated.
            on_event: told, in a thread of its own, when the level, the bundle or the distribution changes, and when
                `step` was not called for five periods.
            recorder: records every tick that had an observation; it is the caller's, and not closed here.

        Raises:
            ValueError: the configuration does not go with the bounds, or the fallback fails its trial.
            PolicyError: the bounds were asked of the server, and it did not give them.
        """
        bounds, contract_hash = config.action_bounds, ""
        if bounds is None:
            bounds, contract_hash = _agreed(policy, config.connect_deadline_s)
        rules = config.rules(*bounds)
        fallback = None if config.fallback is None else GuardedFallback(config.fallback, rules)
        _LOGGER.info("control loop: %s", rules)

        self._config = config
        self._io: LoopIo = ProcessIo() if isinstance(policy, PolicyProcess) else ThreadIo()
        self._source = self._io.source_of(policy)
        self._regime = self._make_regime(0, config, rules, fallback)
        self._state = LoopState(contract_hash=contract_hash)
        self._wishes: deque[Event | _Regime] = deque()
        self._newest_regime = self._regime
        self._command: Command | None = None
        self._mode = -1
        self._observation = b""
        self._explained = ("", "")
        self._tally = LoopTally()
        self._history: deque[Record] = deque(maxlen=config.history_length)
        self._pid = os.getpid()
        self._is_closed = False
        self._last_step = (0, 0)
        self._recorder = recorder
        self._recording_has_ended = False
        self._reporter: EventReporter | None = None
        if on_event is not None:
            self._reporter = EventReporter(on_event, lambda: self._last_step, _STALLED_PERIODS * rules.period_ns)

    @property
    def level(self) -> Level:
        """The level of the last tick."""
        return self._state.level

    @property
    def counters(self) -> LoopCounters:
        """What happened since the loop began; a snapshot that does not change."""
        counters = self._tally.snapshot()
        return counters if self._recorder is None else replace(counters, unrecorded=self._recorder.dropped)

    @property
    def history(self) -> tuple[Record, ...]:
        """The last `LoopConfig.history_length` commands and rejections, oldest first."""
        return tuple(self._history)

    def step(self, observation: Observations, measured: ArrayLike | None = None) -> LoopAction:
        """The action of this tick, after at most `LoopConfig.deadline_s`. Never raises, whatever it is given.

        Args:
            observation: one row, as for `PolicyClient.act`; copied, so the caller may overwrite it afterwards.
            measured: `[A]`, what the robot really does, in units of the action; NaN where it is not measured. Taken
                for the command so far before the first one, and after `rearm`.
        """
        observed_ns = time.monotonic_ns()
        self._grant_wishes()
        sequence = self._state.sequence + 1
        repeats = False
        fault = self._fault()
        if not fault:
            try:
                packed = pack_observation(observation)
                self._ask(packed, sequence, observed_ns)
            except UnusableObservationError as error:
                fault = error.reason
                self._explained = (error.reason, error.detail)
                self._take_outcomes(sequence, observed_ns)
            else:
                repeats = packed == self._observation
                self._observation = packed
                self._take_outcomes(sequence, observed_ns + self._regime.wait_ns)
        return self._tick(fault, repeats, _numbers(measured))

    def ticks(self) -> Iterator[ScheduledTick]:
        """The loop's schedule, for `for tick in loop.ticks(): ...`; ends when the loop is closed. See `paced_ticks`."""
        for tick in paced_ticks(self._config.period_s):
            if self._is_closed:
                return
            yield tick

    def switch(self, policy: PolicyClient | PolicyProcess | None = None, config: LoopConfig | None = None) -> None:
        """From the next step on, another policy acts, or by another configuration (variant, kinds, limits, ...).

        Answers to earlier questions are dropped. Where the kinds change, nothing that was commanded is held: give the
        next step `measured`. None leaves things as they are; so does a configuration without bounds the bounds.

        Raises:
            ValueError: the configuration has another period, does not go with the bounds, or its fallback fails.
            TypeError: a thread cannot go on as a process, nor a process as a thread.
        """
        if config is not None and config.period_s != self._config.period_s:
            raise ValueError(f"period_s must stay {self._config.period_s}, got {config.period_s}")
        before = self._newest_regime
        source = before.source if policy is None else self._io.source_of(policy)
        config = config or self._config
        rules = config.rules(*(config.action_bounds or (before.rules.low, before.rules.high)))
        fallback = None if config.fallback is None else GuardedFallback(config.fallback, rules)
        self._source, self._config = source, config
        self._newest_regime = self._make_regime(before.generation + 1, config, rules, fallback)
        self._wishes.append(self._newest_regime)

    def operator_stop(self) -> None:
        """SAFE_STOP, from the next step on, until `rearm`."""
        self._wishes.append(Stop(reason="OPERATOR_STOP"))

    def rearm(self) -> str:
        """Ends SAFE_STOP with the next step. For an operator, never for a program.

        Returns:
            Why not: `NOT_STOPPED`, or `NOT_HEALTHY` while there are not several good answers in a row. Empty where it
            does.
        """
        refused = may_rearm(self._regime.rules, self._state)
        if not refused:
            self._wishes.append(Rearm())
        return refused

    def close(self) -> None:
        """Ends the asking, within 0.2 s; every later `step` is a miss. May be called twice."""
        self._is_closed = True
        if os.getpid() != self._pid:
            return  # the threads and the process are the parent's
        self._io.close()
        if self._reporter is not None:
            self._reporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_regime(
        self, generation: int, config: LoopConfig, rules: LevelRules, fallback: GuardedFallback | None
    ) -> _Regime:
        return _Regime(
            generation=generation,
            rules=rules,
            fallback=fallback,
            source=self._source,
            variant=config.variant,
            hysteresis_width=config.hysteresis_width,
            wait_ns=round(config.wait_s * NS_PER_S),
        )

    def _grant_wishes(self) -> None:
        while self._wishes:
            wish = self._wishes.popleft()
            if isinstance(wish, _Regime):
                keeps_command = wish.rules.kinds == self._regime.rules.kinds
                self._regime, self._mode = wish, -1
                wish = Switch(generation=wish.generation, keeps_command=keeps_command)
            self._advance(wish)

    def _fault(self) -> str:
        if os.getpid() != self._pid:
            if self._state.level is not Level.SAFE_STOP:
                self._advance(Stop(reason="FORKED"))
            return "FORKED"
        return "LOOP_CLOSED" if self._is_closed else ""

    def _ask(self, observation: bytes, sequence: int, observed_ns: int) -> None:
        regime = self._regime
        question = Question(
            sequence=sequence,
            generation=regime.generation,
            observed_ns=observed_ns,
            over_ns=observed_ns + regime.budget_ns,
            source=regime.source,
            variant=regime.variant,
            previous_mode=self._mode,
            hysteresis_width=regime.hysteresis_width,
            observation=observation,
        )
        mailboxes = self._io.mailboxes
        try:
            mailboxes.questions.put(question.to_bytes())
        except ValueError as error:
            raise UnusableObservationError("MESSAGE_TOO_LARGE", str(error)) from None
        mailboxes.question_bell.ring()

    def _take_outcomes(self, sequence: int, until_ns: int) -> None:
        """Takes answers and refusals, until there is one of tick `sequence` or it is `until_ns`."""
        mailboxes = self._io.mailboxes
        while True:
            is_settled = False
            answer = mailboxes.answers.take()
            if answer is not None:
                reply = unpack_reply(answer)
                self._advance(reply)
                is_settled = reply.sequence == sequence
            refused = mailboxes.refusals.take()
            if refused is not None:
                refusal, detail = unpack_refusal(refused)
                self._explained = (refusal.reason, detail)
                self._advance(refusal)
                is_settled = is_settled or refusal.sequence == sequence
            if is_settled or time.monotonic_ns() >= until_ns:
                return
            mailboxes.outcome_bell.wait(until_ns)

    def _tick(self, fault: str, repeats: bool, measured: Vector | None) -> LoopAction:
        guarded = self._regime.fallback
        tick = Tick(
            fault=fault,
            repeats=repeats,
            measured=measured,
            fallback=None if guarded is None else lambda command: guarded(command, measured),
        )
        command = self._advance(tick)
        assert isinstance(command, Command)
        self._last_step = (command.sequence, self._state.now_ns)
        if self._recorder is not None and not fault:
            self._record(self._recorder, command)
        if self._reporter is not None:
            for event in events_between(self._command, command):
                self._reporter.report(event)
        self._command = command
        reply = command.reply
        if reply is not None:
            self._mode = reply.mode
        reason, detail = self._explained
        return LoopAction(
            values=np.array(command.values, dtype=np.float32),
            source=command.source,
            level=command.level,
            age_s=None if command.age_ns is None else command.age_ns * 1e-9,
            reason=command.reason,
            detail=detail if reason == command.reason else "",
            flags=command.flags,
            tick=command.sequence,
            mode=None if reply is None or reply.mode < 0 else reply.mode,
            version=None if reply is None else reply.version,
            bundle_digest="" if reply is None else reply.bundle_digest,
        )

    def _record(self, recorder: FlightRecorder, command: Command) -> None:
        regime = self._regime
        recorder.tick(self._observation, command, regime.rules, self._mode, regime.hysteresis_width)
        if recorder.failure and not self._recording_has_ended:
            self._recording_has_ended = True
            if self._reporter is not None:
                self._reporter.report(RecordingEnded(reason=recorder.failure))

    def _advance(self, event: Event) -> Output:
        self._state, output = advance(self._regime.rules, self._state, event, time.monotonic_ns())
        if output is not None:
            self._tally.count(output)
            self._history.append(output)
        return output


def _agreed(policy: PolicyClient | PolicyProcess, deadline_s: float) -> tuple[tuple[ArrayLike, ArrayLike], str]:
    """The bounds of the action, and the contract that they belong to."""
    if isinstance(policy, PolicyProcess):
        with policy.connect() as client:
            return _agreed(client, deadline_s)
    spec = policy.get_spec(deadline_s=deadline_s)
    return (spec.action.low, spec.action.high), spec.contract_hash


def _numbers(measured: ArrayLike | None) -> Vector | None:
    if measured is None:
        return None
    try:
        return tuple(np.asarray(measured, dtype=np.float64).ravel().tolist())
    except Exception:  # a foreign object's own conversion may raise anything
        return None
