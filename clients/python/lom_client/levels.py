"""What the robot is told each tick: a pure function `(state, event, now) -> (state, output)`.

No clock, no I/O, no threads. This docstring is the specification; every implementation of it gives the same bits,
as `clients/traces/levels.jsonl` proves. Numbers are IEEE 754 doubles, and each step below is one rounded operation:
`+ - * / sqrt floor`, comparisons, and min and max, which give their first operand where both are equal; never a fused
multiply-add. Times are integer nanoseconds of a monotonic clock, divided as doubles. An event that is older than the
one before it counts as simultaneous: `now = max(now, time of the event before)`.

**Levels.** NOMINAL: the policy acts. DEGRADED: what it said last is held. FALLBACK: the fallback acts. SAFE_STOP: the
robot stops, latched. The state begins DEGRADED, with nothing commanded.

**Reply** (an action with the sequence number and the time of its observation). Judged at once; the first rule that
holds rejects it, and the reason also explains the next miss:

1. `WRONG_GENERATION`: its generation is not the state's.
2. `WRONG_SEQUENCE`: its sequence is above the next tick's (ticks so far + 1), or its observation is in the future.
3. `DUPLICATE`, `REORDERED`: its sequence is equal to, below, the highest one judged in this generation so far (0 before
   the first). Rules 4 to 9 count as judging, whatever comes of them.
4. `LATE`, where the rules say `waits`: its sequence is not the next tick's.
5. `CONTRACT_MISMATCH`: the state names a contract, and it is not the reply's. Demotes.
6. `BAD_SHAPE`: another number of elements.
7. `NON_FINITE_ACTION`: an element is NaN or infinite. A breach.
8. `ACTION_OUT_OF_BOUNDS`: an element is below `low - tolerance` or above `high + tolerance`, where tolerance =
   `bounds_tolerance * (high - low)`, 0 where that is not finite. A breach.
9. `WRONG_BUNDLE`, where the rules say `pins_bundle`: the state names a bundle, and it is not the reply's.

Three breaches within 1 s (the third at most 1 s after the first) demote, and are forgotten. Any other reply takes the
place of the one that waits to be used; a state without a contract takes the reply's.

**Refusal** (a request that brought no action): `WRONG_GENERATION` as above; else its reason explains the next miss,
and `CONTRACT_MISMATCH` demotes.

**Tick.** Exactly one command. In this order:

1. Ticks + 1. An observation that repeats the one before counts; the `frozen_ticks`th identical one and those after it
   are flagged `OBSERVATION_FROZEN`.
2. *Seed*, where nothing was commanded yet, or after a rearm where `measured` is given: the command becomes `measured`,
   cut to the bounds, and where an element of it is missing or not finite (all of them where it has another length), the
   command so far, else the safe action. It is held from now, and its step is 0.
3. *Fresh or miss*. The reply that waits is taken away. Miss with the tick's own fault; else with the newest
   explanation since the last tick (`DEADLINE_EXCEEDED` where there is none) if no reply waits; else `STALE` where it is
   older than max_age. Else it is fresh. A fresh reply of another bundle than the one before is flagged
   `BUNDLE_CHANGED`. Misses in a row count, with the time of the first one; a fresh reply sets them to 0.
4. *Warnings*, unless ignored. A fresh reply that warns is flagged `OUT_OF_DISTRIBUTION` and adds to the warnings in a
   row; one that does not sets them to 0. Under `fallback` it is *refused* while they are `warning_ticks` or more.
5. *Good answers in a row*: + 1 with a fresh reply that does not warn (or whose warning does not lead to the fallback),
   else 0; 0 also with a demotion.
6. *Level*, the first that holds, where `overdue(n)` is `2 * (now - first miss) >= (2n - 1) * period`, so that a slow
   loop is not held for longer than a punctual one; misses count for SAFE_STOP once the policy has acted:
   SAFE_STOP stays. SAFE_STOP: misses >= stop_ticks, or a miss that is overdue(stop_ticks). FALLBACK: a demotion, a
   refused reply, misses > hold_ticks, or a miss that is overdue(hold_ticks + 1). From FALLBACK to NOMINAL: good answers
   >= recovery_ticks; else it stays. NOMINAL: fresh. Else DEGRADED.
7. *Target* of each element by level, below. Under FALLBACK with a function of the user's, the function is called now;
   an answer that fails, has another number of elements, is not finite or outside the bounds turns the level into
   SAFE_STOP, with reason `FALLBACK_INVALID`.
8. *Limits*, below; then the command is cut to the bounds.

Targets:

* NOMINAL: the action cut to the bounds, flagged `CLAMPED` where that changed it. A blend of `blend_ticks` = n > 0 ticks
  begins with the first tick after FALLBACK, after a switch, after a rearm, or with `BUNDLE_CHANGED`: its k-th tick's
  target is `a + (action - a) * (k / n)`, a the command before its first tick, flagged `BLENDED` while k < n. Another
  level ends the blend. The command is then held from now.
* DEGRADED: position, the command before. Velocity, `held * max(0, (velocity_decay - t) / velocity_decay)`, t the time
  since it is held. Torque, held while `2t + period <= 2 * torque_hold`, else the safe action: what is put out now stays
  in force for a period.
* FALLBACK: the user's function; else as DEGRADED, but torque is the safe action.
* SAFE_STOP: with t since the stop's first tick and `r = max(0, (stop - (t + period)) / stop)`, 0 where stop is 0:
  position, the command before + r * (the step of the tick before the stop); velocity, as DEGRADED where the last tick
  outside SAFE_STOP was DEGRADED, or FALLBACK without a function, else r * (the command before the stop); torque,
  `s + (c - s) * r`, s the safe action, c the command before the stop.

Limits, for each element, with `d = target - command` and the last step `v`; max_step = slew * (period / 1e9),
max_change = acceleration * (period / 1e9) * (period / 1e9):

    size = min(|d|, max_step)
    if max_change is finite:
        n = floor((sqrt(1 + 8 * |d| / max_change) - 1) / 2)
        size = min(size, |d| / (n + 1) + max_change * n / 2)
    step = size with the sign of d
    if max_change is finite: step = min(max(step, v - max_change), v + max_change)
    new command = min(max(x, low), high), x = target where step = d, else command + step
    new step = new command - command

The fourth line brakes in time for the target, in n steps after this one. Bounds win over acceleration. `SLEW_LIMITED`
where any element of the new command is not the target.

The command's reason: empty under NOMINAL; else the demotion; else the miss's; else `OUT_OF_DISTRIBUTION` with a refused
reply, `RECOVERING` under FALLBACK, `STOPPED` under SAFE_STOP. Its age: time since the observation whose action it is,
under NOMINAL and DEGRADED, once the policy has acted. A tick forgets the explanation and the demotion.

**Switch** to a new generation: the reply that waits, the sequences judged, contract, bundle, explanation, demotion,
misses, good answers, warnings and breaches are forgotten; NOMINAL becomes DEGRADED; the next NOMINAL tick blends.
Without `keeps_command` (the elements mean something else now) nothing is commanded any more, and a stop begins anew.

**Stop**: SAFE_STOP; its reason is the explanation and the demotion of the next tick.

**Rearm**: rejected with `NOT_STOPPED` outside SAFE_STOP, with `NOT_HEALTHY` below recovery_ticks good answers in a row.
Else DEGRADED; misses, good answers, breaches and the demotion are forgotten, the next tick seeds where `measured` is
given, the next NOMINAL tick blends.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag, StrEnum
from typing import TypeAlias

from lom_api.reasons import Reason
from lom_client.level_rules import NS_PER_S, Kind, LevelRules, OnWarning, Vector

_BREACHES = 3
_BAD_SHAPE = Reason.BAD_SHAPE.value
_CONTRACT_MISMATCH = Reason.CONTRACT_MISMATCH.value
_DEADLINE_EXCEEDED = Reason.DEADLINE_EXCEEDED.value
_NON_FINITE_ACTION = Reason.NON_FINITE_ACTION.value
_ACTION_OUT_OF_BOUNDS = "ACTION_OUT_OF_BOUNDS"


class Level(StrEnum):
    """How much of the policy is left."""

    NOMINAL = "nominal"
    DEGRADED = "degraded"
    FALLBACK = "fallback"
    SAFE_STOP = "safe_stop"


class Source(StrEnum):
    """Where a command comes from."""

    FRESH = "fresh"
    """The policy's answer to this observation, or to the newest one that is answered."""
    HOLD = "hold"
    """What was commanded last, as long as its kind allows."""
    FALLBACK = "fallback"
    """The user's function, or each element's rest."""
    SAFE_STOP = "safe_stop"
    """The way to a standstill, and the standstill."""


