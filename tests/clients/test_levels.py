"""The levels under a virtual clock: hand-worked numbers, the golden traces, and no history that breaks a promise."""

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from lom_client.level_rules import Kind, LevelRules, OnWarning
from lom_client.levels import (
    Command,
    Event,
    Flag,
    Level,
    LoopState,
    Output,
    Rearm,
    Refusal,
    Rejected,
    Reply,
    Source,
    Stop,
    Switch,
    Tick,
    advance,
    may_rearm,
)
from tests.clients.level_traces import (
    MS,
    PATH,
    SCENARIOS,
    Script,
    event_from_json,
    make_rules,
    output_to_json,
    rules_from_json,
    traces,
)

NOMINAL, DEGRADED, FALLBACK, SAFE_STOP = Level


def levels(commands: list[Command]) -> list[Level]:
    return [command.level for command in commands]


def near(*values: float) -> Any:
    return pytest.approx(values, abs=1e-12)


# -- the golden traces


def test_the_traces_are_those_of_this_code() -> None:
    assert len(SCENARIOS) >= 50
    assert PATH.read_text(encoding="utf-8").splitlines() == list(traces())


def test_the_traces_replay_from_what_is_written_alone() -> None:
    for line in PATH.read_text(encoding="utf-8").splitlines():
        trace = json.loads(line)
        rules, state = rules_from_json(trace["rules"]), LoopState(contract_hash=trace["contract_hash"])
        for number, step in enumerate(trace["steps"]):
            state, output = advance(rules, state, event_from_json(step["event"]), step["now_ns"])
            assert output_to_json(output) == step["output"], (trace["name"], number)


def test_the_traces_reach_every_level_source_flag_and_reason() -> None:
    seen: set[str] = set()
    for line in PATH.read_text(encoding="utf-8").splitlines():
        for step in json.loads(line)["steps"]:
            output = step["output"] or {}
            seen |= {output.get("level", ""), output.get("source", ""), output.get("reason", "")}
            seen |= set(output.get("flags", ()))
    reasons = {
        "ACTION_OUT_OF_BOUNDS",
        "BAD_SHAPE",
        "CONTRACT_MISMATCH",
        "DEADLINE_EXCEEDED",
        "DUPLICATE",
        "FALLBACK_INVALID",
        "LATE",
        "NON_FINITE_ACTION",
        "NOT_HEALTHY",
        "NOT_STOPPED",
        "OPERATOR_STOP",
        "OUT_OF_DISTRIBUTION",
        "RECOVERING",
        "REORDERED",
        "STALE",
        "STOPPED",
        "WRONG_BUNDLE",
        "WRONG_GENERATION",
        "WRONG_SEQUENCE",
    }
    assert reasons | set(Level) | set(Source) | {flag.name for flag in Flag} <= seen


# -- from first tick to SAFE_STOP, by hand


def test_the_first_command_is_what_is_measured_and_never_zero() -> None:
    command = Script(make_rules(kinds=(Kind.POSITION,) * 2)).tick(measured=(0.7, math.nan))
    assert (command.level, command.source, command.values) == (DEGRADED, Source.HOLD, (0.7, 0.25))


@pytest.mark.parametrize(
    ("period_ms", "hold", "stop", "recovery"), [(1, 5, 20, 50), (10, 5, 20, 5), (20, 5, 20, 5), (100, 1, 5, 5)]
)
def test_the_default_limits(period_ms: int, hold: int, stop: int, recovery: int) -> None:
    script = Script(make_rules(period_ms * MS))
    script.fresh(1)
    assert levels(script.miss(stop + 3)) == [DEGRADED] * hold + [FALLBACK] * (stop - 1 - hold) + [SAFE_STOP] * 4
    script = Script(make_rules(period_ms * MS))
    script.fresh(1)
    script.miss(hold + 1)
    assert levels(script.fresh(recovery + 1)) == [FALLBACK] * (recovery - 1) + [NOMINAL] * 2


def test_a_miss_in_between_begins_the_recovery_anew() -> None:
    script = Script(make_rules())
    script.fresh(1)
    script.miss(6)
    script.fresh(4)
    script.miss(1)
    assert levels(script.fresh(5)) == [FALLBACK] * 4 + [NOMINAL]


