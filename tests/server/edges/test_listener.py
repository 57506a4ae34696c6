"""`lom_server.edges.listener` through real sockets, in front of handlers that a test has in its hand."""

import asyncio
import os
import re
import socket
import stat
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_server.config import ServerConfig
from lom_server.edges.authentication import Role
from lom_server.edges.listener import MOST_RATES, Call, Listener, ListenerLimits, RequestRate
from lom_server.errors import PolicyError, StartError

PATIENCE_S = 20.0
SAY = "/test.Echo/Say"
HOLD = "/test.Echo/Hold"
TALK = "/test.Echo/Talk"
FLOOD = "/test.Echo/Flood"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
EOF = grpc.aio.EOF
CLEAN_MESSAGE = re.compile(r"[A-Z][A-Z_]+: [ -~]{1,250}")


class Echo:
    """A service that answers what it is sent.

    Attributes:
        gate: `Hold` waits for it, and so does `Talk` where it is told to wait.
        calls: of `Say`, `Hold` and `Talk`.
        said: every message of those.
        given_up: handlers that were cancelled.
        error: what `Say` and `Talk` raise, if anything.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.calls: list[Call] = []
        self.said: list[bytes] = []
        self.given_up = 0
        self.error: Exception | None = None

    def add_to(self, listener: Listener, *, name: str = "test.Echo", role: Role = Role.ACT) -> None:
        listener.add_service(
            name,
            unary={"Say": self.say, "Hold": self.hold},
            streams={"Talk": self.talk, "Flood": self.flood},
            role=role,
        )

    async def say(self, message: bytes, call: Call) -> bytes:
        self.calls.append(call)
        self.said.append(message)
        if self.error is not None:
            raise self.error
        return message

    async def hold(self, message: bytes, call: Call) -> bytes:
        self.calls.append(call)
        self.said.append(message)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return message

    async def talk(self, messages: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        """Answers each message with the time that it is granted; then raises what ended them."""
        self.calls.append(call)
        async for message in messages:
            self.said.append(message)
            if self.error is not None:
                raise self.error
            if message == b"wait":
                await self.gate.wait()
            yield b"%s %d" % (message, call.admit(int(message) if message.isdigit() else 0) - time.monotonic_ns())

    async def flood(self, messages: AsyncIterator[bytes], _: Call) -> AsyncIterator[bytes]:
        """Answers the first message without end."""
        async for message in messages:
            try:
                while True:
                    self.said.append(message)
                    yield message
            finally:
                self.given_up += 1


def limits(**changes: Any) -> ListenerLimits:
    return replace(ListenerLimits.of(ServerConfig(models=Path("unused"))), **changes)


@asynccontextmanager
async def listening(
    echo: Echo | None = None,
    address: str = "127.0.0.1:0",
    *,
    share_port: bool = False,
    observe_refusal: Callable[[Reason], None] = lambda _: None,
    **changes: Any,
) -> AsyncIterator[tuple[Listener, str]]:
    listener = Listener(limits(**changes), observe_refusal=observe_refusal)
    (echo or Echo()).add_to(listener)
    try:
        yield listener, await listener.listen(address, share_port=share_port)
    finally:
        await listener.drain(0)


def connected(address: str, **options: int) -> Any:
    """A channel with a connection of its own; untyped, as it sends raw bytes."""
    arguments = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{name}", value) for name, value in options.items())]
    return grpc.aio.insecure_channel(address, arguments)


async def refusal(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def read_on(stream: Any) -> None:
    while await stream.read() is not EOF:
        pass


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        await asyncio.sleep(0.002)


def details_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    trailers = dict(error.trailing_metadata() or ())
    return status_pb2.Status.FromString(trailers["grpc-status-details-bin"])


# What reaches a handler.


async def test_bytes_reach_the_handler_and_come_back() -> None:
    echo = Echo()
    async with listening(echo) as (_, address), connected(address) as channel:
        assert await channel.unary_unary(SAY)(b"\xff\0", timeout=PATIENCE_S) == b"\xff\0"
        assert await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S) == b""
        assert [call.client == echo.calls[0].client for call in echo.calls] == [True, True]
        async with connected(address) as other:
            await other.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        assert echo.calls[2].client != echo.calls[0].client


@pytest.mark.parametrize(("timeout_s", "granted_s"), [(None, 1.0), (600.0, 10.0), (5.0, 5.0)])
async def test_deadlines_are_clamped_and_say_so(timeout_s: float | None, granted_s: float) -> None:
    echo = Echo()
    async with listening(echo) as (_, address), connected(address) as channel:
        before_ns = time.monotonic_ns()
        call = channel.unary_unary(SAY)(b"", timeout=timeout_s)
        await call
        after_ns = time.monotonic_ns()
        is_clamped = timeout_s != granted_s
        assert (("x-deadline-clamped", "1") in tuple(await call.trailing_metadata())) is is_clamped
        deadline_ns = echo.calls[0].deadline_ns - granted_s * 1e9
        assert before_ns - 10e6 <= deadline_ns <= after_ns + 10e6  # gRPC rounds deadlines to milliseconds
        asked_ns = echo.calls[0].admit(10**6) - time.monotonic_ns()
        assert asked_ns <= 10**6  # a budget shortens the deadline
        # ... and never lengthens it; some of it is kept for the way back.
        assert echo.calls[0].deadline_ns - 5 * 10**6 <= echo.calls[0].admit(10**15) < echo.calls[0].deadline_ns


async def test_a_clamped_deadline_frees_the_slot() -> None:
    """The caller's own deadline is gRPC's to enforce; the one that the server chose is nobody else's."""
    echo = Echo()
    async with listening(echo, default_deadline_s=0.05) as (listener, address), connected(address) as channel:
        error = await refusal(channel.unary_unary(HOLD)(b""))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert str(error.details()).startswith("DEADLINE_EXCEEDED: ")
        assert echo.given_up == 1
        assert await listener.drain(PATIENCE_S)