_SOURCES = {
    Level.NOMINAL: Source.FRESH,
    Level.DEGRADED: Source.HOLD,
    Level.FALLBACK: Source.FALLBACK,
    Level.SAFE_STOP: Source.SAFE_STOP,
}


class Flag(IntFlag):
    """What else there is to know about a command."""

    CLAMPED = 1
    """The policy's action was outside the bounds, within the tolerance."""
    SLEW_LIMITED = 2
    """The command is on its way to what was meant."""
    BLENDED = 4
    """The policy takes over from another command."""
    OBSERVATION_FROZEN = 8
    """The observation has not changed for a while."""
    OUT_OF_DISTRIBUTION = 16
    """A score of the answer warns."""
    BUNDLE_CHANGED = 32
    """Another bundle answers than before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The policy answered the observation of tick `sequence`. `mode` is -1 where the variant chooses none."""

    sequence: int
    observed_ns: int
    generation: int
    action: Vector
    bundle_digest: str
    contract_hash: str
    warns: bool = False
    version: int = 0
    mode: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """The observation of tick `sequence` has no answer."""

    sequence: int
    generation: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A command is due.

    Attributes:
        fault: why there is no observation; empty where there is one.
        repeats: the observation is identical to the one before.
        measured: what the robot really does, in units of the action; NaN where an element is not measured.
        fallback: the user's function of the command before; None from it is a failure.
    """

    fault: str = ""
    repeats: bool = False
    measured: Vector | None = None
    fallback: Callable[[Vector], Sequence[float] | None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """From now on another policy, variant or meaning of the action is in force."""

    generation: int
    keeps_command: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Stop now, for `reason`."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rearm:
    """An operator allows the robot to move again."""


Event: TypeAlias = Reply | Refusal | Tick | Switch | Stop | Rearm


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """The output of a tick. `reply` is the answer that acts, under NOMINAL."""

    sequence: int
    level: Level
    source: Source
    values: Vector
    reason: str
    flags: Flag
    age_ns: int | None
    reply: Reply | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """The output of an event that changes nothing that moves."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopState:
    """What one event leaves to the next; the words are those of the specification."""

    now_ns: int = 0
    level: Level = Level.DEGRADED
    sequence: int = 0
    generation: int = 0
    contract_hash: str = ""
    bundle_digest: str = ""
    has_acted: bool = False

    waiting: Reply | None = None
    judged: int = 0
    explanation: str = ""
    demotion: str = ""
    breaches_ns: tuple[int, ...] = ()

    misses: int = 0
    first_miss_ns: int = 0
    good: int = 0
    warnings: int = 0
    repeats: int = 0

    command: Vector | None = None
    step: Vector = ()
    seeds: bool = False
    held: Vector = ()
    held_ns: int = 0
    acted_on_ns: int | None = None
    """Time of the observation whose action is held."""

    blends: bool = False
    blend_from: Vector | None = None
    blend_tick: int = 0

    rests: bool = False
    """The last target outside SAFE_STOP was a rest's."""
    stopping: bool = False
    stop_ns: int = 0
    stop_from: Vector = ()
    stop_step: Vector = ()


