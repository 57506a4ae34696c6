"""An action every tick: in time, sound, honestly labelled, whatever the server, the observation or the clock does."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from lom_client import Actions, ControlLoop, PolicyClient, ServerUnavailable, Source
from tests.clients.hostile_replies import HOSTILE_REPLIES
from tests.support.fake_policy_server import (
    PATIENCE_S,
    FakePolicyServer,
    FakePolicyServerProcess,
    honest_act,
    late_act,
    never_act,
    refusing_act,
)
from tests.support.servers import wait_until

ROW = np.array([0.1, 0.2, 0.3])
SAFE = [0.0, -0.5]
BOUNDS = ([-1.0, -1.0], [1.0, 1.0])


@pytest.fixture
def loop(client: PolicyClient) -> Iterator[ControlLoop]:
    """A slow loop: its deadline is no obstacle to an honest server, however busy the machine."""
    with ControlLoop(client, period_s=10.0, safe_action=SAFE, hold_limit=2) as loop:
        yield loop


def assert_sound(values: np.ndarray) -> None:
    assert values.shape == (2,)
    assert np.isfinite(values).all()
    assert (np.abs(values) <= 1).all()


def test_an_honest_server_gives_fresh_actions(loop: ControlLoop) -> None:
    for _ in range(20):
        action = loop.step(ROW)
        assert (action.source, action.reason) == (Source.FRESH, "")
        np.testing.assert_array_equal(action.values, ROW[:2].astype(np.float32))
    assert (loop.counters.ticks, loop.counters.fresh) == (20, 20)


def test_holds_to_the_limit_then_is_safe_then_recovers(server: FakePolicyServer, loop: ControlLoop) -> None:
    loop.step(ROW)
    server.act = refusing_act(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL: full")
    actions = [loop.step(-ROW) for _ in range(4)]
    assert [action.source for action in actions] == ["hold", "hold", "safe", "safe"]
    assert {action.reason for action in actions} == {"QUEUE_FULL"}
    np.testing.assert_array_equal(actions[1].values, ROW[:2].astype(np.float32))
    np.testing.assert_array_equal(actions[2].values, SAFE)
    assert 0 < (actions[0].age_s or 0) < (actions[1].age_s or 0)
    server.act = honest_act
    assert loop.step(ROW).source is Source.FRESH
    counters = loop.counters
    assert (counters.ticks, counters.fresh, counters.held, counters.safe) == (6, 2, 2, 2)
    assert (counters.misses, counters.longest_miss_run) == ({"QUEUE_FULL": 4}, 4)


def test_no_hostile_reply_passes_and_none_raises(server: FakePolicyServer, loop: ControlLoop) -> None:
    for act, reason in HOSTILE_REPLIES.values():
        server.act = act
        action = loop.step(ROW)
        assert (action.source, action.reason) == (Source.SAFE, reason)
        np.testing.assert_array_equal(action.values, SAFE)


class Explosive:
    def __array__(self, *_args: object, **_kwargs: object) -> Any:
        raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("observation", "reason"),
    [
        (lambda: [np.nan, 0, 0], "NON_FINITE"),
        (lambda: [0, 0], "BAD_SHAPE"),
        (lambda: [[0, 0], [0]], "BAD_SHAPE"),
        (lambda: "text", "BAD_DTYPE"),
        (lambda: None, "BAD_DTYPE"),
        (Explosive, "BAD_SHAPE"),
        (lambda: np.zeros((2, 3)), "BAD_SHAPE"),
    ],
)
def test_no_observation_makes_a_step_raise(loop: ControlLoop, observation: Callable[[], Any], reason: str) -> None:
    action = loop.step(observation())
    assert (action.source, action.reason) == (Source.SAFE, reason)
    assert loop.step(ROW).source is Source.FRESH


def test_a_defect_of_the_client_costs_a_tick_and_not_the_worker(
    loop: ControlLoop, client: PolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.step(ROW)

    def broken(*_args: object, **_kwargs: object) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(client, "act", broken)
        assert loop.step(ROW).reason == "CLIENT_DEFECT"
    assert loop.step(ROW).source is Source.FRESH


def test_a_server_that_never_answers_costs_the_deadline_only(server: FakePolicyServer, client: PolicyClient) -> None:
    server.act = never_act
    with ControlLoop(client, period_s=0.1, safe_action=SAFE, deadline_s=0.03) as loop:
        for _ in range(20):
            began_at = time.monotonic()
            action = loop.step(ROW)
            assert time.monotonic() - began_at < 1.0  # the server would wait for 20 s
            assert (action.source, action.reason) == (Source.SAFE, "DEADLINE_EXCEEDED")
    assert server.most_at_once <= 2  # one under way, and one that the server has not yet heard was given up


def test_a_late_answer_is_never_fresh(server: FakePolicyServer, client: PolicyClient) -> None:
    client.get_spec(deadline_s=10)
    server.act = late_act(0.15)
    with ControlLoop(client, period_s=0.2, safe_action=SAFE, deadline_s=0.05) as loop:
        for step in range(10):
            action = loop.step(ROW + step / 100)
            assert action.source is not Source.FRESH
            assert_sound(action.values)


def test_a_loop_may_start_before_its_server() -> None:
    with FakePolicyServer() as server:
        port = server.port
    with PolicyClient(server.target) as client:
        with pytest.raises(ServerUnavailable):
            ControlLoop(client, period_s=10, safe_action=SAFE)
        with ControlLoop(client, period_s=10, safe_action=SAFE, action_bounds=BOUNDS) as loop:
            assert (loop.step(ROW).source, loop.step(ROW).reason) == (Source.SAFE, "UNAVAILABLE")
            with FakePolicyServer(port=port):
                wait_until(lambda: loop.step(ROW).source is Source.FRESH, "the server to be found", patience_s=10)


def test_bounds_given_to_the_loop_bind_the_policy_too(client: PolicyClient) -> None:
    narrow = ([-0.15, -1.0], [0.15, 1.0])
    with ControlLoop(client, period_s=10, safe_action=SAFE, action_bounds=narrow) as loop:
        assert loop.step([0.1, 0, 0]).source is Source.FRESH
        action = loop.step([0.2, 0, 0])
    assert (action.source, action.reason) == (Source.HOLD, "ACTION_OUT_OF_BOUNDS")


def test_a_frozen_and_a_killed_server_leave_the_loop_running() -> None:
    with (
        FakePolicyServerProcess() as server,
        PolicyClient(server.target) as client,
        ControlLoop(client, period_s=0.5, safe_action=SAFE, action_bounds=BOUNDS, hold_limit=1) as loop,
    ):
        wait_until(lambda: loop.step(ROW).source is Source.FRESH, "a first answer")
        server.freeze()
        sources = [loop.step(ROW).source for _ in range(3)]
        server.thaw()
        assert sources[-1] is Source.SAFE
        wait_until(lambda: loop.step(ROW).source is Source.FRESH, "an answer after the freeze")
        server.kill()
        wait_until(lambda: loop.step(ROW).reason == "UNAVAILABLE", "the kill to be noticed")
        with FakePolicyServerProcess(port=server.port):
            wait_until(lambda: loop.step(ROW).source is Source.FRESH, "the restarted server to be found")


def test_a_server_restarted_with_another_contract_moves_nothing(server: FakePolicyServer, loop: ControlLoop) -> None:
    loop.step(ROW)
    server.act = refusing_act(grpc.StatusCode.FAILED_PRECONDITION, "CONTRACT_MISMATCH: other spaces")
    actions = [loop.step(ROW) for _ in range(10)]
    assert {action.reason for action in actions} == {"CONTRACT_MISMATCH"}
    assert {action.source for action in actions[2:]} == {Source.SAFE}


def test_the_observation_belongs_to_the_caller_again_after_the_step(
    loop: ControlLoop, client: PolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    act = client.act

    def watched(observation: np.ndarray, **arguments: Any) -> Actions:
        seen.append(observation)
        return act(observation, **arguments)

    monkeypatch.setattr(client, "act", watched)
    buffer = ROW.copy()
    loop.step(buffer)
    np.testing.assert_array_equal(seen[0], buffer)
    assert not np.shares_memory(seen[0], buffer)


def test_a_client_that_overruns_its_deadline_does_not_hold_up_the_step(
    client: PolicyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def overrunning(*_args: object, **_kwargs: object) -> Any:
        over.wait(PATIENCE_S)
        raise ZeroDivisionError

    with ControlLoop(client, period_s=0.1, safe_action=SAFE) as loop:
        monkeypatch.setattr(client, "act", overrunning)
        began_at = time.monotonic()
        assert [loop.step(ROW).reason for _ in range(3)] == ["DEADLINE_EXCEEDED"] * 3
        assert time.monotonic() - began_at < PATIENCE_S / 4
        over.set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"safe_action": None}, "safe_action"),
        ({"safe_action": [0.0, 1.5]}, "ACTION_OUT_OF_BOUNDS"),
        ({"safe_action": [0.0]}, "BAD_SHAPE"),
        ({"safe_action": [0.0, np.nan]}, "NON_FINITE"),
        ({"period_s": 0.0}, "period_s"),
        ({"period_s": float("inf")}, "period_s"),
        ({"hold_limit": -1}, "hold_limit"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": 11.0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"action_bounds": ([1.0, 1.0], [-1.0, -1.0])}, "bounds"),
    ],
)
def test_a_wrong_configuration_is_refused_before_the_first_tick(
    client: PolicyClient, arguments: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ControlLoop(client, **({"period_s": 10.0, "safe_action": SAFE} | arguments))


def worker_lives() -> bool:
    return any(thread.name == "lom-control-loop" for thread in threading.enumerate())


def test_close_ends_the_worker_and_steps_still_answer(server: FakePolicyServer, client: PolicyClient) -> None:
    client.get_spec(deadline_s=10)
    server.act = never_act
    loop = ControlLoop(client, period_s=1.0, safe_action=SAFE, deadline_s=0.5)
    assert worker_lives()
    stepping = threading.Thread(target=loop.step, args=(ROW,))
    stepping.start()
    wait_until(lambda: bool(server.requests), "the request to arrive")
    loop.close()
    stepping.join(PATIENCE_S)
    assert not worker_lives()
    action = loop.step(ROW)
    assert (action.source, action.reason) == (Source.SAFE, "LOOP_CLOSED")
    assert list(loop.ticks()) == []
    loop.close()


def test_ticks_pace_the_loop_until_it_is_closed(client: PolicyClient) -> None:
    indices = []
    with ControlLoop(client, period_s=0.02, safe_action=SAFE) as loop:
        for tick in loop.ticks():
            indices.append(tick.index)
            assert_sound(loop.step(ROW).values)
            if len(indices) == 10:
                loop.close()
    assert indices == sorted(set(indices))
    assert len(indices) == 10
    assert loop.counters.ticks == 10