async def test_a_message_that_does_not_come_frees_the_slot() -> None:
    echo = Echo()
    async with (
        listening(echo, default_deadline_s=1, max_concurrent_calls=3) as (_, address),
        connected(address) as channel,
        connected(address) as other,
    ):
        refused = False
        while not refused:
            half_open = [channel.stream_unary(SAY)() for _ in range(3)]
            # A machine that stalls for a second lets their time pass before a call could find the slots taken.
            while not (refused or all(call.done() for call in half_open)):
                refused = await code_of(other.unary_unary(SAY)(b"x", timeout=PATIENCE_S)) is not grpc.StatusCode.OK
        for call in half_open:
            assert await code_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await code_of(other.unary_unary(SAY)(b"x", timeout=PATIENCE_S)) is grpc.StatusCode.OK
        assert set(echo.said) == {b"x"}


async def test_a_call_without_a_message_is_answered_and_of_two_the_first(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as (_, address), connected(address) as channel:
        none = channel.stream_unary(SAY)(timeout=PATIENCE_S)
        await none.done_writing()
        error = await refusal(none)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert error.details() == "UNSUPPORTED: expected exactly one message, got none"
        assert await channel.stream_unary(SAY)(iter([b"1", b"2"]), timeout=PATIENCE_S) == b"1"
    assert not caplog.records


async def test_messages_that_come_too_late_are_freed(caplog: pytest.LogCaptureFixture) -> None:
    """They arrive in what a handler began to read before it gave up."""
    message = bytes(20_000)

    async def forget(_message: bytes, _call: Call) -> bytes:
        return b""

    async def send_late(channel: Any, number: int) -> None:
        call = channel.stream_unary("/test.Oblivion/Forget")()
        await asyncio.sleep(0.005 + 0.001 * (number % 10))
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(message)
        await code_of(call)

    async def resident_bytes_after_many(channel: Any) -> int:
        for _ in range(40):
            await asyncio.gather(*(send_late(channel, number) for number in range(15)))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    listener = Listener(limits(default_deadline_s=0.01))
    listener.add_service("test.Oblivion", unary={"Forget": forget}, role=Role.ACT)
    async with connected(await listener.listen("127.0.0.1:0")) as channel:
        before = await resident_bytes_after_many(channel)
        assert await resident_bytes_after_many(channel) - before < 60 * len(message)
    await listener.drain(0)
    assert not caplog.records


async def test_calls_that_end_when_their_callers_go_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    echo = Echo()
    async with listening(echo) as (_, address), connected(address) as channel:
        for number in range(200):
            await code_of(channel.unary_unary(HOLD)(b"", timeout=0.0001 * (number % 50)))
        echo.gate.set()
        await code_of(channel.unary_unary(SAY)(b"", timeout=PATIENCE_S))
    assert not caplog.records


async def test_a_timeout_of_the_handlers_own_is_not_the_deadline() -> None:
    echo = Echo()
    echo.error = TimeoutError()
    async with listening(echo) as (_, address), connected(address) as channel:
        assert (await refusal(channel.unary_unary(SAY)(b"", timeout=5))).code() is grpc.StatusCode.INTERNAL


def test_a_deadline_that_is_over_on_arrival_runs_nothing() -> None:
    """The server's event loop is held while the call's whole time passes."""
    said: list[bytes] = []
    is_held, release = threading.Event(), threading.Event()

    async def say(message: bytes, _: Call) -> bytes:
        said.append(message)
        return message

    async def hold_loop(message: bytes, _: Call) -> bytes:
        is_held.set()
        release.wait(PATIENCE_S)
        return message

    def build() -> Listener:
        listener = Listener(limits())
        listener.add_service("test.Echo", unary={"Say": say, "HoldLoop": hold_loop}, role=Role.ACT)
        return listener

    with in_a_thread(build) as address, grpc.insecure_channel(address) as untyped:
        channel: Any = untyped
        channel.unary_unary(SAY)(b"first", timeout=PATIENCE_S)
        holding = channel.unary_unary("/test.Echo/HoldLoop").future(b"", timeout=PATIENCE_S)
        assert is_held.wait(PATIENCE_S)
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as error:
                channel.unary_unary(SAY)(b"late", timeout=0.01)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        release.set()
        holding.result(PATIENCE_S)
        channel.unary_unary(SAY)(b"last", timeout=PATIENCE_S)
    assert said == [b"first", b"last"]


@contextmanager
def in_a_thread(build: Callable[[], Listener]) -> Iterator[str]:
    """The address of a listener whose event loop runs beside the test, for clients that block."""
    addresses: list[str] = []
    is_listening, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        listener = build()
        addresses.append(await listener.listen("127.0.0.1:0"))
        is_listening.set()
        await asyncio.to_thread(is_over.wait)
        await listener.drain(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert is_listening.wait(PATIENCE_S)
    try:
        yield addresses[0]
    finally:
        is_over.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


# What gRPC refuses for us, if it is told to.


LIBRARY_REFUSALS: Mapping[str, tuple[str, bytes, Mapping[str, Any], grpc.StatusCode, str]] = {
    "message over the cap": (
        SAY, bytes(65537), {}, grpc.StatusCode.RESOURCE_EXHAUSTED, r".*message larger than max.*",
    ),
    "gzip": (
        SAY, b"", {"compression": grpc.Compression.Gzip}, grpc.StatusCode.UNIMPLEMENTED,
        r"Compression algorithm 'gzip' is disabled\.",
    ),
    "unknown method": ("/test.Echo/Load", b"", {}, grpc.StatusCode.UNIMPLEMENTED, "Method not found!"),
    "unknown service": ("/test.Other/Say", b"", {}, grpc.StatusCode.UNIMPLEMENTED, "Method not found!"),
    "reflection": (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"", {}, grpc.StatusCode.UNIMPLEMENTED,
        "Method not found!",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIBRARY_REFUSALS)
async def test_what_the_library_refuses(name: str, caplog: pytest.LogCaptureFixture) -> None:
    method, message, options, code, text = LIBRARY_REFUSALS[name]
    async with listening(max_message_bytes=65536) as (_, address), connected(address) as channel:
        for _ in range(3):
            error = await refusal(channel.unary_unary(method)(message, timeout=PATIENCE_S, **options))
            assert error.code() is code
            assert re.fullmatch(text, str(error.details()), re.IGNORECASE | re.DOTALL), error.details()
        assert len(await channel.unary_unary(SAY)(bytes(65536), timeout=PATIENCE_S)) == 65536
    assert not caplog.records


@pytest.mark.parametrize("limit", [1024, 8192])
async def test_metadata_over_the_cap_is_refused_every_time(limit: int) -> None:
    async with listening(max_metadata_bytes=limit) as (_, address), connected(address) as channel:
        await channel.unary_unary(SAY)(
            b"", metadata=(("x", "y" * (limit // 4)),), timeout=PATIENCE_S
        )  # gRPC's own headers take about 550
        for _ in range(12):  # with gRPC's own hard limit, about half of these would pass
            call = channel.unary_unary(SAY)(b"", metadata=(("x", "y" * (limit * 3 // 2)),), timeout=PATIENCE_S)
            error = await refusal(call)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "metadata size exceeds" in str(error.details())


async def test_a_silent_connection_is_closed() -> None:
    async with listening(handshake_timeout_s=0.3) as (_, address):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        await asyncio.wait_for(reader.read(), PATIENCE_S)  # the server's settings, then the end
        writer.close()


NOT_GRPC: Mapping[str, bytes] = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "random bytes": bytes(range(256)) * 4,
    "TLS": bytes.fromhex("1603010005010000010303"),
    "HTTP/2 preface and rubbish": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
}


@pytest.mark.parametrize("name", NOT_GRPC)
async def test_what_is_not_grpc_is_closed_and_not_talked_about(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    async with listening(handshake_timeout_s=1.0) as (_, address), connected(address) as channel:
        for _ in range(10):
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(NOT_GRPC[name])
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
            assert b"HTTP/1.1 200" not in answer
            writer.close()
        assert await channel.unary_unary(SAY)(b"x", timeout=PATIENCE_S) == b"x"
    assert len(capfd.readouterr().err.splitlines()) <= 10


async def test_connections_are_bounded() -> None:
    async with listening(max_connections=2) as (_, address), connected(address) as first, connected(address) as second:
        for channel in (first, second):
            await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        reader, writer = await asyncio.open_connection(*address.split(":"))
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()
        await first.unary_unary(SAY)(b"", timeout=PATIENCE_S)


async def test_streams_of_a_connection_are_bounded() -> None:
    echo = Echo()
    async with listening(echo, max_streams_per_connection=2) as (_, address), connected(address) as channel:
        held = [channel.unary_unary(HOLD)(b"%d" % number, timeout=PATIENCE_S) for number in range(3)]
        await until(lambda: len(echo.said) == 2, "two to be taken up")
        async with connected(address) as other:
            await other.unary_unary(SAY)(b"other", timeout=PATIENCE_S)
        assert len(echo.said) == 3  # the third of the first connection waits at its client
        echo.gate.set()
        await asyncio.gather(*held)
        assert sorted(echo.said) == [b"0", b"1", b"2", b"other"]


async def test_an_idle_connection_is_closed_and_comes_back() -> None:
    echo = Echo()
    async with listening(echo, max_connection_idle_s=0.2) as (_, address), connected(address) as channel:
        await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        state = channel.get_state()
        while state is not grpc.ChannelConnectivity.IDLE:
            await asyncio.wait_for(channel.wait_for_state_change(state), PATIENCE_S)
            state = channel.get_state()
        await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        assert echo.calls[0].client != echo.calls[1].client


async def test_no_call_is_lost_when_connections_are_renewed() -> None:
    echo = Echo()
    async with listening(echo, max_connection_age_s=0.1) as (_, address), connected(address) as channel:
        while len({call.client for call in echo.calls}) < 10:
            assert await channel.unary_unary(SAY)(b"x", timeout=PATIENCE_S) == b"x"
            await asyncio.sleep(0.005)


async def test_a_call_outlives_its_connections_age() -> None:
    echo = Echo()
    async with listening(echo, max_connection_age_s=0.05) as (_, address), connected(address) as channel:
        held = channel.unary_unary(HOLD)(b"held", timeout=PATIENCE_S)
        await until(lambda: echo.said == [b"held"], "the call to be taken up")
        while len({call.client for call in echo.calls}) < 4:
            await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        echo.gate.set()
        assert await held == b"held"


async def test_an_idle_client_may_ping_twice_a_second() -> None:
    """By default a server closes such a connection (too_many_pings), after the third ping."""
    echo = Echo()
    options = {
        "keepalive_time_ms": 600,
        "keepalive_timeout_ms": 2000,
        "keepalive_permit_without_calls": 1,
        "http2.max_pings_without_data": 0,
    }
    async with listening(echo) as (_, address), connected(address, **options) as channel:
        await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        await asyncio.sleep(3.5)  # what must not happen has no condition to wait for
        await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        assert echo.calls[0].client == echo.calls[1].client


# What the listener refuses.


async def test_calls_under_way_are_bounded_and_health_answers_all_the_same() -> None:
    echo = Echo()
    refused: list[Reason] = []
    async with listening(echo, max_concurrent_calls=2, observe_refusal=refused.append) as (listener, address):
        await listener.set_serving("", True)
        async with connected(address) as channel:
            held = [channel.unary_unary(HOLD)(b"", timeout=PATIENCE_S) for _ in range(2)]
            await until(lambda: len(echo.said) == 2, "both to be taken up")
            error = await refusal(channel.unary_unary(SAY)(b"", timeout=PATIENCE_S))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert str(error.details()).startswith("TOO_MANY_CALLS: expected at most 2 calls")
            stream = channel.stream_stream(TALK)(timeout=PATIENCE_S)
            error = await refusal(stream.read())
            assert str(error.details()).startswith("TOO_MANY_CALLS: ")
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert (await check).status == SERVING
            echo.gate.set()
            await asyncio.gather(*held)
            assert await channel.unary_unary(SAY)(b"x", timeout=PATIENCE_S) == b"x"
            assert refused == [Reason.TOO_MANY_CALLS, Reason.TOO_MANY_CALLS]


async def test_a_client_may_make_so_many_requests_a_second() -> None:
    refused: list[Reason] = []
    async with (
        listening(max_requests_per_s=2, observe_refusal=refused.append) as (_, address),
        connected(address) as channel,
        connected(address) as other,
    ):
        for _ in range(2):
            await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        error = await refusal(channel.unary_unary(SAY)(b"", timeout=PATIENCE_S))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(error.details()).startswith("RATE_LIMITED: expected at most 2 requests per second; retry_after_")
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        details = details_of(error).details
        assert details[0].Unpack(info)
        assert details[1].Unpack(retry)
        assert info.reason == "RATE_LIMITED"
        assert 1 <= retry.retry_delay.ToMilliseconds() <= 500
        await other.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        await asyncio.sleep(retry.retry_delay.ToMilliseconds() / 1000)
        await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
        assert refused == [Reason.RATE_LIMITED]


async def test_a_stream_is_charged_for_each_request() -> None:
    async with listening(max_requests_per_s=2) as (_, address), connected(address) as channel:
        stream = channel.stream_stream(TALK)(timeout=PATIENCE_S)  # opening it is the first
        await stream.write(b"1")
        assert await stream.read() is not EOF
        await stream.write(b"2")
        error = await refusal(stream.read())
        assert str(error.details()).startswith("RATE_LIMITED: ")


def test_the_rate_by_hand() -> None:
    now = 100.0
    rate = RequestRate(4, clock=lambda: now)
    assert [rate.charge("a") for _ in range(4)] == [0, 0, 0, 0]
    assert rate.charge("a") == 0.25
    assert rate.charge("b") == 0
    now += 0.1
    assert rate.charge("a") == pytest.approx(0.15)
    now += 0.15
    assert rate.charge("a") == pytest.approx(0, abs=1e-12)
    now += 100
    assert [rate.charge("a") for _ in range(4)] == [0, 0, 0, 0]
    assert rate.charge("a") == 0.25
    slow = RequestRate(0.5, clock=lambda: now)
    assert [slow.charge("a"), slow.charge("a")] == [0, 2]
    free = RequestRate(0)
    assert [free.charge("a") for _ in range(1000)] == [0] * 1000


def test_the_rate_remembers_the_last_clients_only() -> None:
    rate = RequestRate(4, clock=lambda: 0.0)
    for number in range(MOST_RATES):
        assert [rate.charge(str(number)) for _ in range(3)] == [0, 0, 0]
    assert rate.charge("0") == 0
    assert rate.charge("one more") == 0
    assert rate.charge("0") == 0.25
    assert [rate.charge("1") for _ in range(4)] == [0, 0, 0, 0]  # forgotten in its place


async def test_a_defect_of_a_handler_is_internal_without_a_word_of_it() -> None:
    echo = Echo()
    echo.error = KeyError("/secret/path\n")
    async with listening(echo) as (_, address), connected(address) as channel:
        stream = channel.stream_stream(TALK)(timeout=PATIENCE_S)
        await stream.write(b"x")
        for call in (channel.unary_unary(SAY)(b"", timeout=PATIENCE_S), stream.read()):
            error = await refusal(call)
            assert error.code() is grpc.StatusCode.INTERNAL
            message = str(error.details())
            assert CLEAN_MESSAGE.fullmatch(message)
            assert message.startswith("INTERNAL_ERROR: the request could not be answered, id ")
            assert "secret" not in message


async def test_a_refusal_of_a_handler_is_its_status() -> None:
    echo = Echo()
    echo.error = PolicyError(Reason.QUEUE_FULL, "no room", retry_after_ms=7)
    async with listening(echo) as (_, address), connected(address) as channel:
        error = await refusal(channel.unary_unary(SAY)(b""))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "QUEUE_FULL: no room; retry_after_ms 7"
        assert details_of(error).message == error.details()
        assert ("x-deadline-clamped", "1") in tuple(error.trailing_metadata() or ())  # beside the details, not instead


async def test_a_cancelled_call_is_cancelled_in_its_handler() -> None:
    echo = Echo()
    async with listening(echo) as (listener, address), connected(address) as channel:
        call = channel.unary_unary(HOLD)(b"", timeout=PATIENCE_S)
        await until(lambda: len(echo.said) == 1, "the call to be taken up")
        call.cancel()
        await until(lambda: echo.given_up == 1, "the handler to be cancelled")
        assert await listener.drain(PATIENCE_S)


# Streams.


async def test_a_stream_is_granted_time_by_request() -> None:
    async with listening(default_deadline_s=2, max_deadline_s=4) as (listener, address), connected(address) as channel:
        stream = channel.stream_stream(TALK)()
        granted = {}
        for asked_ns in (0, 10**9, 3 * 10**9, 60 * 10**9):
            await stream.write(b"%d" % asked_ns)
            granted[asked_ns] = int((await stream.read()).split()[1])
        assert listener.open_streams == 1
        await stream.done_writing()
        assert await stream.read() is EOF
        await until(lambda: listener.open_streams == 0, "the stream to end")
        expected = {0: 2 * 10**9, 10**9: 10**9, 3 * 10**9: 3 * 10**9, 60 * 10**9: 4 * 10**9}
        for asked_ns, granted_ns in granted.items():
            assert expected[asked_ns] - 10**8 < granted_ns <= expected[asked_ns]


async def test_a_request_is_not_granted_more_than_its_streams_own_deadline() -> None:
    echo = Echo()
    async with listening(echo) as (_, address), connected(address) as channel:
        stream = channel.stream_stream(TALK)(timeout=0.5)
        await stream.write(b"%d" % 10**9)
        assert int((await stream.read()).split()[1]) < 0.6e9
        assert (await refusal(stream.read())).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_idle_stream_is_ended() -> None:
    refused: list[Reason] = []
    async with (
        listening(stream_idle_s=0.2, observe_refusal=refused.append) as (listener, address),
        connected(address) as channel,
    ):
        stream = channel.stream_stream(TALK)(timeout=PATIENCE_S)
        for _ in range(4):  # 0.4 s in all: it is idleness that counts, not age
            await stream.write(b"x")
            assert await stream.read() is not EOF
            await asyncio.sleep(0.1)
        error = await refusal(stream.read())
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert error.details() == "STREAM_IDLE: expected a request within 0.2 s"
        assert refused == [Reason.STREAM_IDLE]
        assert await listener.drain(PATIENCE_S)


async def test_a_slow_reader_is_ended_and_delays_nobody() -> None:
    refused: list[Reason] = []
    echo = Echo()
    async with (
        listening(echo, slow_reader_s=0.3, observe_refusal=refused.append) as (listener, address),
        connected(address) as channel,
        connected(address) as other,
    ):
        stream = channel.stream_stream(FLOOD)(timeout=PATIENCE_S)
        await stream.write(bytes(50_000))
        answered = 0
        while not refused:
            await other.unary_unary(SAY)(b"x", timeout=PATIENCE_S)
            answered += 1
        assert answered > 10
        assert echo.given_up == 1
        assert refused == [Reason.SLOW_CONSUMER]
        assert listener.open_streams == 0
        error = await refusal(read_on(stream))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "SLOW_CONSUMER: expected replies to be read within 0.3 s"


async def test_a_stream_whose_caller_has_gone_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    echo = Echo()
    async with listening(echo) as (listener, address):
        for number in range(30):  # a write may find out before gRPC says so
            async with connected(address) as channel:
                streams = [channel.stream_stream(FLOOD)(timeout=PATIENCE_S) for _ in range(5)]
                for stream in streams:
                    await stream.write(b"x")
                    assert await stream.read() == b"x"
                if number % 2:
                    for stream in streams:
                        stream.cancel()
            await until(lambda: listener.open_streams == 0, "the streams to end")
            assert echo.given_up == 5 * (number + 1)
    assert not caplog.records


# Health.


def health_of(channel: Any) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def checked(name: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


async def test_health_is_by_name() -> None:
    async with listening() as (listener, address), connected(address) as channel:
        health = health_of(channel)
        assert (await health.Check(checked(), timeout=PATIENCE_S)).status == NOT_SERVING
        await listener.set_serving("toy", True)
        assert (await health.Check(checked("toy"), timeout=PATIENCE_S)).status == SERVING
        assert (await health.Check(checked(), timeout=PATIENCE_S)).status == NOT_SERVING
        await listener.set_serving("toy", False)
        assert (await health.Check(checked("toy"), timeout=PATIENCE_S)).status == NOT_SERVING
        assert (await refusal(health.Check(checked("other")))).code() is grpc.StatusCode.NOT_FOUND


async def test_watchers_of_a_name_are_told_whoever_else_leaves() -> None:
    async with listening() as (listener, address), connected(address) as channel:
        leaves, stays = (health_of(channel).Watch(checked("toy"), timeout=PATIENCE_S) for _ in range(2))
        assert (await leaves.read()).status == (await stays.read()).status == SERVICE_UNKNOWN
        await listener.set_serving("toy", True)
        assert (await leaves.read()).status == (await stays.read()).status == SERVING
        leaves.cancel()
        await asyncio.sleep(0.1)  # until the server knows: it has nothing to show for it
        await listener.set_serving("toy", True)  # no change, no message
        await health_of(channel).Check(checked("toy"), timeout=PATIENCE_S)
        await listener.set_serving("toy", False)
        assert (await stays.read()).status == NOT_SERVING


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_health_requests_that_are_none(method: str) -> None:
    async with listening() as (_, address), connected(address) as channel:
        path = f"/grpc.health.v1.Health/{method}"
        call = (
            channel.unary_unary(path)(b"\xff\xff") if method == "Check" else channel.unary_stream(path)(b"\xff").read()
        )
        error = await refusal(call)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert error.details() == "BAD_MESSAGE: expected a grpc.health.v1.HealthCheckRequest message"


# Drain.


async def test_a_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    echo = Echo()
    refused: list[Reason] = []
    async with listening(echo, observe_refusal=refused.append) as (listener, address), connected(address) as channel:
        await listener.set_serving("", True)
        watch = health_of(channel).Watch(checked(), timeout=PATIENCE_S)
        assert (await watch.read()).status == SERVING
        accepted = [channel.unary_unary(HOLD)(b"%d" % number, timeout=PATIENCE_S) for number in range(20)]
        await until(lambda: len(echo.said) == 20, "all twenty to be accepted")
        draining = asyncio.create_task(listener.drain(PATIENCE_S))
        assert (await watch.read()).status == NOT_SERVING
        await listener.set_serving("", True)
        assert (await health_of(channel).Check(checked(), timeout=PATIENCE_S)).status == NOT_SERVING
        error = await refusal(channel.unary_unary(SAY)(b"", timeout=PATIENCE_S))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert str(error.details()).startswith("DRAINING: ")
        assert refused == [Reason.DRAINING]
        assert not draining.done()
        echo.gate.set()
        assert [await call for call in accepted] == [b"%d" % number for number in range(20)]
        assert await draining


async def test_a_drain_past_its_grace_says_so() -> None:
    echo = Echo()
    async with listening(echo) as (listener, address), connected(address) as channel:
        call = channel.unary_unary(HOLD)(b"", timeout=PATIENCE_S)
        await until(lambda: len(echo.said) == 1, "the call to be taken up")
        assert not await listener.drain(0.05)
        assert (await refusal(call)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_drain_waits_for_the_last() -> None:
    echo = Echo()
    async with listening(echo) as (listener, address), connected(address) as channel:
        last = channel.unary_unary(HOLD)(b"", timeout=PATIENCE_S)
        await until(lambda: len(echo.said) == 1, "the call to be taken up")
        waiting = channel.stream_stream(TALK)(timeout=PATIENCE_S)
        await waiting.write(b"x")
        assert await waiting.read() is not EOF
        draining = asyncio.create_task(listener.drain(PATIENCE_S))
        await refusal(waiting.read())  # the first of the two has ended
        await asyncio.sleep(0.5)  # what must not happen has no condition to wait for
        echo.gate.set()
        await last
        assert await draining


async def test_a_drain_ends_streams_that_wait_for_a_request() -> None:
    async with listening(stream_idle_s=3600) as (listener, address), connected(address) as channel:
        stream = channel.stream_stream(TALK)(timeout=PATIENCE_S)
        await stream.write(b"x")
        assert await stream.read() is not EOF
        draining = asyncio.create_task(listener.drain(PATIENCE_S))
        error = await refusal(stream.read())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert str(error.details()).startswith("DRAINING: ")
        assert await draining


async def test_a_drain_ends_streams_whatever_else_they_were_sent() -> None:
    echo = Echo()
    async with listening(echo) as (listener, address), connected(address) as channel:
        stream = channel.stream_stream(TALK)(timeout=PATIENCE_S)
        await stream.write(b"wait")
        await until(lambda: echo.said == [b"wait"], "the first to be taken up")
        await stream.write(b"more")
        draining = asyncio.create_task(listener.drain(PATIENCE_S))
        await asyncio.sleep(0)
        echo.gate.set()
        assert (await stream.read()).startswith(b"wait ")
        error = await refusal(stream.read())
        assert str(error.details()).startswith("DRAINING: ")
        assert echo.said == [b"wait"]
        assert await draining


async def test_a_drain_of_nothing_is_clean() -> None:
    assert await Listener(limits()).drain(0)
    async with listening() as (listener, _):
        assert await listener.drain(0)


# Addresses.


async def test_nobody_shares_the_port() -> None:
    """`SO_REUSEPORT`, gRPC's default, would let a second server take half of the connections."""
    async with listening() as (_, address):
        with socket.socket() as second:
            second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="Address already in use"):
                second.bind(("127.0.0.1", int(address.rpartition(":")[2])))


@pytest.mark.parametrize("share_port", [False, True])
async def test_a_taken_port_is_refused(share_port: bool, capfd: pytest.CaptureFixture[str]) -> None:
    async with listening() as (_, address):
        with pytest.raises(StartError, match=r"^ADDRESS_UNAVAILABLE: could not listen on 127\.0\.0\.1:"):
            await Listener(limits()).listen(address, share_port=share_port)
        with pytest.raises(StartError, match=r"^ADDRESS_UNAVAILABLE: "):
            await Listener(limits()).listen("192.0.2.1:0")
    assert "Address already in use" not in capfd.readouterr().err


async def test_listeners_share_a_port_where_all_of_them_say_so() -> None:
    echoes = Echo(), Echo()
    async with (
        listening(echoes[0], share_port=True) as (_, address),
        listening(echoes[1], address, share_port=True) as (_, same_address),
    ):
        assert same_address == address
        for _ in range(200):  # the system spreads connections by hash: 200 on one side are as likely as 2 to the -199
            async with connected(address) as channel:
                await channel.unary_unary(SAY)(b"", timeout=PATIENCE_S)
            if all(echo.calls for echo in echoes):
                break
        assert all(echo.calls for echo in echoes)


async def test_an_ipv6_address() -> None:
    async with listening(address="[::1]:0") as (_, address):
        assert re.fullmatch(r"\[::1\]:[1-9]\d+", address)
        async with connected(address) as channel:
            assert await channel.unary_unary(SAY)(b"x", timeout=PATIENCE_S) == b"x"


@pytest.fixture
def open_umask() -> Iterator[None]:
    umask = os.umask(0)
    yield
    assert os.umask(umask) == 0  # the listener has put it back


async def test_a_unix_socket_is_its_owners_alone(tmp_path: Path, open_umask: None) -> None:
    path = tmp_path / "lom.sock"
    async with listening(address=f"unix:{path}") as (_, address):
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with connected(address) as channel:
            assert await channel.unary_unary(SAY)(b"x", timeout=PATIENCE_S) == b"x"


async def test_a_unix_socket_of_a_live_server_is_refused(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'lom.sock'}"
    async with listening(address=address), connected(address) as channel:
        with pytest.raises(StartError, match=r"^ADDRESS_UNAVAILABLE: could not listen on unix:"):
            await Listener(limits()).listen(address)
        assert await channel.unary_unary(SAY)(b"x", timeout=PATIENCE_S) == b"x"


async def test_a_unix_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "lom.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    async with listening(address=f"unix:{path}") as (_, address), connected(address) as channel:
        assert await channel.unary_unary(SAY)(b"x", timeout=PATIENCE_S) == b"x"


async def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    for address in (f"unix:{path}", f"unix:{tmp_path / 'no folder' / 'lom.sock'}"):
        with pytest.raises(StartError, match=r"^ADDRESS_UNAVAILABLE: "):
            await Listener(limits()).listen(address)
    assert path.read_text() == "data"


# Reflection.


def other_pool() -> DescriptorPool:
    """A pool that knows one service of its own, as the Open Inference Protocol's does."""
    pool = DescriptorPool()
    base = descriptor_pb2.FileDescriptorProto(name="base.proto", package="private", syntax="proto3")
    base.message_type.add(name="Nothing")
    pool.AddSerializedFile(base.SerializeToString())
    file = descriptor_pb2.FileDescriptorProto(
        name="private.proto", package="private", syntax="proto3", dependency=["base.proto"]
    )
    file.service.add(name="Service").method.add(
        name="Do", input_type=".private.Nothing", output_type=".private.Nothing"
    )
    pool.AddSerializedFile(file.SerializeToString())
    return pool


async def test_reflection_describes_the_services_of_every_pool() -> None:
    from grpc_reflection.v1alpha import reflection_pb2

    listener = Listener(limits())
    services = [
        policy_pb2.DESCRIPTOR.services_by_name["PolicyService"],
        other_pool().FindServiceByName("private.Service"),
    ]
    listener.add_reflection(services)
    address = await listener.listen("127.0.0.1:0")
    async with connected(address) as channel:
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        stream = channel.stream_stream(path)(timeout=PATIENCE_S)

        async def ask(**fields: str) -> Any:
            await stream.write(reflection_pb2.ServerReflectionRequest(**fields).SerializeToString())
            return reflection_pb2.ServerReflectionResponse.FromString(await stream.read())

        listed = (await ask(list_services="")).list_services_response.service
        assert {service.name for service in listed} == {
            "lom_api.v1.PolicyService",
            "private.Service",
            "grpc.health.v1.Health",
        }
        for symbol in ("lom_api.v1.ActRequest", "private.Nothing", "grpc.health.v1.Health"):
            files = (await ask(file_containing_symbol=symbol)).file_descriptor_response.file_descriptor_proto
            assert descriptor_pb2.FileDescriptorProto.FromString(files[0]).package == symbol.rpartition(".")[0]
        await stream.write(b"\xff")
        assert str((await refusal(stream.read())).details()).startswith("BAD_MESSAGE: ")
    await listener.drain(0)


@pytest.mark.parametrize(("left_ms", "kept_ms"), [(1000, 5), (50, 5), (20, 2), (1, 0.1)])
def test_the_way_back_is_part_of_a_requests_time(left_ms: int, kept_ms: float) -> None:
    before_ns = time.monotonic_ns()
    useless_ns = Call(deadline_ns=before_ns + 10**12, client="robot").admit(left_ms * 10**6)
    after_ns = time.monotonic_ns()
    granted_ns = (left_ms - kept_ms) * 1e6
    assert before_ns + granted_ns - 1 <= useless_ns <= after_ns + granted_ns + 1


def test_a_time_that_is_over_is_not_made_longer() -> None:
    now_ns = time.monotonic_ns()
    assert Call(deadline_ns=now_ns - 10**9, client="robot").admit() <= now_ns - 10**9