Output: TypeAlias = Command | Rejected | None


def advance(rules: LevelRules, state: LoopState, event: Event, now_ns: int) -> tuple[LoopState, Output]:
    """What `event` makes of `state`. A tick gives a command; a rejected event says why; anything else gives None."""
    now = max(now_ns, state.now_ns)
    match event:
        case Tick():
            return _tick(rules, state, event, now)
        case Reply():
            return _reply(rules, state, event, now)
        case Refusal():
            return _refusal(state, event, now)
        case Switch():
            return _switch(state, event, now), None
        case Stop():
            stopped = replace(state, now_ns=now, level=Level.SAFE_STOP, explanation=event.reason, demotion=event.reason)
            return stopped, None
        case Rearm():
            return _rearm(rules, state, now)


def may_rearm(rules: LevelRules, state: LoopState) -> str:
    """Why a rearm would be rejected; empty where it would not."""
    if state.level is not Level.SAFE_STOP:
        return "NOT_STOPPED"
    return "" if state.good >= rules.recovery_ticks else "NOT_HEALTHY"


def _reply(rules: LevelRules, state: LoopState, reply: Reply, now: int) -> tuple[LoopState, Output]:
    reason = _identity_fault(state, reply, now)
    if reason:
        return replace(state, now_ns=now, explanation=reason), Rejected(reason=reason)
    reason = _content_fault(rules, state, reply)
    if not reason:
        accepted = replace(
            state,
            now_ns=now,
            judged=reply.sequence,
            waiting=reply,
            contract_hash=state.contract_hash or reply.contract_hash,
        )
        return accepted, None
    demotion, breaches = state.demotion, state.breaches_ns
    if reason == _CONTRACT_MISMATCH:
        demotion = reason
    elif reason in (_NON_FINITE_ACTION, _ACTION_OUT_OF_BOUNDS):
        breaches = (*breaches, now)[-_BREACHES:]
        if len(breaches) == _BREACHES and now - breaches[0] <= NS_PER_S:
            demotion, breaches = reason, ()
    rejected = replace(
        state, now_ns=now, judged=reply.sequence, explanation=reason, demotion=demotion, breaches_ns=breaches
    )
    return rejected, Rejected(reason=reason)


