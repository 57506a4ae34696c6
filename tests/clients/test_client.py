"""A call is answered, or fails with its type, before its deadline, whatever became of the server."""

import asyncio
import itertools
import math
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from lom_api.v1 import policy_pb2
from lom_client import (
    AsyncPolicyClient,
    ClientClosed,
    ClientConfig,
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    PolicyClient,
    PolicyError,
    PolicyNotFound,
    ServerUnavailable,
)
from tests.clients.conftest import AnyClient, Connect, threads
from tests.support.fake_policy_server import (
    BUNDLE_DIGEST,
    CONTRACT_HASH,
    PATIENCE_S,
    Context,
    FakePolicyServer,
    FakePolicyServerProcess,
    honest_act,
    late_act,
    never_act,
    refusing_act,
)
from tests.support.servers import wait_until

ROW = [0.1, 0.2, 0.3]
# What a busy machine may add to a deadline; every test's wrong outcome lies well beyond it.
SLACK_S = 1.0


@pytest.fixture
def client(any_client: AnyClient) -> AnyClient:
    return any_client


def answers(client: AnyClient) -> bool:
    try:
        client.act(ROW, deadline_s=0.5)
    except PolicyError:
        return False
    return True


def test_one_row_gets_one_action(client: AnyClient) -> None:
    answer = client.act(np.array(ROW), deadline_s=10)
    np.testing.assert_array_equal(answer.actions, np.array([0.1, 0.2], dtype=np.float32))
    assert answer.actions.dtype == np.float32
    assert answer.mode is not None
    assert answer.margin is not None
    assert (answer.variant, int(answer.mode), answer.mode.shape) == ("greedy_mode", 2, ())
    assert float(answer.margin) == pytest.approx(0.1)
    assert (answer.policy, answer.version, answer.bundle_digest) == ("toy", 1, BUNDLE_DIGEST)
    timings = answer.timings
    assert (timings.queue_s, timings.inference_s, timings.batch_rows) == pytest.approx((1e-6, 2e-6, 1))
    assert 0 < timings.round_trip_s < 10


def test_rows_get_their_own_actions_in_order(client: AnyClient) -> None:
    rows = np.random.default_rng(0).uniform(-2, 2, (7, 3))
    answer = client.act(rows, deadline_s=10)
    np.testing.assert_array_equal(answer.actions, np.clip(rows[:, :2].astype(np.float32), -1, 1))
    np.testing.assert_array_equal(answer.mode, rows.argmax(axis=1))
    assert answer.margin is not None
    assert answer.margin.shape == (7,)
    assert client.act(rows[:1], deadline_s=10).actions.shape == (1, 2)


def test_the_actor_chooses_no_mode(client: AnyClient) -> None:
    answer = client.act(ROW, deadline_s=10, variant="actor")
    assert (answer.variant, answer.mode, answer.margin) == ("actor", None, None)


def test_every_call_carries_contract_policy_variant_and_its_own_sequence(
    server: FakePolicyServer, client: AnyClient
) -> None:
    for _ in range(3):
        client.act(ROW, deadline_s=10)
    assert {(r.contract_hash, r.policy, r.variant) for r in server.requests} == {(CONTRACT_HASH, "toy", "greedy_mode")}
    assert len({request.sequence for request in server.requests}) == 3
    assert server.spec_requests == 1


@pytest.mark.parametrize("observation", [[math.nan, 0, 0], [0, 0, 0, 0], ["a", "b", "c"]])
def test_a_bad_observation_is_never_sent(server: FakePolicyServer, client: AnyClient, observation: Any) -> None:
    with pytest.raises(InvalidRequest):
        client.act(observation, deadline_s=10)
    assert server.requests == []


def test_an_unknown_variant_is_refused_with_the_known_ones(server: FakePolicyServer, client: AnyClient) -> None:
    with pytest.raises(InvalidRequest, match="greedy_mode, actor, got 'expert'") as caught:
        client.act(ROW, deadline_s=10, variant="expert")
    assert caught.value.reason == "UNKNOWN_VARIANT"
    assert server.requests == []


def test_an_unknown_policy_is_named_so(server: FakePolicyServer, connect: Connect) -> None:
    with connect(server.target, policy="other") as client, pytest.raises(PolicyNotFound):
        client.get_spec(deadline_s=10)


