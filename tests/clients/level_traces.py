"""Scenarios for `lom_client.levels`, and what comes out of them, to the bit: every implementation replays them.

    python -m tests.clients.level_traces    # writes clients/traces/levels.jsonl

One scenario a line: `{"name", "rules", "contract_hash", "steps": [{"now_ns", "event", "output"}]}`. Numbers of actions
and limits are hexadecimal floating-point strings (`inf` and `nan` included), times are integer nanoseconds. A tick's
`fallback` is what the user's function answers if it is called, null where it fails.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from lom_client.level_rules import (
    Kind,
    LevelRules,
    OnWarning,
    default_hold_ticks,
    default_recovery_ticks,
    default_stop_ticks,
)
from lom_client.levels import (
    Command,
    Event,
    Flag,
    LoopState,
    Output,
    Rearm,
    Refusal,
    Rejected,
    Reply,
    Stop,
    Switch,
    Tick,
    advance,
)

PATH = Path(__file__).parents[2] / "clients" / "traces" / "levels.jsonl"
MS = 1_000_000
Json: TypeAlias = dict[str, Any]

_EVENTS: dict[str, type[Event]] = {
    "reply": Reply,
    "refusal": Refusal,
    "tick": Tick,
    "switch": Switch,
    "stop": Stop,
    "rearm": Rearm,
}
_NAMES = {event: name for name, event in _EVENTS.items()}
_VECTORS = ("low", "high", "safe_action", "slew_per_s", "acceleration_per_s2")


def make_rules(
    period_ns: int = 20 * MS, kinds: Sequence[Kind] = (Kind.POSITION, Kind.VELOCITY), **changes: Any
) -> LevelRules:
    """Two elements between -1 and 1, the safe action 0.25 each; every limit as a user's default."""
    width = len(kinds)
    hold_ticks = default_hold_ticks(period_ns)
    values: Json = {
        "period_ns": period_ns,
        "kinds": tuple(kinds),
        "low": (-1.0,) * width,
        "high": (1.0,) * width,
        "safe_action": (0.25,) * width,
        "max_age_ns": 2 * period_ns,
        "hold_ticks": hold_ticks,
        "stop_ticks": default_stop_ticks(period_ns, hold_ticks),
        "recovery_ticks": default_recovery_ticks(period_ns),
    }
    return LevelRules(**(values | changes))


class Script:
    """Plays events one after the other and writes down what they are answered with.

    The clock stands at the tick that comes next; `tick` moves it on by a period, or by `then_ns`.
    """

    def __init__(self, rules: LevelRules, contract_hash: str = "") -> None:
        self.rules = rules
        self.contract_hash = contract_hash
        self.state = LoopState(contract_hash=contract_hash)
        self.now_ns = 1_000_000_000
        self.steps: list[Json] = []

    def play(self, event: Event, *, fallback: Sequence[float] | None = None, at_ns: int | None = None) -> Output:
        now_ns = self.now_ns if at_ns is None else at_ns
        said = _event_to_json(event, fallback)
        self.state, output = advance(self.rules, self.state, event_from_json(said), now_ns)
        self.steps.append({"now_ns": now_ns, "event": said, "output": output_to_json(output)})
        return output

    def reply(self, *action: float, age_ns: int | None = None, **changes: Any) -> Output:
        """The answer to this tick's observation where the rules say `waits`, else to the one before."""
        waits = self.rules.waits
        fields_of_reply: Json = {
            "sequence": self.state.sequence + (1 if waits else 0),
            "observed_ns": self.now_ns - (age_ns if age_ns is not None else MS if waits else self.rules.period_ns),
            "generation": self.state.generation,
            "action": action or (0.5,) * len(self.rules.kinds),
            "bundle_digest": "b1",
            "contract_hash": "c1",
        }
        return self.play(Reply(**(fields_of_reply | changes)))

    def refuse(self, reason: str = "QUEUE_FULL", **changes: Any) -> Output:
        fields_of_refusal: Json = {"sequence": self.state.sequence + 1, "generation": self.state.generation}
        return self.play(Refusal(**(fields_of_refusal | {"reason": reason} | changes)))

    def tick(
        self,
        fault: str = "",
        *,
        repeats: bool = False,
        measured: Sequence[float] | None = None,
        fallback: Sequence[float] | None = None,
        then_ns: int | None = None,
    ) -> Command:
        tick = Tick(fault=fault, repeats=repeats, measured=None if measured is None else tuple(measured))
        output = self.play(tick, fallback=fallback)
        assert isinstance(output, Command)
        self.now_ns += self.rules.period_ns if then_ns is None else then_ns
        return output

    def fresh(self, times: int = 1, *action: float, **changes: Any) -> list[Command]:
        """Ticks with an answer."""
        commands = []
        for _ in range(times):
            self.reply(*action, **changes)
            commands.append(self.tick())
        return commands

    def miss(self, times: int = 1, **tick: Any) -> list[Command]:
        """Ticks without one."""
        return [self.tick(**tick) for _ in range(times)]

    def to_json(self, name: str) -> Json:
        rules = {field.name: getattr(self.rules, field.name) for field in fields(LevelRules)}
        rules |= {vector: [float(number).hex() for number in rules[vector]] for vector in _VECTORS}
        rules["bounds_tolerance"] = float(self.rules.bounds_tolerance).hex()
        return {"name": name, "rules": rules, "contract_hash": self.contract_hash, "steps": self.steps}