def _identity_fault(state: LoopState, reply: Reply, now: int) -> str:
    if reply.generation != state.generation:
        return "WRONG_GENERATION"
    if reply.sequence > state.sequence + 1 or reply.observed_ns > now:
        return "WRONG_SEQUENCE"
    if reply.sequence == state.judged:
        return "DUPLICATE"
    return "REORDERED" if reply.sequence < state.judged else ""


def _content_fault(rules: LevelRules, state: LoopState, reply: Reply) -> str:
    if rules.waits and reply.sequence != state.sequence + 1:
        return "LATE"
    if state.contract_hash and reply.contract_hash != state.contract_hash:
        return _CONTRACT_MISMATCH
    if len(reply.action) != len(rules.kinds):
        return _BAD_SHAPE
    if not all(map(math.isfinite, reply.action)):
        return _NON_FINITE_ACTION
    for value, low, high, tolerance in zip(reply.action, rules.low, rules.high, rules.tolerance, strict=True):
        if value < low - tolerance or value > high + tolerance:
            return _ACTION_OUT_OF_BOUNDS
    if rules.pins_bundle and state.bundle_digest and reply.bundle_digest != state.bundle_digest:
        return "WRONG_BUNDLE"
    return ""


def _refusal(state: LoopState, refusal: Refusal, now: int) -> tuple[LoopState, Output]:
    if refusal.generation != state.generation:
        return replace(state, now_ns=now, explanation="WRONG_GENERATION"), Rejected(reason="WRONG_GENERATION")
    demotion = refusal.reason if refusal.reason == _CONTRACT_MISMATCH else state.demotion
    return replace(state, now_ns=now, explanation=refusal.reason, demotion=demotion), None


def _switch(state: LoopState, switch: Switch, now: int) -> LoopState:
    return replace(
        state,
        now_ns=now,
        generation=switch.generation,
        level=Level.DEGRADED if state.level is Level.NOMINAL else state.level,
        waiting=None,
        judged=0,
        contract_hash="",
        bundle_digest="",
        explanation="",
        demotion="",
        breaches_ns=(),
        misses=0,
        good=0,
        warnings=0,
        command=state.command if switch.keeps_command else None,
        blends=True,
        stopping=state.stopping and switch.keeps_command,
    )


def _rearm(rules: LevelRules, state: LoopState, now: int) -> tuple[LoopState, Output]:
    refused = may_rearm(rules, state)
    if refused:
        return replace(state, now_ns=now), Rejected(reason=refused)
    rearmed = replace(
        state,
        now_ns=now,
        level=Level.DEGRADED,
        misses=0,
        good=0,
        breaches_ns=(),
        demotion="",
        seeds=True,
        blends=True,
        stopping=False,
    )
    return rearmed, None