@pytest.mark.parametrize("deadline_s", [0, -1, math.nan, math.inf, -math.inf, 1e12, 3600.1])
def test_an_impossible_deadline_never_reaches_the_wire(
    server: FakePolicyServer, client: AnyClient, deadline_s: float
) -> None:
    with pytest.raises(ValueError, match="deadline_s"):
        client.act(ROW, deadline_s=deadline_s)
    with pytest.raises(ValueError, match="deadline_s"):
        client.get_spec(deadline_s=deadline_s)
    assert server.spec_requests == 0


@pytest.mark.parametrize("deadline_s", [1e-9, 1e-6])
def test_a_deadline_too_short_for_any_answer_gets_none(client: AnyClient, deadline_s: float) -> None:
    client.get_spec(deadline_s=10)
    with pytest.raises(DeadlineExceeded):
        client.act(ROW, deadline_s=deadline_s)


def test_a_server_that_never_answers_costs_the_deadline_and_learns_of_it(
    server: FakePolicyServer, client: AnyClient, kind: str
) -> None:
    client.get_spec(deadline_s=10)
    server.act = never_act
    began_at = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.act(ROW, deadline_s=0.3)
    assert 0.3 <= time.monotonic() - began_at < 0.3 + SLACK_S
    if "stream" in kind:  # which goes on: the request itself says when it is over
        assert 0 < server.requests[-1].budget_ns <= 0.3e9
    else:
        assert server.given_up.wait(PATIENCE_S)


def main_thread_waits_for_the_answer() -> bool:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return [call.f_code.co_name for call, _ in traceback.walk_stack(frame)][:3] == ["wait", "result", "_outcome"]


@pytest.mark.parametrize("kind", ["call"])
def test_a_call_that_is_interrupted_is_taken_back(server: FakePolicyServer, client: AnyClient) -> None:
    client.get_spec(deadline_s=10)

    def interrupt_and_never_answer(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        wait_until(main_thread_waits_for_the_answer, "the call to wait")
        os.kill(os.getpid(), signal.SIGINT)
        return never_act(request, context)

    server.act = interrupt_and_never_answer
    # A shell that starts the tests in the background has told them to ignore it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            client.act(ROW, deadline_s=60)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert server.given_up.wait(PATIENCE_S / 2)


def test_an_answer_after_the_deadline_is_no_answer(server: FakePolicyServer, client: AnyClient) -> None:
    client.get_spec(deadline_s=10)
    server.act = late_act(0.4)
    with pytest.raises(DeadlineExceeded):
        client.act(ROW, deadline_s=0.2)
    assert client.act(ROW, deadline_s=10).actions.shape == (2,)


def test_the_first_call_has_one_budget_for_spec_and_answer(server: FakePolicyServer, client: AnyClient) -> None:
    server.spec_delay_s = 1.4
    server.act = never_act
    began_at = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.act(ROW, deadline_s=1.5)
    assert server.spec_requests == 1
    assert time.monotonic() - began_at < 2 * 1.4  # a budget for each of the two would take 2.9 s


def test_a_refused_connection_fails_at_once(connect: Connect) -> None:
    with FakePolicyServer() as server:
        target = server.target
    with connect(target) as client:
        began_at = time.monotonic()
        with pytest.raises(ServerUnavailable):
            client.act(ROW, deadline_s=20)
        assert time.monotonic() - began_at < 10


def test_a_name_that_does_not_resolve_is_a_typed_failure(connect: Connect) -> None:
    with connect("grpc://robot.invalid:8001") as client, pytest.raises(PolicyError):
        client.act(ROW, deadline_s=3)


def test_a_peer_that_is_no_policy_server_is_a_typed_failure(connect: Connect) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with connect(f"grpc://127.0.0.1:{port}") as client, pytest.raises(PolicyError) as caught:
            client.act(ROW, deadline_s=10)
        assert caught.value.reason == "UNIMPLEMENTED"
    finally:
        server.stop(0).wait(PATIENCE_S)


def test_a_server_killed_in_mid_call_is_noticed_and_its_successor_found(connect: Connect) -> None:
    with FakePolicyServerProcess("never") as server, connect(server.target) as client:
        client.get_spec(deadline_s=10)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.act, ROW, deadline_s=30)
            server.wait_until_asked()
            server.kill()
            with pytest.raises(ServerUnavailable):
                call.result(PATIENCE_S / 2)
        with pytest.raises(ServerUnavailable):
            client.act(ROW, deadline_s=10)
        with FakePolicyServerProcess("honest", port=server.port):
            wait_until(lambda: answers(client), "an answer from the restarted server", patience_s=5)


