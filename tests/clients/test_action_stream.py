"""One stream carries a robot's requests: each gets its own answer or failure, and what ends the stream ends no more."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, cast

import grpc
import numpy as np
import pytest

from lom_api.v1 import policy_pb2
from lom_client import BadReply, ClientConfig, DeadlineExceeded, Overloaded, PolicyClient, ServerUnavailable
from lom_client import action_stream as action_stream_module
from lom_client.action_stream import ActionStream, Method
from lom_client.async_transport import AsyncActionStream
from tests.clients.conftest import AnyClient, Connect, threads
from tests.support.fake_policy_server import (
    PATIENCE_S,
    Context,
    FakePolicyServer,
    honest_act,
    refusing_act,
)
from tests.support.servers import wait_until

ROW = [0.1, 0.2, 0.3]
ONE_ROW_LATER = [0.3, 0.2, 0.1]


@pytest.fixture(params=["stream", "async stream"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def client(any_client: AnyClient) -> AnyClient:
    any_client.get_spec(deadline_s=10)
    return any_client


def _first_number(client: AnyClient, row: list[float], deadline_s: float = 10) -> float:
    return float(client.act(row, deadline_s=deadline_s).actions[0])


def test_many_requests_share_one_stream_and_say_until_when_they_matter(
    server: FakePolicyServer, client: AnyClient
) -> None:
    for _ in range(20):
        assert _first_number(client, ROW, deadline_s=5) == np.float32(0.1)
    assert server.streams == 1
    assert [request.sequence for request in server.requests] == list(range(1, 21))
    assert all(0 < request.budget_ns <= 5e9 and request.supersede for request in server.requests)


def test_a_late_reply_is_nobodys(server: FakePolicyServer, client: AnyClient) -> None:
    client.act(ROW, deadline_s=10)
    given_up, answered = threading.Event(), threading.Event()

    def answer_the_first_one_late(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        if request.sequence == 2:
            assert given_up.wait(PATIENCE_S)
            answered.set()
        else:
            assert answered.wait(PATIENCE_S)  # so that the late reply leaves before this one
        return honest_act(request, context)

    server.act = answer_the_first_one_late
    with pytest.raises(DeadlineExceeded):
        client.act(ROW, deadline_s=0.5)
    assert len(server.requests) == 2
    given_up.set()
    assert _first_number(client, ONE_ROW_LATER) == np.float32(0.3)
    assert server.streams == 1


def test_answers_may_come_in_any_order(server: FakePolicyServer, client: AnyClient) -> None:
    second_is_answered = threading.Event()

    def answer_the_second_one_first(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        if request.sequence == 1:
            assert second_is_answered.wait(PATIENCE_S)
        return honest_act(request, context)

    server.act = answer_the_second_one_first
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_first_number, client, ROW)
        wait_until(lambda: len(server.requests) == 1, "the first request to arrive")
        assert _first_number(client, ONE_ROW_LATER) == np.float32(0.3)
        second_is_answered.set()
        assert first.result(PATIENCE_S) == np.float32(0.1)


def test_a_refusal_ends_its_request_and_not_the_stream(server: FakePolicyServer, client: AnyClient) -> None:
    server.act = refusing_act(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL: 64 rows wait; retry_after_ms 20")
    with pytest.raises(Overloaded) as caught:
        client.act(ROW, deadline_s=10)
    assert caught.value.retry_after_s == pytest.approx(0.02)
    server.act = honest_act
    assert _first_number(client, ROW) == np.float32(0.1)
    assert server.streams == 1


@pytest.mark.parametrize(
    ("message", "error_class", "reason"),
    [
        (policy_pb2.ActStreamReply(sequence=1), BadReply, "EMPTY_REPLY"),
        (policy_pb2.ActStreamReply(sequence=1, reply=policy_pb2.ActReply()), BadReply, "WRONG_SEQUENCE"),
        (
            policy_pb2.ActStreamReply(sequence=1, refusal=policy_pb2.Refusal(code=14, message="DRAINING: bye")),
            ServerUnavailable,
            "DRAINING",
        ),
    ],
)
def test_a_stream_reply_that_answers_nothing_is_a_typed_failure(
    server: FakePolicyServer,
    client: AnyClient,
    message: policy_pb2.ActStreamReply,
    error_class: type[Exception],
    reason: str,
) -> None:
    server.act = lambda *_: message.SerializeToString()
    with pytest.raises(error_class) as caught:
        client.act(ROW, deadline_s=10)
    assert getattr(caught.value, "reason", "") == reason


def test_replies_to_what_was_never_asked_are_dropped(server: FakePolicyServer, client: AnyClient) -> None:
    def reply_to_another(request: policy_pb2.ActRequest, context: Context) -> bytes:
        reply = honest_act(request, context)
        stray = policy_pb2.ActStreamReply(sequence=2**64 - 1, reply=reply)
        return stray.SerializeToString()

    server.act = reply_to_another
    with pytest.raises(DeadlineExceeded):
        client.act(ROW, deadline_s=0.2)
    server.act = honest_act
    assert _first_number(client, ROW) == np.float32(0.1)


def test_a_stream_that_ends_is_opened_anew_by_the_next_request(server: FakePolicyServer, client: AnyClient) -> None:
    def end_the_stream(request: policy_pb2.ActRequest, context: Context) -> bytes:
        server.end_stream()
        return b""

    server.act = end_the_stream
    with pytest.raises(ServerUnavailable) as caught:
        client.act(ROW, deadline_s=10)
    assert caught.value.reason == "STREAM_ENDED"
    server.act = honest_act
    assert _first_number(client, ROW) == np.float32(0.1)
    assert server.streams == 2


def test_a_stream_that_ended_leaves_no_thread(connect: Connect) -> None:
    before = threads()
    with FakePolicyServer() as server, connect(server.target) as client:
        client.act(ROW, deadline_s=10)
        server.end_stream()
        wait_until(lambda: server.open_streams == 0, "the stream to end")
    wait_until(lambda: threads() <= before, "every thread to end")


@pytest.mark.parametrize("limit", ["_LONGEST_IDLE_S", "_LONGEST_LIFE_S"])
def test_an_old_stream_is_left_before_the_server_ends_it(
    server: FakePolicyServer, client: AnyClient, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(action_stream_module, limit, 0.0)
    server.holds_streams = True
    for _ in range(3):
        assert _first_number(client, ROW) == np.float32(0.1)
    assert server.streams == 3
    wait_until(lambda: server.open_streams == 1, "the left streams to end")


def test_whoever_waits_on_a_stream_that_is_left_is_answered(
    server: FakePolicyServer, client: AnyClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(action_stream_module, "_LONGEST_LIFE_S", 0.0)
    server.holds_streams = True
    may_answer = threading.Event()

    def answer_later(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        if request.sequence == 1:
            assert may_answer.wait(PATIENCE_S)
        return honest_act(request, context)

    server.act = answer_later
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_first_number, client, ROW)
        wait_until(lambda: len(server.requests) == 1, "the first request to arrive")
        assert _first_number(client, ONE_ROW_LATER) == np.float32(0.3)
        assert server.open_streams == 2
        may_answer.set()
        assert first.result(PATIENCE_S) == np.float32(0.1)
    wait_until(lambda: server.open_streams == 1, "the left stream to end")


def test_the_first_request_of_a_stream_that_fails_at_once_fails_with_it() -> None:
    with FakePolicyServer() as server:
        client = PolicyClient(server.target, config=ClientConfig(use_stream=True))
        client.get_spec(deadline_s=10)
    with client:
        for _ in range(3):  # the second one finds the connection known to be lost
            with pytest.raises(ServerUnavailable):
                client.act(ROW, deadline_s=10)


class UnconnectedCall:
    """A stream that gets nowhere, as on a network that swallows packets."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self.requests = requests
        self._over = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        assert self._over.wait(PATIENCE_S)
        return iter(())

    def cancel(self) -> None:
        self._over.set()

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        return ""


