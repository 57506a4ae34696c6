"""A user's fallback is tried before it is needed, and can do no harm when it is."""

import time
from typing import Any

import numpy as np
import pytest

from lom_client.fallback import GuardedFallback
from tests.clients.level_traces import MS, make_rules

RULES = make_rules(10 * MS)


def raising(*_: Any) -> Any:
    raise ZeroDivisionError


def slow(command: Any, _: Any) -> Any:
    time.sleep(0.002)
    return command


def test_it_is_asked_with_the_command_before_and_what_is_measured() -> None:
    asked: list[Any] = []

    def fallback(command: Any, measured: Any) -> Any:
        asked.append((command.tolist(), None if measured is None else measured.tolist()))
        return -command

    guarded = GuardedFallback(fallback, RULES)
    assert {str(question) for question in asked} == {"([0.25, 0.25], None)"}
    assert guarded((0.5, 1.0), (0.1, 0.2)) == [-0.5, -1.0]
    assert asked[-1] == ([0.5, 1.0], [0.1, 0.2])


@pytest.mark.parametrize(
    ("fallback", "words"),
    [
        (raising, "failed"),
        (slow, "within 200 µs"),
        (lambda *_: [0.0], "2 numbers, got 1"),
        (lambda *_: [0.0, np.nan], "got nan"),
        (lambda *_: [0.0, 1.1], r"between -1.0 and 1.0 in \[1\], got 1.1"),
        (lambda *_: [[0.0, 0.0]], "failed"),
        (lambda *_: "text", "failed"),
        (lambda *_: None, "failed"),
    ],
)
def test_a_bad_one_is_refused_before_it_is_needed(fallback: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"fallback must .*{words}"):
        GuardedFallback(fallback, RULES)


def test_what_it_does_to_its_arguments_changes_nothing() -> None:
    command = (0.5, 0.5)

    def overwriting(values: Any, _: Any) -> Any:
        values[:] = -1.0
        return values

    assert GuardedFallback(overwriting, RULES)(command, None) == [-1.0, -1.0]
    assert command == (0.5, 0.5)


def test_failing_later_is_none() -> None:
    answers: list[Any] = [None]

    def fallback(command: Any, _: Any) -> Any:
        answer = answers[0]
        return command if answer is None else answer()

    def too_slow() -> Any:
        time.sleep(0.02)
        return [0.0, 0.0]

    guarded = GuardedFallback(fallback, RULES)
    for answers[0] in (lambda: 1 / 0, too_slow, lambda: "text", lambda: [[0.0, 0.0]]):
        assert guarded((0.5, 0.5), None) is None