def _tick(rules: LevelRules, state: LoopState, tick: Tick, now: int) -> tuple[LoopState, Command]:
    state = _seeded(rules, state, tick.measured, now)
    assert state.command is not None
    flags = Flag(0)
    repeats = state.repeats + 1 if tick.repeats else 0
    if rules.frozen_ticks and repeats + 1 >= rules.frozen_ticks:
        flags |= Flag.OBSERVATION_FROZEN

    reply, miss = _fresh_or_miss(rules, state, tick, now)
    misses = 0 if reply else state.misses + 1
    first_miss_ns = now if misses == 1 else state.first_miss_ns
    is_other_bundle = reply is not None and state.bundle_digest not in ("", reply.bundle_digest)
    if is_other_bundle:
        flags |= Flag.BUNDLE_CHANGED

    warns = reply is not None and reply.warns and rules.on_warning is not OnWarning.IGNORE
    warnings = state.warnings if reply is None else state.warnings + 1 if warns else 0
    if warns:
        flags |= Flag.OUT_OF_DISTRIBUTION
    heeds = rules.on_warning is OnWarning.FALLBACK
    is_refused = reply is not None and heeds and warnings >= rules.warning_ticks
    good = state.good + 1 if reply and not (warns and heeds) and not state.demotion else 0

    level = _level(rules, state, reply, misses, now - first_miss_ns, good, is_refused)
    reason = ""
    if level is not Level.NOMINAL:
        unused = "OUT_OF_DISTRIBUTION" if is_refused else "RECOVERING" if level is Level.FALLBACK else "STOPPED"
        reason = state.demotion or miss or unused

    target: Sequence[float] | None = None
    if level is Level.FALLBACK and rules.has_fallback:
        target = _sound(rules, tick.fallback(state.command) if tick.fallback else None)
        if target is None:
            level, reason = Level.SAFE_STOP, "FALLBACK_INVALID"

    blend_from, blend_tick, rests = None, 0, False
    stopping, stop_ns, stop_from, stop_step = state.stopping, state.stop_ns, state.stop_from, state.stop_step
    if reply is not None and level is Level.NOMINAL:
        target = tuple(map(_within, reply.action, rules.low, rules.high))
        if target != reply.action:
            flags |= Flag.CLAMPED
        begins = state.blends or is_other_bundle or state.level is Level.FALLBACK
        blend_from = state.command if begins and rules.blend_ticks else state.blend_from
        if blend_from is not None:
            blend_tick = 1 if begins else state.blend_tick + 1
            if blend_tick < rules.blend_ticks:
                flags |= Flag.BLENDED
                share = blend_tick / rules.blend_ticks
                target = tuple(a + (b - a) * share for a, b in zip(blend_from, target, strict=True))
            else:
                blend_from = None
    elif level is Level.SAFE_STOP:
        if not stopping:
            stopping, stop_ns, stop_from, stop_step = True, now, state.command, state.step
        rests = state.rests
        target = _stop_target(rules, state, stop_from, stop_step, stop_ns, now)
    elif target is None:
        rests = True
        target = _rest_target(rules, state, level, now)

    command, step = _limited(rules, state.command, state.step, target)
    if command != target:
        flags |= Flag.SLEW_LIMITED
    acts = level is Level.NOMINAL
    acted_on_ns = reply.observed_ns if reply is not None and acts else state.acted_on_ns
    has_age = acted_on_ns is not None and level in (Level.NOMINAL, Level.DEGRADED)
    after = LoopState(
        now_ns=now,
        level=level,
        sequence=state.sequence + 1,
        generation=state.generation,
        contract_hash=state.contract_hash,
        bundle_digest=reply.bundle_digest if reply is not None else state.bundle_digest,
        has_acted=state.has_acted or acts,
        judged=state.judged,
        breaches_ns=state.breaches_ns,
        misses=misses,
        first_miss_ns=first_miss_ns,
        good=good,
        warnings=warnings,
        repeats=repeats,
        command=command,
        step=step,
        held=command if acts else state.held,
        held_ns=now if acts else state.held_ns,
        acted_on_ns=acted_on_ns,
        blends=state.blends and not acts,
        blend_from=blend_from,
        blend_tick=blend_tick,
        rests=rests,
        stopping=stopping,
        stop_ns=stop_ns,
        stop_from=stop_from,
        stop_step=stop_step,
    )
    output = Command(
        sequence=after.sequence,
        level=level,
        source=_SOURCES[level],
        values=command,
        reason=reason,
        flags=flags,
        age_ns=now - acted_on_ns if has_age and acted_on_ns is not None else None,
        reply=reply if acts else None,
    )
    return after, output


def _seeded(rules: LevelRules, state: LoopState, measured: Vector | None, now: int) -> LoopState:
    if state.command is not None and (not state.seeds or measured is None):
        return replace(state, seeds=False) if state.seeds else state
    known = state.command or rules.safe_action
    if measured is not None and len(measured) == len(known):
        # A missing element is NaN.
        known = tuple(
            _within(value, low, high) if math.isfinite(value) else other
            for value, low, high, other in zip(measured, rules.low, rules.high, known, strict=True)
        )
    return replace(state, command=known, step=(0.0,) * len(known), held=known, held_ns=now, seeds=False)