def rules_from_json(said: Json) -> LevelRules:
    """What a scenario's rules say."""
    numbers = {vector: tuple(map(float.fromhex, said[vector])) for vector in _VECTORS}
    return LevelRules(
        **said
        | numbers
        | {
            "kinds": tuple(map(Kind, said["kinds"])),
            "on_warning": OnWarning(said["on_warning"]),
            "bounds_tolerance": float.fromhex(said["bounds_tolerance"]),
        }
    )


def _event_to_json(event: Event, fallback: Sequence[float] | None) -> Json:
    said: Json = {field.name: getattr(event, field.name) for field in fields(event)}
    if isinstance(event, Tick):
        said["measured"] = None if event.measured is None else [float(number).hex() for number in event.measured]
        said["fallback"] = None if fallback is None else [float(number).hex() for number in fallback]
    if isinstance(event, Reply):
        said["action"] = [float(number).hex() for number in event.action]
    return {"type": _NAMES[type(event)]} | said


def event_from_json(said: Json) -> Event:
    """What a step's event says."""
    values = dict(said)
    event = _EVENTS[values.pop("type")]
    for name in ("action", "measured"):
        if values.get(name) is not None:
            values[name] = tuple(map(float.fromhex, values[name]))
    if event is Tick:
        answer = values["fallback"] and tuple(map(float.fromhex, values["fallback"]))
        values["fallback"] = lambda _: answer
    return event(**values)


def output_to_json(output: Output) -> Json | None:
    """What a step's output says."""
    match output:
        case None:
            return None
        case Rejected(reason=reason):
            return {"type": "rejected", "reason": reason}
        case Command():
            return {
                "type": "command",
                "sequence": output.sequence,
                "level": output.level.value,
                "source": output.source.value,
                "values": [value.hex() for value in output.values],
                "reason": output.reason,
                "flags": [flag.name for flag in Flag if flag in output.flags],
                "age_ns": output.age_ns,
            }


Scenario: TypeAlias = Callable[[], Script]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


# -- from first tick to SAFE_STOP


@scenario
def begins_where_the_robot_is() -> Script:
    script = Script(make_rules())
    script.miss(2, measured=(0.75, -0.5))
    return script


@scenario
def begins_with_the_safe_action_where_nothing_is_measured() -> Script:
    script = Script(make_rules())
    script.miss(3)
    return script


@scenario
def begins_with_what_is_measured_and_the_rest_safe() -> Script:
    script = Script(make_rules())
    script.miss(1, measured=(math.nan, 5.0))
    script.miss(1, measured=(0.9, 0.9))
    return script


@scenario
def ignores_a_measurement_of_another_length() -> Script:
    script = Script(make_rules())
    script.miss(1, measured=(0.5,))
    return script


@scenario
def never_stops_before_it_acted() -> Script:
    script = Script(make_rules())
    script.miss(30)
    script.fresh(7)
    return script


