"""The numbers add up."""

import pytest

from lom_client.level_rules import OnWarning
from lom_client.levels import Command, Level, Rearm, Rejected, Source
from lom_client.loop_counters import OTHER, LoopCounters, LoopTally, Record
from tests.clients.level_traces import MS, Script, make_rules


def tallied(script: Script, commands: list[Command], rejected: int = 0) -> LoopCounters:
    history: list[Record] = [*commands, *[Rejected(reason="LATE")] * rejected]
    return LoopTally(history).snapshot()


def test_a_day_of_a_robot() -> None:
    script = Script(make_rules(on_warning=OnWarning.FALLBACK))
    commands = script.fresh(3)
    script.refuse("QUEUE_FULL")
    commands += script.miss(22)
    commands += script.fresh(2)
    counters = tallied(script, commands, rejected=4)
    assert counters.ticks == 27
    assert counters.sources == {Source.FRESH: 3, Source.HOLD: 5, Source.FALLBACK: 14, Source.SAFE_STOP: 5}
    assert counters.misses == {"QUEUE_FULL": 1, "DEADLINE_EXCEEDED": 21, "STOPPED": 2}
    assert counters.rejected == {"LATE": 4}
    assert counters.longest_miss_run == 24
    assert counters.fresh == 3
    assert counters.fresh_share == pytest.approx(3 / 27)
    assert counters.transitions == {
        (Level.DEGRADED, Level.NOMINAL): 1,
        (Level.NOMINAL, Level.DEGRADED): 1,
        (Level.DEGRADED, Level.FALLBACK): 1,
        (Level.FALLBACK, Level.SAFE_STOP): 1,
    }


def test_ages_fall_into_powers_of_two() -> None:
    script = Script(make_rules(max_age_ns=100 * MS))
    ages = [0, 1, MS // 16, MS // 16 + 1, MS, MS + 1, 2 * MS, 7 * MS, 8 * MS, 9 * MS]
    commands = [command for age_ns in ages for command in script.fresh(1, age_ns=age_ns)]
    counters = tallied(script, commands)
    assert counters.ages_ms == {0.0625: 3, 0.125: 1, 1.0: 1, 2.0: 2, 8.0: 2, 16.0: 1}


def test_a_refused_rearm_is_counted() -> None:
    script = Script(make_rules())
    rejected = script.play(Rearm())
    assert isinstance(rejected, Rejected)
    assert LoopTally([rejected]).snapshot().rejected == {"NOT_STOPPED": 1}


def test_nothing_is_nothing() -> None:
    counters = LoopTally().snapshot()
    assert (counters.ticks, counters.fresh_share, counters.longest_miss_run) == (0, 0.0, 0)


def test_reasons_without_end_are_counted_in_bounded_memory() -> None:
    script = Script(make_rules())
    history: list[Record] = []
    for number in range(300):
        script.refuse(f"REASON_{number}")
        history.append(script.tick())
    counters = LoopTally(history).snapshot()
    assert counters.misses["REASON_0"] == 1
    assert counters.misses[OTHER] == 200
    assert sum(counters.misses.values()) == counters.ticks == 300


def test_a_snapshot_does_not_change() -> None:
    script = Script(make_rules())
    tally = LoopTally(script.fresh(1))
    before = tally.snapshot()
    tally.count(script.tick())
    assert before.ticks == 1
    assert tally.snapshot().ticks == 2
