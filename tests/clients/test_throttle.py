"""Under overload a client asks about twice as often as it is answered, and not when it is asked not to."""

import random

import pytest

from lom_client.throttle import Throttle


def play(throttle: Throttle, *, share: float, seconds: float, begin: float = 0.0) -> tuple[int, int]:
    """Asked and answered, at 100 Hz of a server that answers `share` of what it could be asked."""
    asked = answered = 0
    rng = random.Random(7)
    for tick in range(int(seconds * 100)):
        now = begin + tick * 0.01
        if throttle.lets_ask(now):
            asked += 1
            if rng.random() < share:
                answered += 1
                throttle.was_answered()
            else:
                throttle.was_refused(now, None)
    return asked, answered


def test_a_server_that_answers_is_always_asked() -> None:
    assert play(Throttle(), share=1.0, seconds=20) == (2000, 2000)


def test_a_server_that_answers_half_is_always_asked() -> None:
    asked, _ = play(Throttle(random.Random(1).random), share=0.7, seconds=20)
    assert asked == 2000


@pytest.mark.parametrize("seed", range(5))
def test_tenfold_overload_is_asked_twice_as_often_as_it_answers(seed: int) -> None:
    chance = random.Random(seed).random
    # The server answers 10 of 100 wishes a second, whoever is refused.
    throttle = Throttle(chance)
    asked = answered = 0
    capacity = 0.0
    for tick in range(6000):
        capacity = min(1.0, capacity + 0.1)
        if throttle.lets_ask(tick * 0.01):
            asked += 1
            if capacity >= 1.0:
                capacity -= 1.0
                answered += 1
                throttle.was_answered()
            else:
                throttle.was_refused(tick * 0.01, None)
    assert answered > 200
    assert asked <= 2.3 * answered


def test_a_server_that_recovers_is_asked_again() -> None:
    throttle = Throttle(random.Random(3).random)
    play(throttle, share=0.0, seconds=30)
    play(throttle, share=1.0, seconds=15, begin=30.0)
    assert play(throttle, share=1.0, seconds=5, begin=45.0) == (500, 500)


def test_the_servers_wish_is_kept() -> None:
    throttle = Throttle(lambda: 0.999)
    assert throttle.lets_ask(10.0)
    throttle.was_refused(10.0, 0.25)
    assert [throttle.lets_ask(now) for now in (10.0, 10.2, 10.2499, 10.25)] == [False, False, False, True]