@scenario
def acts_at_once() -> Script:
    script = Script(make_rules())
    script.fresh(1, 0.5, -0.5)
    script.fresh(1, -0.5, 0.5)
    script.fresh(1, 0.0, -0.0)
    return script


@scenario
def goes_down_level_by_level_and_stays() -> Script:
    script = Script(make_rules())
    script.fresh(3)
    script.refuse("UNAVAILABLE")
    script.miss(22)
    script.fresh(7)
    return script


@scenario
def holds_and_recovers_at_once() -> Script:
    script = Script(make_rules())
    for misses in (1, 2, 5):
        script.fresh(2)
        script.miss(misses)
    script.fresh(1)
    return script


@scenario
def recovers_from_the_fallback_by_good_answers_in_a_row_and_a_blend() -> Script:
    script = Script(make_rules())
    script.fresh(2, 1.0, 1.0)
    script.miss(8)
    script.fresh(3, -1.0, -1.0)
    script.miss(1)
    script.fresh(12, -1.0, -1.0)
    return script


@scenario
def a_miss_ends_a_blend() -> Script:
    script = Script(make_rules())
    script.fresh(2, 1.0, 1.0)
    script.miss(7)
    script.fresh(6, -1.0, -1.0)
    script.miss(1)
    script.fresh(3, -1.0, -1.0)
    return script


@scenario
def takes_over_at_once_without_blending() -> Script:
    script = Script(make_rules(blend_ticks=0))
    script.fresh(2, 1.0, 1.0)
    script.miss(7)
    script.fresh(6, -1.0, -1.0)
    return script


@scenario
def holds_nothing_where_the_limit_is_zero() -> Script:
    script = Script(make_rules(hold_ticks=0))
    script.fresh(2)
    script.miss(2)
    script.fresh(6)
    return script


@scenario
def a_kilohertz_stops_after_twenty_milliseconds() -> Script:
    script = Script(make_rules(period_ns=MS, kinds=(Kind.TORQUE, Kind.VELOCITY)))
    script.fresh(3)
    script.miss(22)
    return script


@scenario
def ten_hertz_stops_after_half_a_second() -> Script:
    script = Script(make_rules(period_ns=100 * MS))
    script.fresh(2)
    script.miss(7)
    return script


@scenario
def a_slow_loop_stops_by_the_clock() -> Script:
    script = Script(make_rules())
    script.fresh(3)
    script.miss(6, then_ns=90 * MS)
    return script


@scenario
def a_stalled_loop_holds_once_and_goes_on() -> Script:
    script = Script(make_rules())
    script.fresh(3)
    script.now_ns += 10_000 * MS
    script.miss(1)
    script.fresh(2)
    return script


@scenario
def a_clock_that_goes_back_stands_still() -> Script:
    script = Script(make_rules())
    script.fresh(3)
    script.now_ns -= 500 * MS
    script.miss(2)
    return script


@scenario
def overdue_to_the_nanosecond() -> Script:
    for_hold = make_rules(hold_ticks=2, stop_ticks=6)
    script = Script(for_hold)
    script.fresh(1)
    script.tick(then_ns=49_999_999)
    script.tick(then_ns=1)
    script.tick(then_ns=59_999_999)
    script.tick(then_ns=1)
    script.tick()
    return script


# -- kinds


@scenario
def velocities_decay_and_positions_stay() -> Script:
    script = Script(make_rules(period_ns=10 * MS, hold_ticks=15, stop_ticks=40))
    script.fresh(1, 0.7, -0.9)
    script.miss(14)
    return script


@scenario
def velocities_decay_through_the_levels() -> Script:
    script = Script(make_rules(period_ns=4 * MS, kinds=(Kind.VELOCITY,) * 2))
    script.fresh(1, 1.0, -0.3)
    script.miss(26)
    return script


@scenario
def torques_are_held_for_an_instant() -> Script:
    for_torque = make_rules(period_ns=5 * MS, kinds=(Kind.TORQUE,) * 2, safe_action=(0.125, 0.0))
    script = Script(for_torque)
    script.fresh(1, 0.9, -0.9)
    script.miss(8)
    return script