def test_what_each_kind_is_held_at() -> None:
    script = Script(make_rules(5 * MS, kinds=tuple(Kind), hold_ticks=8))
    script.fresh(1, 0.5, 0.5, 0.5)
    commands = script.miss(5)
    # Torque: in force for 20 ms, the fresh tick included. Velocity: a twentieth less each 5 ms.
    assert [command.values[2] for command in commands] == [0.5, 0.5, 0.5, 0.25, 0.25]
    assert [command.values[1] for command in commands] == near(0.475, 0.45, 0.425, 0.4, 0.375)
    assert {command.values[0] for command in commands} == {0.5}


@pytest.mark.parametrize("period_ms", [1, 4, 10, 20, 50, 100])
def test_no_velocity_outlives_a_tenth_of_a_second(period_ms: int) -> None:
    script = Script(make_rules(period_ms * MS, kinds=(Kind.VELOCITY,)))
    script.fresh(1, 1.0)
    commands = script.miss(110 // period_ms + 1)
    assert commands[100 // period_ms - 1].values == (0.0,)
    sizes = [command.values[0] for command in commands]
    assert sizes == sorted(sizes, reverse=True)


def test_a_stop_brings_each_kind_to_rest() -> None:
    script = Script(make_rules(10 * MS, kinds=tuple(Kind), stop_ns=40 * MS, safe_action=(0.0, 0.0, 0.1)))
    script.fresh(1, 0.0, 0.8, 0.5)
    script.fresh(1, 0.1, 0.8, 0.5)
    script.play(Stop(reason="OPERATOR_STOP"))
    commands = script.fresh(5, 1.0, 1.0, 1.0)
    assert levels(commands) == [SAFE_STOP] * 5
    assert [command.reason for command in commands] == ["OPERATOR_STOP", *["STOPPED"] * 4]
    # It moved by 0.1 a tick: 3/4, 2/4, 1/4 of it, then none. The others keep 3/4, 2/4, 1/4, 0 of what they had.
    assert [command.values[0] for command in commands] == near(0.175, 0.225, 0.25, 0.25, 0.25)
    assert [command.values[1] for command in commands] == near(0.6, 0.4, 0.2, 0.0, 0.0)
    assert [command.values[2] for command in commands] == near(0.4, 0.3, 0.2, 0.1, 0.1)


def test_a_blend_leads_from_the_command_before_to_the_policy() -> None:
    script = Script(make_rules(kinds=(Kind.POSITION,), blend_ticks=4, recovery_ticks=1))
    script.fresh(1, 1.0)
    script.miss(6)
    commands = script.fresh(5, -1.0)
    assert [command.values[0] for command in commands] == near(0.5, 0.0, -0.5, -1.0, -1.0)
    assert [Flag.BLENDED in command.flags for command in commands] == [True, True, True, False, False]


def test_another_bundle_is_flagged_and_blended() -> None:
    script = Script(make_rules(kinds=(Kind.POSITION,), blend_ticks=2))
    script.fresh(1, 1.0)
    commands = script.fresh(2, 0.0, bundle_digest="b2")
    assert [(command.values, command.flags) for command in commands] == [
        ((0.5,), Flag.BUNDLE_CHANGED | Flag.BLENDED),
        ((0.0,), Flag(0)),
    ]


def test_age_counts_from_the_observation() -> None:
    script = Script(make_rules(waits=False))
    script.miss(1)
    (command,) = script.fresh(1)
    assert command.age_ns == 20 * MS
    assert script.miss(1)[0].age_ns == 40 * MS


# -- limits, by hand


def test_slew_comes_last_whatever_the_source() -> None:
    rules = make_rules(10 * MS, kinds=(Kind.POSITION,), slew_per_s=(10.0,), has_fallback=True, safe_action=(0.0,))
    script = Script(rules)
    assert [command.values[0] for command in script.fresh(3, 1.0)] == near(0.1, 0.2, 0.3)
    commands = script.miss(8, fallback=(-1.0,))
    assert [command.values[0] for command in commands] == near(*[0.3] * 5, 0.2, 0.1, 0.0)
    assert Flag.SLEW_LIMITED in commands[-1].flags


def test_acceleration_is_kept_and_the_target_is_reached_without_overshoot() -> None:
    rules = make_rules(
        10 * MS, kinds=(Kind.POSITION,), slew_per_s=(4.0,), acceleration_per_s2=(100.0,), safe_action=(0.0,)
    )
    script = Script(rules)
    values = [0.0, *(command.values[0] for command in script.fresh(40, 0.5))]
    steps = [after - before for before, after in itertools.pairwise(values)]
    # 100 / s^2 at 10 ms: 0.01, 0.02, 0.03, 0.04 (the slew), ..., 0.04, 0.03, 0.02, 0.01.
    assert steps[:5] == near(0.01, 0.02, 0.03, 0.04, 0.04)
    assert max(steps) <= 0.04 + 1e-12
    assert all(abs(after - before) <= 0.01 + 1e-12 for before, after in itertools.pairwise([0.0, *steps]))
    assert max(values) <= 0.5 + 1e-12
    assert values[-1] == 0.5


# -- what leads where


def test_a_contract_mismatch_is_the_fallback_at_once() -> None:
    script = Script(make_rules(), contract_hash="c1")
    script.fresh(1)
    assert script.reply(contract_hash="c2") == Rejected(reason="CONTRACT_MISMATCH")
    (command,) = script.miss(1)
    assert (command.level, command.reason) == (FALLBACK, "CONTRACT_MISMATCH")
    script = Script(make_rules())
    script.fresh(1)
    script.refuse("CONTRACT_MISMATCH")
    assert script.tick().level is FALLBACK


def test_a_demotion_begins_the_recovery_anew() -> None:
    script = Script(make_rules())
    script.fresh(1)
    script.miss(6)
    script.fresh(4)
    script.refuse("CONTRACT_MISMATCH")
    assert levels(script.fresh(6)) == [FALLBACK] * 5 + [NOMINAL]


def test_an_answer_that_ages_before_its_tick_is_stale() -> None:
    script = Script(make_rules(waits=False))
    script.miss(1)
    script.reply(age_ns=39 * MS)
    script.now_ns += 2 * MS
    command = script.tick()
    assert (command.level, command.reason) == (DEGRADED, "STALE")


def test_three_breaches_within_a_second_are_the_fallback() -> None:
    script = Script(make_rules())
    script.fresh(1)
    reached = []
    for _ in range(3):
        script.reply(math.nan, 0.0)
        reached.append(script.tick().level)
        script.fresh(1)
    assert reached == [DEGRADED, DEGRADED, FALLBACK]


def test_out_of_bounds_by_a_tenth_is_cut_and_beyond_is_a_miss() -> None:
    script = Script(make_rules())
    (command,) = script.fresh(1, 1.2, -1.2)  # the range is 2, a tenth of it 0.2
    assert (command.level, command.values, command.flags) == (NOMINAL, (1.0, -1.0), Flag.CLAMPED)
    assert script.reply(1.21, 0.0) == Rejected(reason="ACTION_OUT_OF_BOUNDS")


def test_warnings_lead_to_the_fallback_only_where_they_are_to_and_never_to_a_stop() -> None:
    for on_warning, level in ((OnWarning.FLAG, NOMINAL), (OnWarning.FALLBACK, FALLBACK)):
        script = Script(make_rules(on_warning=on_warning))
        script.fresh(1)
        commands = script.fresh(25, warns=True)
        assert levels(commands) == [NOMINAL] * 2 + [level] * 23
        assert all(Flag.OUT_OF_DISTRIBUTION in command.flags for command in commands)
        assert levels(script.fresh(5))[-1] is NOMINAL


@pytest.mark.parametrize("answer", [None, (0.0,), (0.0, math.nan), (0.0, 1.1), (math.inf, 0.0)])
def test_a_bad_fallback_stops_the_robot(answer: Any) -> None:
    script = Script(make_rules(has_fallback=True))
    script.fresh(1)
    script.miss(5)
    command = script.tick(fallback=answer)
    assert (command.level, command.reason) == (SAFE_STOP, "FALLBACK_INVALID")
    assert levels(script.fresh(10)) == [SAFE_STOP] * 10


def test_the_fallback_is_asked_once_a_tick_and_only_under_fallback() -> None:
    asked: list[Any] = []

    def fallback(command: Any) -> Any:
        asked.append(command)
        return (0.0, 0.0)

    script = Script(make_rules(has_fallback=True))
    state, rules = script.state, script.rules
    for number in range(1, 31):
        now_ns = number * 20 * MS
        if number == 1:
            state, _ = advance(rules, state, replace(REPLY, sequence=1, observed_ns=now_ns, action=(0.5, 0.5)), now_ns)
        state, _ = advance(rules, state, Tick(fallback=fallback), now_ns)
    assert len(asked) == 14  # ticks 7 to 20; 2 to 6 hold, 21 stops
    assert asked[0] == (0.5, 0.0)


def test_safe_stop_is_latched_and_a_rearm_needs_health() -> None:
    script = Script(make_rules())
    script.fresh(1)
    script.miss(20)
    for cycle in range(10):
        assert levels(script.fresh(4)) == [SAFE_STOP] * 4
        assert may_rearm(script.rules, script.state) == "NOT_HEALTHY"
        assert script.play(Rearm()) == Rejected(reason="NOT_HEALTHY")
        assert levels(script.miss(1 + cycle)) == [SAFE_STOP] * (1 + cycle)
    script.fresh(5)
    assert script.play(Rearm()) is None
    (command,) = script.fresh(1)
    assert (command.level, command.flags) == (NOMINAL, Flag.BLENDED)
    assert script.play(Rearm()) == Rejected(reason="NOT_STOPPED")


def test_a_switch_drops_what_waits() -> None:
    script = Script(make_rules(waits=False))
    script.miss(1)
    script.fresh(1, 0.5, 0.5)
    script.reply(0.9, 0.9)
    script.play(Switch(generation=1))
    assert script.tick().level is DEGRADED
    assert script.reply(generation=0) == Rejected(reason="WRONG_GENERATION")


# -- no history breaks a promise

REPLY = Reply(sequence=1, observed_ns=0, generation=0, action=(0.0, 0.0), bundle_digest="b1", contract_hash="c1")


class Witness:
    """Knows what was said to the levels, and judges what they answer without knowing how they work."""

    def __init__(self, rules: LevelRules) -> None:
        self.rules = rules
        self.state = LoopState()
        self.now_ns = 0
        self.generation = 0
        self.ticks = 0
        self.contract = ""
        self.was_stopped = False
        self.was_rearmed = False
        self.last: Command | None = None
        self.last_used = (0, 0)
        self.may_jump = True

    def play(self, event: Event) -> Output:
        before = self.state
        self.state, output = advance(self.rules, self.state, event, self.now_ns)
        again = advance(self.rules, before, event, self.now_ns)
        assert again == (self.state, output)
        if isinstance(event, Switch):
            self.generation, self.contract = event.generation, ""
            self.may_jump = self.may_jump or not event.keeps_command
        if isinstance(event, Stop):
            self.was_stopped = True
        if isinstance(event, Rearm) and output is None:
            assert self.was_stopped
            self.was_stopped, self.may_jump = False, True
        if isinstance(event, Tick):
            assert isinstance(output, Command)
            self._judge(output)
        return output

    def _judge(self, command: Command) -> None:
        rules = self.rules
        self.ticks += 1
        assert command.sequence == self.ticks
        assert all(map(math.isfinite, command.values))
        assert all(low <= value <= high for low, value, high in zip(rules.low, command.values, rules.high, strict=True))
        assert (command.reason == "") == (command.source is Source.FRESH) == (command.level is NOMINAL)
        if self.last is not None and not self.may_jump:
            for before, after, step in zip(self.last.values, command.values, rules.max_step, strict=True):
                assert abs(after - before) <= step * (1 + 1e-9)
        if self.was_stopped:
            assert command.level is SAFE_STOP
        self.was_stopped = command.level is SAFE_STOP
        self.may_jump = False
        self.last = command
        if command.reply is not None:
            self._judge_use(command.reply, command.age_ns)

    def _judge_use(self, reply: Reply, age_ns: int | None) -> None:
        rules = self.rules
        assert reply.generation == self.generation
        assert age_ns == self.now_ns - reply.observed_ns
        assert 0 <= age_ns <= rules.max_age_ns
        assert (reply.generation, reply.sequence) > self.last_used
        assert reply.sequence <= self.ticks
        assert reply.sequence == self.ticks or not rules.waits
        assert all(map(math.isfinite, reply.action))
        assert self.contract in ("", reply.contract_hash)
        self.contract = reply.contract_hash
        self.last_used = (reply.generation, reply.sequence)


NUMBERS = (0.0, 0.5, -0.5, 0.99, -1.0, 1.0, 1.05, -1.15, 1.5, 1e300, math.nan, math.inf, -math.inf)


def random_rules(rng: random.Random) -> LevelRules:
    return make_rules(
        rng.choice([MS, 4 * MS, 20 * MS, 100 * MS]),
        [rng.choice(list(Kind)) for _ in range(2)],
        waits=rng.random() < 0.5,
        has_fallback=rng.random() < 0.3,
        slew_per_s=rng.choice([(), (1.0, 100.0)]),
        acceleration_per_s2=rng.choice([(), (30.0, 1000.0)]),
        on_warning=rng.choice(list(OnWarning)),
        blend_ticks=rng.choice([0, 5]),
        recovery_ticks=rng.choice([1, 3]),
        pins_bundle=rng.random() < 0.2,
    )


def random_event(rng: random.Random, witness: Witness) -> Event:
    period_ns = witness.rules.period_ns
    pick = rng.random()
    if pick < 0.4:
        is_odd = rng.random() < 0.3
        sequence = witness.ticks + (1 if witness.rules.waits else 0)
        return Reply(
            sequence=sequence + (rng.randint(-5, 3) if is_odd else 0),
            observed_ns=witness.now_ns - rng.randint(0, 4 * period_ns if is_odd else period_ns),
            generation=witness.generation + (rng.choice([0, 0, -1, 1]) if is_odd else 0),
            action=tuple(rng.choice(NUMBERS if is_odd else NUMBERS[:6]) for _ in range(rng.choice([2] * 9 + [1, 3]))),
            bundle_digest=rng.choice(["b1"] * 9 + ["b2"]),
            contract_hash=rng.choice(["c1"] * 19 + ["c2"]),
            warns=rng.random() < 0.2,
        )
    if pick < 0.45:
        reason = rng.choice(["QUEUE_FULL", "UNAVAILABLE", "CONTRACT_MISMATCH"])
        return Refusal(sequence=witness.ticks, generation=witness.generation, reason=reason)
    if pick < 0.46:
        return Stop(reason="OPERATOR_STOP")
    if pick < 0.47:
        return Switch(generation=witness.generation + 1, keeps_command=rng.random() < 0.5)
    if pick < 0.55:
        return Rearm()
    answer = rng.choices([(rng.uniform(-1, 1), rng.uniform(-1, 1)), None, (2.0, 0.0)], [50, 1, 1])[0]
    return Tick(
        fault=rng.choice(["", "", "", "", "NON_FINITE"]) if rng.random() < 0.2 else "",
        repeats=rng.random() < 0.2,
        measured=rng.choice([None, (0.3, -0.3), (math.nan, 7.0), (math.inf,)]),
        fallback=lambda _: answer,
    )


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_long_history_breaks_a_promise(seed: int) -> None:
    rng = random.Random(seed)  # 250 histories of at least 400 ticks each: 100 000 ticks
    witness = Witness(random_rules(rng))
    while witness.ticks < 400:
        event = random_event(rng, witness)
        witness.play(event)
        if isinstance(event, Tick) or rng.random() < 0.05:
            late = rng.choices([0.0, 0.3, 3.0, 100.0], [80, 15, 4, 1])[0]
            witness.now_ns += int(witness.rules.period_ns * (1 + late))


class Levels(RuleBasedStateMachine):
    """The same, with histories that hypothesis makes short when they fail."""

    @initialize(seed=st.integers(0, 1000))
    def begin(self, seed: int) -> None:
        self.witness = Witness(random_rules(random.Random(seed)))

    @rule(late=st.sampled_from([0.0, 0.5, 5.0]), fault=st.sampled_from(["", "", "NON_FINITE"]))
    def tick(self, late: float, fault: str) -> None:
        self.witness.play(Tick(fault=fault, fallback=lambda _: (0.5, -0.5)))
        self.witness.now_ns += int(self.witness.rules.period_ns * (1 + late))

    @rule(
        behind=st.integers(-2, 3),
        age=st.floats(0, 4),
        action=st.tuples(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS)),
        generation=st.sampled_from([0, 0, 0, -1]),
        warns=st.booleans(),
    )
    def reply(self, behind: int, age: float, action: tuple[float, float], generation: int, warns: bool) -> None:
        witness = self.witness
        event = Reply(
            sequence=witness.ticks + 1 - behind,
            observed_ns=witness.now_ns - int(age * witness.rules.period_ns),
            generation=witness.generation + generation,
            action=action,
            bundle_digest="b1",
            contract_hash="c1",
            warns=warns,
        )
        witness.play(event)
        if generation:
            assert witness.play(event) == Rejected(reason="WRONG_GENERATION")

    @rule(keeps_command=st.booleans())
    def switch(self, keeps_command: bool) -> None:
        self.witness.play(Switch(generation=self.witness.generation + 1, keeps_command=keeps_command))

    @rule()
    def stop(self) -> None:
        self.witness.play(Stop(reason="OPERATOR_STOP"))

    @precondition(lambda self: self.witness.was_stopped)
    @rule()
    def rearm(self) -> None:
        self.witness.play(Rearm())


Levels.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestLevels: Callable[[], Any] = Levels.TestCase
