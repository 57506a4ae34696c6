"""The decision of one tick, under a virtual clock."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lom_client.fallback import Answer, FallbackRules, LoopState, Miss, Source, decide

PERIOD_S = 0.01


def vector(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def rules(hold_limit: int = 3) -> FallbackRules:
    return FallbackRules(vector(-1, -2), vector(1, 2), vector(0, 0.5), PERIOD_S, hold_limit)


def play(events: Any, hold_limit: int = 3) -> Any:
    """The output of each tick of an undisturbed loop; tick n begins at n periods."""
    state, outputs = LoopState(), []
    for tick, event in enumerate(events, start=1):
        state, output = decide(rules(hold_limit), state, event, tick * PERIOD_S)
        outputs.append(output)
    return outputs


def answer(tick: int, *values: float) -> Answer:
    return Answer(tick, tick * PERIOD_S, vector(*(values or (0.25, 0.5))))


def test_before_any_answer_the_safe_action() -> None:
    (output,) = play([Miss(1, "UNAVAILABLE")])
    assert (output.source, output.reason, output.age_s) == (Source.SAFE, "UNAVAILABLE", None)
    np.testing.assert_array_equal(output.values, [0, 0.5])


def test_fresh_then_hold_to_the_limit_then_safe_then_fresh_again() -> None:
    outputs = play([answer(1), *(Miss(tick, "QUEUE_FULL") for tick in range(2, 7)), answer(7)])
    assert [output.source for output in outputs] == ["fresh", "hold", "hold", "hold", "safe", "safe", "fresh"]
    assert [output.reason for output in outputs] == ["", *["QUEUE_FULL"] * 5, ""]
    np.testing.assert_array_equal(outputs[3].values, [0.25, 0.5])
    assert outputs[3].age_s == pytest.approx(3 * PERIOD_S)


def test_without_holding_a_miss_is_safe_at_once() -> None:
    assert [o.source for o in play([answer(1), Miss(2, "X"), answer(3)], hold_limit=0)] == ["fresh", "safe", "fresh"]


def test_a_late_answer_is_held_but_never_fresh() -> None:
    outputs = play([Miss(1, "X"), answer(1), answer(2), answer(2), answer(2), answer(2)])
    assert [output.source for output in outputs] == ["safe", "hold", "hold", "hold", "hold", "safe"]
    assert {output.reason for output in outputs[1:]} == {"DEADLINE_EXCEEDED"}


def test_an_answer_to_a_tick_that_has_not_been_is_dropped() -> None:
    assert [output.source for output in play([answer(5), answer(2)])] == ["safe", "fresh"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((np.nan, 0), "NON_FINITE_ACTION"),
        ((0, -np.inf), "NON_FINITE_ACTION"),
        ((1.0001, 0), "ACTION_OUT_OF_BOUNDS"),
        ((0, -2.001), "ACTION_OUT_OF_BOUNDS"),
        ((0,), "BAD_SHAPE"),
        ((0, 0, 0), "BAD_SHAPE"),
    ],
)
def test_an_unsound_answer_is_a_miss_that_says_why(values: Any, reason: str) -> None:
    outputs = play([answer(1), answer(2, *values)])
    assert (outputs[1].source, outputs[1].reason) == (Source.HOLD, reason)
    np.testing.assert_array_equal(outputs[1].values, [0.25, 0.5])


def test_a_stalled_loop_does_not_hold_what_is_old_by_the_clock() -> None:
    state, _ = decide(rules(), LoopState(), answer(1), PERIOD_S)
    _, output = decide(rules(), state, Miss(2, "X"), PERIOD_S + 4.1 * PERIOD_S)
    assert output.source is Source.SAFE


def test_what_the_caller_does_to_its_values_changes_nothing_later() -> None:
    the_rules = rules()
    state, first = decide(the_rules, LoopState(), answer(1), PERIOD_S)
    first.values[:] = 99
    _, second = decide(the_rules, state, Miss(2, "X"), 2 * PERIOD_S)
    np.testing.assert_array_equal(second.values, [0.25, 0.5])
    _, safe = decide(the_rules, LoopState(), Miss(1, "X"), 0)
    safe.values[:] = 99
    np.testing.assert_array_equal(the_rules.safe_action, [0, 0.5])


@pytest.mark.parametrize(
    "change",
    [
        {"safe_action": vector(np.nan, 0)},
        {"safe_action": vector(1.1, 0)},
        {"safe_action": vector(0)},
        {"low": vector(np.nan, -1)},
        {"low": vector(2, -2)},
        {"low": vector(-1)},
        {"period_s": 0.0},
        {"period_s": float("nan")},
        {"hold_limit": -1},
    ],
)
def test_contradicting_rules_are_refused(change: Any) -> None:
    sound: dict[str, Any] = {
        "low": vector(-1, -2),
        "high": vector(1, 2),
        "safe_action": vector(0, 0),
        "period_s": 0.1,
        "hold_limit": 1,
    }
    FallbackRules(**sound)
    with pytest.raises(ValueError, match=r"bounds|safe_action|period_s|hold_limit"):
        FallbackRules(**(sound | change))


NUMBERS = st.floats(-3, 3, width=32) | st.sampled_from([np.nan, np.inf, -np.inf, 1.0, -1.0])
# Whether there is an answer, of which tick relative to the one that decides, its values, how long the tick took.
STEPS = st.tuples(st.booleans(), st.integers(-4, 2), st.tuples(NUMBERS, NUMBERS), st.floats(0, 8 * PERIOD_S))
Step = tuple[bool, int, tuple[float, float], float]


@settings(max_examples=200, deadline=None)
@given(hold_limit=st.integers(0, 5), history=st.lists(STEPS, max_size=40))
def test_no_history_yields_an_unsound_or_mislabelled_output(hold_limit: int, history: list[Step]) -> None:
    assert_sound_throughout(hold_limit, history)


@settings(max_examples=50, deadline=None)
@given(hold_limit=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_no_long_history_does_either(hold_limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)  # 50 histories of 400 ticks: 20 000 decisions
    numbers = [np.nan, np.inf, -np.inf, 1.0, -1.0, 2.5, *rng.uniform(-1, 1, 6)]
    history = [
        (
            bool(rng.random() < 0.7),
            int(rng.choice([0, 0, 0, 0, -1, -2, -3, 1])),
            (float(rng.choice(numbers)), float(rng.choice(numbers))),
            float(rng.choice([0, 0.9, 1, 1.1, 8], p=[0.1, 0.1, 0.6, 0.1, 0.1])) * PERIOD_S,
        )
        for _ in range(400)
    ]
    assert_sound_throughout(hold_limit, history)


def assert_sound_throughout(hold_limit: int, history: list[Step]) -> None:
    the_rules, state, now = rules(hold_limit), LoopState(), 0.0
    observed_at: dict[int, float] = {}
    sound: dict[int, set[tuple[float, ...]]] = {}
    for tick, (is_answer, offset, values, lasts_s) in enumerate(history, start=1):
        observed_at[tick] = now
        now += lasts_s
        of_tick = max(1, tick + offset)
        event: Answer | Miss = Miss(of_tick, "SOME_REASON")
        if is_answer:
            event = Answer(of_tick, observed_at.get(of_tick, now), vector(*values))
            if of_tick <= tick and np.isfinite(values).all() and abs(values[0]) <= 1 and abs(values[1]) <= 2:
                sound.setdefault(of_tick, set()).add(tuple(event.values))
        state, output = decide(the_rules, state, event, now)

        assert output.tick == tick
        assert np.isfinite(output.values).all()
        assert (output.values >= the_rules.low).all()
        assert (output.values <= the_rules.high).all()
        assert (output.reason == "") == (output.source is Source.FRESH)
        if output.source is Source.SAFE:
            assert output.age_s is None
            np.testing.assert_array_equal(output.values, the_rules.safe_action)
            continue
        assert output.age_s is not None
        assert output.age_s <= (hold_limit + 1) * PERIOD_S
        allowed = [tick] if output.source is Source.FRESH else range(tick - hold_limit, tick)
        assert any(
            tuple(output.values) in sound.get(of_tick, ()) and output.age_s == now - observed_at[of_tick]
            for of_tick in allowed
        )