@scenario
def torques_are_not_held_at_fifty_hertz() -> Script:
    script = Script(make_rules(kinds=(Kind.TORQUE,) * 2))
    script.fresh(1, 0.9, -0.9)
    script.miss(2)
    return script


@scenario
def a_stop_of_every_kind() -> Script:
    script = Script(make_rules(period_ns=10 * MS, kinds=tuple(Kind)))
    for number in range(5):
        script.fresh(1, 0.05 * number, 0.8, 0.9)
    script.play(Stop(reason="OPERATOR_STOP"))
    script.fresh(12, -1.0, -1.0, -1.0)
    return script


@scenario
def a_stop_at_once() -> Script:
    script = Script(make_rules(period_ns=10 * MS, kinds=tuple(Kind), stop_ns=0))
    script.fresh(1, 0.0, 0.8, 0.9)
    script.fresh(1, 0.1, 0.8, 0.9)
    script.play(Stop(reason="OPERATOR_STOP"))
    script.miss(3)
    return script


@scenario
def a_stop_within_limits() -> Script:
    limits = {"slew_per_s": (2.0, 4.0, math.inf), "acceleration_per_s2": (40.0, 40.0, math.inf)}
    script = Script(make_rules(period_ns=10 * MS, kinds=tuple(Kind), **limits))
    script.fresh(15, 1.0, 1.0, 1.0)
    script.play(Stop(reason="OPERATOR_STOP"))
    script.miss(20)
    return script


# -- rearm


@scenario
def a_rearm_needs_good_answers() -> Script:
    script = Script(make_rules())
    script.play(Rearm())
    script.fresh(2)
    script.miss(20)
    script.play(Rearm())
    script.fresh(4)
    script.play(Rearm())
    script.fresh(1)
    script.play(Rearm())
    script.fresh(6, -0.5, -0.5)
    return script


@scenario
def a_rearm_begins_where_the_robot_is() -> Script:
    script = Script(make_rules())
    script.fresh(2)
    script.play(Stop(reason="OPERATOR_STOP"))
    script.fresh(6)
    script.play(Rearm())
    script.reply()
    script.tick(measured=(-0.9, math.nan))
    script.fresh(5)
    return script


@scenario
def a_rearm_without_answers_goes_down_again() -> Script:
    script = Script(make_rules(recovery_ticks=1))
    script.fresh(2)
    script.play(Stop(reason="OPERATOR_STOP"))
    script.fresh(1)
    script.play(Rearm())
    script.miss(21)
    return script


@scenario
def a_stop_before_anything_was_commanded() -> Script:
    script = Script(make_rules())
    script.play(Stop(reason="OPERATOR_STOP"))
    script.miss(2, measured=(0.5, 0.5))
    return script


# -- replies that are not used


@scenario
def no_reply_of_another_generation() -> Script:
    script = Script(make_rules())
    script.fresh(1)
    script.reply(generation=1)
    script.tick()
    script.refuse(generation=7)
    script.tick()
    return script


@scenario
def no_reply_from_the_future() -> Script:
    script = Script(make_rules())
    script.reply(sequence=2)
    script.reply(age_ns=-1)
    script.tick()
    script.reply(age_ns=0)
    script.tick()
    return script


@scenario
def no_reply_twice_and_none_out_of_order() -> Script:
    script = Script(make_rules(waits=False, max_age_ns=200 * MS))
    script.miss(3)
    script.reply(0.5, 0.5, sequence=2)
    script.reply(0.6, 0.6, sequence=2)
    script.reply(0.7, 0.7, sequence=1)
    script.tick()
    script.reply(0.8, 0.8, sequence=2)
    script.tick()
    script.reply(0.9, 0.9, sequence=4)
    script.tick()
    return script


@scenario
def a_reply_that_was_judged_is_not_judged_again() -> Script:
    script = Script(make_rules())
    script.reply(math.nan, 0.0)
    script.reply(0.5, 0.5)
    script.tick()
    return script


@scenario
def no_late_reply_where_the_loop_waits() -> Script:
    script = Script(make_rules())
    script.fresh(1)
    script.tick()
    script.reply(sequence=2, age_ns=25 * MS)
    script.tick()
    script.fresh(1)
    return script