def test_a_frozen_server_costs_the_deadline_and_is_found_dead_by_the_probe(connect: Connect) -> None:
    with FakePolicyServerProcess() as server, connect(server.target) as client:
        client.act(ROW, deadline_s=10)
        server.freeze()
        try:
            began_at = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                client.act(ROW, deadline_s=0.2)
            assert time.monotonic() - began_at < 0.2 + SLACK_S
            with pytest.raises(ServerUnavailable):  # without the probe: DeadlineExceeded after 15 s
                client.act(ROW, deadline_s=15)
        finally:
            server.thaw()
        wait_until(lambda: answers(client), "an answer from the thawed server", patience_s=10)


def test_a_successor_with_another_contract_is_refused_for_good(server: FakePolicyServer, client: AnyClient) -> None:
    client.act(ROW, deadline_s=10)
    server.act = refusing_act(grpc.StatusCode.FAILED_PRECONDITION, "CONTRACT_MISMATCH: expected x, got y")
    for _ in range(2):
        with pytest.raises(ContractMismatch):
            client.act(ROW, deadline_s=10)
    assert server.spec_requests == 1


def test_what_came_in_time_is_no_answer_to_who_looks_too_late() -> None:
    over_at = time.monotonic() - 1
    answer: Future[int] = Future()
    answer.set_result(1)
    with PolicyClient("grpc://127.0.0.1:8001") as client, pytest.raises(DeadlineExceeded):
        client._outcome(answer, over_at)

    async def look_too_late() -> None:
        async with AsyncPolicyClient("grpc://127.0.0.1:8001") as client:
            answer = asyncio.get_running_loop().create_future()
            looking = asyncio.create_task(client._outcome(answer, time.monotonic() + 0.05))
            await asyncio.sleep(0)
            answer.set_result(1)
            time.sleep(0.1)
            with pytest.raises(DeadlineExceeded):
                await looking

    asyncio.run(look_too_late())


def test_close_ends_calls_in_flight_and_later_ones(connect: Connect) -> None:
    before = threads()
    with FakePolicyServer() as server, connect(server.target) as client:
        client.act(ROW, deadline_s=10)
        server.act = never_act
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.act, ROW, deadline_s=30)
            wait_until(lambda: len(server.requests) == 2, "the call to arrive")
            client.close()
            with pytest.raises(ClientClosed):
                call.result(PATIENCE_S / 2)
        client.close()
        with pytest.raises(ClientClosed):
            client.act(ROW, deadline_s=10)
    wait_until(lambda: threads() <= before, "every thread to end")


def test_a_closed_client_that_never_called_says_so(connect: Connect) -> None:
    with connect("grpc://127.0.0.1:8001") as client:
        client.close()
        with pytest.raises(ClientClosed):
            client.act(ROW, deadline_s=10)


def test_threads_share_a_client_and_get_their_own_answers(server: FakePolicyServer, client: AnyClient) -> None:
    def act_often(thread: int) -> bool:
        rows = np.random.default_rng(thread).uniform(-1, 1, (50, 3)).astype(np.float32)
        return all(np.array_equal(client.act(row, deadline_s=20).actions, row[:2]) for row in rows)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(act_often, range(8)))
    assert len({request.sequence for request in server.requests}) == 8 * 50
    assert server.act is honest_act


def test_the_headers_of_a_trace_travel_along(server: FakePolicyServer, connect: Connect) -> None:
    calls = itertools.count()
    config = ClientConfig(trace_headers=lambda: {"traceparent": f"00-{next(calls):032x}-0000000000000001-01"})
    with connect(server.target, config=config) as client:
        for _ in range(3):
            client.act([0, 0, 0], deadline_s=10)
    # The call of number 0 asked for the specification.
    parents = [metadata["traceparent"] for metadata in server.metadata]
    assert parents[:1] == [f"00-{1:032x}-0000000000000001-01"]
    assert len(set(parents)) == len(parents)