def test_a_request_that_was_given_up_before_it_could_leave_is_not_sent() -> None:
    calls: list[UnconnectedCall] = []

    def method(requests: Iterator[bytes], *, metadata: Any) -> UnconnectedCall:
        calls.append(UnconnectedCall(requests))
        return calls[-1]

    stream = ActionStream(cast(Method, cast(Any, method)), lambda: ())
    answers = [stream.act(policy_pb2.ActRequest(), time.monotonic() + 60) for _ in range(3)]
    stream.act(policy_pb2.ActRequest(), time.monotonic() - 1)
    answers[0].cancel()
    answers[2].cancel()
    last = stream.act(policy_pb2.ActRequest(), time.monotonic() + 60)
    sent = [policy_pb2.ActRequest.FromString(next(calls[0].requests)).sequence for _ in range(2)]
    assert (sent, len(calls)) == ([2, 5], 1)
    calls[0].cancel()
    assert last.exception(PATIENCE_S) is not None


class AsyncUnconnectedCall:
    """The same for an event loop."""

    def __init__(self, requests: AsyncIterator[bytes]) -> None:
        self.requests = requests
        self._over = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        await self._over.wait()
        raise StopAsyncIteration

    def cancel(self) -> None:
        self._over.set()


async def test_on_an_event_loop_it_is_not_sent_either() -> None:
    calls: list[AsyncUnconnectedCall] = []

    def method(requests: AsyncIterator[bytes], *, metadata: Any) -> AsyncUnconnectedCall:
        calls.append(AsyncUnconnectedCall(requests))
        return calls[-1]

    stream = AsyncActionStream(cast(Any, method), lambda: ())
    now = time.monotonic()
    acts = [asyncio.create_task(stream.act(policy_pb2.ActRequest(), now + until_s)) for until_s in (60, 60, 60, -1, 60)]
    await asyncio.sleep(0)
    acts[0].cancel()
    acts[2].cancel()
    await asyncio.wait((acts[0], acts[2]))
    sent = [policy_pb2.ActRequest.FromString(await anext(calls[0].requests)).sequence for _ in range(2)]
    assert (sent, len(calls)) == ([2, 5], 1)
    calls[0].cancel()
    failures = await asyncio.gather(*acts, return_exceptions=True)
    assert type(failures[4]) is ServerUnavailable