@scenario
def the_newest_of_several_where_it_does_not() -> Script:
    script = Script(make_rules(waits=False, max_age_ns=60 * MS))
    script.miss(3)
    script.reply(0.1, 0.1, sequence=2, age_ns=40 * MS)
    script.reply(0.2, 0.2, sequence=3, age_ns=20 * MS)
    script.tick()
    script.miss(1)
    return script


@scenario
def no_stale_reply() -> Script:
    script = Script(make_rules(waits=False))
    script.miss(1)
    script.reply(age_ns=40 * MS)
    script.tick()
    script.reply(age_ns=40 * MS + 1)
    script.tick()
    script.reply(age_ns=30 * MS)
    script.now_ns += 11 * MS
    script.tick()
    return script


@scenario
def no_reply_of_another_contract() -> Script:
    script = Script(make_rules(), contract_hash="c1")
    script.fresh(2)
    script.reply(contract_hash="c2")
    script.miss(1)
    script.fresh(6)
    return script


@scenario
def the_first_contract_is_agreed_on() -> Script:
    script = Script(make_rules())
    script.fresh(1, contract_hash="c2")
    script.fresh(1, contract_hash="c1")
    return script


@scenario
def a_server_of_another_contract_stops_the_robot() -> Script:
    script = Script(make_rules(), contract_hash="c1")
    script.fresh(2)
    for _ in range(21):
        script.refuse("CONTRACT_MISMATCH")
        script.tick()
    return script


@scenario
def no_reply_of_another_length() -> Script:
    script = Script(make_rules())
    script.fresh(1)
    script.reply(0.5)
    script.tick()
    script.reply(0.5, 0.5, 0.5)
    script.tick()
    return script


@scenario
def three_non_finite_replies_within_a_second_are_too_many() -> Script:
    script = Script(make_rules())
    script.fresh(1)
    for value in (math.nan, math.inf, -math.inf):
        script.reply(0.5, value)
        script.tick()
        script.fresh(2)
    script.fresh(6)
    return script


@scenario
def three_in_more_than_a_second_are_not() -> Script:
    script = Script(make_rules(period_ns=100 * MS))
    script.fresh(1)
    for _ in range(3):
        script.reply(math.nan, 0.5)
        script.tick()
        script.fresh(5)
    return script


@scenario
def a_breach_of_bounds() -> Script:
    script = Script(make_rules())
    script.fresh(1, 1.2, -1.2)
    script.fresh(1, 1.2000001, 0.0)
    script.fresh(1, 0.0, -1e300)
    script.fresh(1, 0.0, 1.3)
    script.fresh(6, 0.0, 0.5)
    return script


@scenario
def no_tolerance_beyond_the_bounds() -> Script:
    script = Script(make_rules(bounds_tolerance=0.0))
    script.fresh(1, 1.0, -1.0)
    script.fresh(1, math.nextafter(1.0, 2.0), 0.0)
    return script


@scenario
def bounds_at_infinity() -> Script:
    script = Script(make_rules(low=(-math.inf, 0.0), high=(math.inf, math.inf)))
    script.fresh(1, 1e30, 1e30)
    script.fresh(1, -1e30, -1e-9)
    script.fresh(1, 0.0, 0.0)
    return script


@scenario
def a_pinned_bundle() -> Script:
    script = Script(make_rules(pins_bundle=True))
    script.fresh(2)
    script.fresh(2, bundle_digest="b2")
    script.fresh(2)
    return script


@scenario
def another_bundle_takes_over_slowly() -> Script:
    script = Script(make_rules())
    script.fresh(2, 1.0, 1.0)
    script.fresh(3, -1.0, -1.0, bundle_digest="b2")
    script.fresh(6, 0.0, 0.0, bundle_digest="b3")
    return script


@scenario
def an_observation_that_cannot_be_sent() -> Script:
    script = Script(make_rules(waits=False))
    script.miss(1)
    script.fresh(2)
    script.reply()
    script.tick("NON_FINITE")
    script.fresh(1)
    return script