def _fresh_or_miss(rules: LevelRules, state: LoopState, tick: Tick, now: int) -> tuple[Reply | None, str]:
    if tick.fault:
        return None, tick.fault
    if state.waiting is None:
        return None, state.explanation or _DEADLINE_EXCEEDED
    if now - state.waiting.observed_ns > rules.max_age_ns:
        return None, "STALE"
    return state.waiting, ""


def _level(
    rules: LevelRules, state: LoopState, reply: Reply | None, misses: int, missing_ns: int, good: int, is_refused: bool
) -> Level:
    def is_overdue(ticks: int) -> bool:
        return misses > 0 and 2 * missing_ns >= (2 * ticks - 1) * rules.period_ns

    if state.level is Level.SAFE_STOP:
        return Level.SAFE_STOP
    if state.has_acted and (misses >= rules.stop_ticks or is_overdue(rules.stop_ticks)):
        return Level.SAFE_STOP
    if state.demotion or is_refused or misses > rules.hold_ticks or is_overdue(rules.hold_ticks + 1):
        return Level.FALLBACK
    if state.level is Level.FALLBACK and good < rules.recovery_ticks:
        return Level.FALLBACK
    return Level.NOMINAL if reply else Level.DEGRADED


def _rest_target(rules: LevelRules, state: LoopState, level: Level, now: int) -> Vector:
    assert state.command is not None
    holds_torque = level is Level.DEGRADED and 2 * (now - state.held_ns) + rules.period_ns <= 2 * rules.torque_hold_ns
    decayed = _decayed(rules, state, now)
    target = []
    for kind, command, held, safe in zip(rules.kinds, state.command, state.held, rules.safe_action, strict=True):
        if kind is Kind.POSITION:
            target.append(command)
        elif kind is Kind.VELOCITY:
            target.append(held * decayed)
        else:
            target.append(held if holds_torque else safe)
    return tuple(target)


def _stop_target(
    rules: LevelRules, state: LoopState, stop_from: Vector, stop_step: Vector, stop_ns: int, now: int
) -> Vector:
    assert state.command is not None
    left = max(0, rules.stop_ns - (now - stop_ns + rules.period_ns)) / rules.stop_ns if rules.stop_ns else 0.0
    decayed = _decayed(rules, state, now)
    target = []
    for kind, command, held, before, step, safe in zip(
        rules.kinds, state.command, state.held, stop_from, stop_step, rules.safe_action, strict=True
    ):
        if kind is Kind.POSITION:
            target.append(command + left * step)
        elif kind is Kind.VELOCITY:
            target.append(held * decayed if state.rests else left * before)
        else:
            target.append(safe + (before - safe) * left)
    return tuple(target)


def _decayed(rules: LevelRules, state: LoopState, now: int) -> float:
    return max(0, rules.velocity_decay_ns - (now - state.held_ns)) / rules.velocity_decay_ns


def _limited(rules: LevelRules, command: Vector, last_step: Vector, target: Sequence[float]) -> tuple[Vector, Vector]:
    reached, steps = [], []
    for index, goal in enumerate(target):
        before = command[index]
        distance = goal - before
        max_change = rules.max_step_change[index]
        size = min(abs(distance), rules.max_step[index])
        step = math.copysign(size, distance)
        if max_change != math.inf:
            steps_left = math.floor((math.sqrt(1.0 + 8.0 * abs(distance) / max_change) - 1.0) / 2.0)
            braking = abs(distance) / (steps_left + 1.0) + max_change * steps_left / 2.0
            last = last_step[index]
            step = min(max(math.copysign(min(size, braking), distance), last - max_change), last + max_change)
        after = _within(goal if step == distance else before + step, rules.low[index], rules.high[index])
        reached.append(after)
        steps.append(after - before)
    return tuple(reached), tuple(steps)


def _sound(rules: LevelRules, values: Sequence[float] | None) -> Vector | None:
    if values is None or len(values) != len(rules.kinds):
        return None
    inside = zip(values, rules.low, rules.high, strict=True)
    return tuple(values) if all(math.isfinite(value) and low <= value <= high for value, low, high in inside) else None


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