@scenario
def the_newest_explanation_counts() -> Script:
    script = Script(make_rules())
    script.fresh(1)
    script.refuse("QUEUE_FULL")
    script.refuse("UNAVAILABLE")
    script.tick()
    script.tick()
    return script


# -- warnings and frozen observations


def _warned(on_warning: OnWarning) -> Script:
    script = Script(make_rules(on_warning=on_warning))
    script.fresh(2)
    script.fresh(2, warns=True)
    script.fresh(1)
    script.fresh(5, warns=True)
    script.miss(1)
    script.fresh(1, warns=True)
    script.fresh(2)
    script.fresh(1, warns=True)
    script.fresh(8)
    return script


@scenario
def warnings_ignored() -> Script:
    return _warned(OnWarning.IGNORE)


@scenario
def warnings_flagged() -> Script:
    return _warned(OnWarning.FLAG)


@scenario
def warnings_lead_to_the_fallback() -> Script:
    return _warned(OnWarning.FALLBACK)


@scenario
def warnings_never_stop_the_robot() -> Script:
    script = Script(make_rules(on_warning=OnWarning.FALLBACK))
    script.fresh(2)
    script.fresh(25, warns=True)
    return script


@scenario
def a_frozen_observation_is_flagged() -> Script:
    script = Script(make_rules(frozen_ticks=3))
    for repeats in (False, True, True, True, False, True):
        script.reply()
        script.tick(repeats=repeats)
    return script


@scenario
def or_not() -> Script:
    script = Script(make_rules(frozen_ticks=0))
    for _ in range(4):
        script.reply()
        script.tick(repeats=True)
    return script


# -- fallbacks of the user's


@scenario
def the_users_fallback_acts() -> Script:
    script = Script(make_rules(has_fallback=True))
    script.fresh(2)
    script.miss(6, fallback=(-0.25, -0.5))
    script.miss(2, fallback=(-0.5, -0.25))
    script.fresh(6)
    return script


def _failing_fallback(*answer: float, fails: bool = False) -> Script:
    script = Script(make_rules(has_fallback=True))
    script.fresh(2, 0.5, 1.0)
    script.miss(5)
    script.miss(8, fallback=None if fails else answer)
    script.fresh(6)
    return script


@scenario
def a_fallback_that_fails_stops() -> Script:
    return _failing_fallback(fails=True)


@scenario
def a_fallback_that_is_not_finite_stops() -> Script:
    return _failing_fallback(0.0, math.nan)


@scenario
def a_fallback_out_of_bounds_stops() -> Script:
    return _failing_fallback(0.0, 1.0000001)


@scenario
def a_fallback_of_another_length_stops() -> Script:
    return _failing_fallback(0.0)


# -- limits


@scenario
def slew_from_end_to_end() -> Script:
    script = Script(make_rules(slew_per_s=(10.0, 3.0)))
    script.fresh(12, 1.0, 1.0)
    script.fresh(12, -1.0, -1.0)
    return script


@scenario
def slew_through_every_level() -> Script:
    script = Script(make_rules(period_ns=10 * MS, slew_per_s=(5.0, 5.0), has_fallback=True))
    script.fresh(20, 1.0, 1.0)
    script.miss(12, fallback=(-1.0, -1.0))
    script.fresh(8, 0.9, 0.9)
    script.miss(25, fallback=(-1.0, -1.0))
    return script


@scenario
def acceleration_brakes_in_time() -> Script:
    script = Script(make_rules(period_ns=10 * MS, slew_per_s=(5.0, math.inf), acceleration_per_s2=(50.0, 20.0)))
    script.fresh(40, 1.0, 1.0)
    return script


@scenario
def acceleration_with_a_change_of_mind() -> Script:
    script = Script(make_rules(period_ns=10 * MS, slew_per_s=(5.0, 5.0), acceleration_per_s2=(50.0, 50.0)))
    script.fresh(12, 0.9, -0.9)
    script.fresh(30, -0.7, 0.3)
    return script


@scenario
def a_held_position_comes_to_rest_within_its_acceleration() -> Script:
    script = Script(make_rules(period_ns=10 * MS, acceleration_per_s2=(20.0, 20.0)))
    script.fresh(10, 1.0, 1.0)
    script.miss(12)
    return script


# -- switches


@scenario
def a_switch_drops_the_generation_before() -> Script:
    script = Script(make_rules(waits=False))
    script.miss(1)
    script.fresh(2, 0.5, 0.5)
    script.reply(0.6, 0.6)
    script.play(Switch(generation=1))
    script.tick()
    script.reply(0.7, 0.7, generation=0)
    script.tick()
    script.fresh(6, -0.5, -0.5, contract_hash="c2", bundle_digest="b2")
    return script


@scenario
def a_switch_of_kinds_begins_where_the_robot_is() -> Script:
    script = Script(make_rules())
    script.fresh(2)
    script.play(Switch(generation=1, keeps_command=False))
    script.miss(1, measured=(0.1, 0.2))
    script.fresh(6, -0.5, -0.5)
    return script


@scenario
def a_switch_leaves_a_stop_alone() -> Script:
    script = Script(make_rules())
    script.fresh(2)
    script.play(Stop(reason="OPERATOR_STOP"))
    script.miss(2)
    script.play(Switch(generation=1))
    script.miss(2)
    script.play(Switch(generation=2, keeps_command=False))
    script.miss(2, measured=(0.1, 0.2))
    return script


@scenario
def a_switch_every_few_ticks() -> Script:
    script = Script(make_rules())
    for generation in range(1, 6):
        script.fresh(3, 0.1 * generation, -0.1 * generation)
        script.play(Switch(generation=generation))
        script.reply(0.9, 0.9, generation=generation - 1)
    script.miss(1)
    return script


# -- anything


def _anything(seed: int) -> Script:
    rng = random.Random(seed)
    kinds = [rng.choice(list(Kind)) for _ in range(2)]
    period_ns = rng.choice([MS, 4 * MS, 10 * MS, 20 * MS])
    script = Script(
        make_rules(
            period_ns,
            kinds,
            waits=rng.random() < 0.5,
            has_fallback=rng.random() < 0.5,
            slew_per_s=rng.choice([(), (3.0, 20.0)]),
            acceleration_per_s2=rng.choice([(), (70.0, 500.0)]),
            on_warning=rng.choice(list(OnWarning)),
            recovery_ticks=3,
        )
    )
    for _ in range(90):
        script.now_ns += rng.randint(0, period_ns // 4)
        kind = rng.choices(["reply", "odd", "refuse", "switch", "stop", "rearm", "nothing"], [60, 8, 8, 2, 1, 8, 10])[0]
        if kind == "reply":
            script.reply(rng.uniform(-1.1, 1.1), rng.uniform(-1.1, 1.1), warns=rng.random() < 0.2)
        elif kind == "odd":
            script.reply(
                rng.choice([0.3, math.nan, 5.0]),
                0.1,
                sequence=rng.randint(0, 90),
                bundle_digest=rng.choice(["b1", "b2"]),
            )
        elif kind == "refuse":
            script.refuse(rng.choice(["QUEUE_FULL", "UNAVAILABLE", "CONTRACT_MISMATCH"]))
        elif kind == "switch":
            script.play(Switch(generation=script.state.generation + 1, keeps_command=rng.random() < 0.5))
        elif kind == "stop":
            script.play(Stop(reason="OPERATOR_STOP"))
        elif kind == "rearm":
            script.play(Rearm())
        script.tick(
            rng.choices(["", "NON_FINITE"], [30, 1])[0],
            repeats=rng.random() < 0.1,
            measured=rng.choice([None, (rng.uniform(-1, 1), rng.uniform(-1, 1))]),
            fallback=rng.choices([(rng.uniform(-1, 1), 0.0), None], [20, 1])[0],
        )
    return script


def traces() -> Iterator[str]:
    """Every scenario, played, as a line."""
    for name, play in SCENARIOS.items():
        yield json.dumps(play().to_json(name), separators=(",", ":"), allow_nan=False)
    for seed in range(10):
        yield json.dumps(_anything(seed).to_json(f"anything_{seed}"), separators=(",", ":"), allow_nan=False)


if __name__ == "__main__":
    PATH.write_text("".join(f"{line}\n" for line in traces()), encoding="utf-8")
