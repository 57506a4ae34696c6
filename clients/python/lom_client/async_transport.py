"""What carries an asynchronous client's calls: the same as `transport.py`, on the event loop."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from lom_api.v1 import policy_pb2
from lom_client.action_stream import Metadata, StreamAge, reply_in, stream_error
from lom_client.config import ClientConfig
from lom_client.credentials import call_metadata, channel_credentials, require_fitting
from lom_client.errors import PolicyError, malformed_reply
from lom_client.targets import Scheme, Target, parse_target
from lom_client.transport import SERVICE, Answer, Transport, in_process_transport

_Method: TypeAlias = "grpc.aio.StreamStreamMultiCallable[bytes, bytes]"
_Answers: TypeAlias = "dict[int, asyncio.Future[policy_pb2.ActReply]]"


class AsyncTransport(Protocol):
    """Carries single calls. **Threads**: belongs to one event loop."""

    async def call(self, method: str, message: bytes, timeout_s: float) -> Answer:
        """Has a method of `lom_api.v1.PolicyService` answered; cancelling takes the call back."""
        ...

    async def close(self) -> None:
        """Ends every call under way."""
        ...


@dataclass(frozen=True, kw_only=True)
class AsyncConnection:
    """A way to a server; the stream, where there is one, is for actions."""

    transport: AsyncTransport
    stream: "AsyncActionStream | None" = None


def connect_async(target: str, config: ClientConfig) -> AsyncConnection:
    """As `transport.connect`, for the running event loop."""
    parsed = parse_target(target)
    require_fitting(config, parsed)
    if parsed.scheme is Scheme.INPROC:
        return AsyncConnection(transport=_InProcessTransport(in_process_transport(parsed)))
    transport = _GrpcTransport(parsed, config)
    return AsyncConnection(transport=transport, stream=transport.stream() if config.use_stream else None)


class _InProcessTransport:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def call(self, method: str, message: bytes, timeout_s: float) -> Answer:
        return await asyncio.wrap_future(self._transport.call(method, message, timeout_s))

    async def close(self) -> None:
        await asyncio.to_thread(self._transport.close)


class _GrpcTransport:
    def __init__(self, target: Target, config: ClientConfig) -> None:
        options = config.channel_options()
        self._token = call_metadata(config)
        self._trace_headers = config.trace_headers
        if target.scheme is Scheme.GRPCS:
            self._channel = grpc.aio.secure_channel(target.address, channel_credentials(config), options=options)
        else:
            self._channel = grpc.aio.insecure_channel(target.address, options=options)

    async def call(self, method: str, message: bytes, timeout_s: float) -> Answer:
        start: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            reply = await start(message, timeout=timeout_s, metadata=self._metadata())
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or "", b""
        return grpc.StatusCode.OK, "", reply

    def stream(self) -> "AsyncActionStream":
        return AsyncActionStream(self._channel.stream_stream(f"/{SERVICE}/ActStream"), self._metadata)

    def _metadata(self) -> Metadata:
        if self._trace_headers is None:
            return self._token
        return (*self._token, *self._trace_headers().items())

    async def close(self) -> None:
        await self._channel.close()


class AsyncActionStream:
    """As `ActionStream`. **Threads**: belongs to one event loop."""

    def __init__(self, method: _Method, metadata: Callable[[], Metadata]) -> None:
        self._method = method
        self._metadata = metadata
        self._sequences = itertools.count(1)
        self._open: _OpenStream | None = None

    async def act(self, request: policy_pb2.ActRequest, over_at: float) -> policy_pb2.ActReply:
        """Numbers and sends `request`, useless after `over_at`.

        Raises:
            PolicyError: it was answered with a refusal, or the stream ended before.
        """
        request.supersede = True
        request.sequence = next(self._sequences)
        if self._open is None or not self._open.may_ask():
            if self._open is not None:
                self._open.leave()
            self._open = _OpenStream(self._method, self._metadata())
        return await self._open.act(request, over_at)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    request: policy_pb2.ActRequest
    over_at: float
    answer: "asyncio.Future[policy_pb2.ActReply]"


class _OpenStream:
    def __init__(self, method: _Method, metadata: Metadata) -> None:
        self._age = StreamAge()
        self._is_left = False
        self._outbox: asyncio.Queue[_Question | None] = asyncio.Queue()
        self._waiting: _Answers = {}
        self._call = method(self._requests(), metadata=metadata)
        self._reading = asyncio.create_task(self._read())

    def may_ask(self) -> bool:
        """Whether it takes one more request, which counts from now."""
        return not self._reading.done() and self._age.may_ask()

    async def act(self, request: policy_pb2.ActRequest, over_at: float) -> policy_pb2.ActReply:
        answer: asyncio.Future[policy_pb2.ActReply] = asyncio.get_running_loop().create_future()
        self._waiting[request.sequence] = answer
        self._outbox.put_nowait(_Question(request=request, over_at=over_at, answer=answer))
        try:
            return await answer
        finally:
            del self._waiting[request.sequence]
            self._end_if_unneeded()

    def leave(self) -> None:
        """Ends the stream with the last answer that somebody waits for."""
        self._is_left = True
        self._outbox.put_nowait(None)
        self._end_if_unneeded()

    async def _requests(self) -> AsyncIterator[bytes]:
        while (question := await self._outbox.get()) is not None:
            budget_ns = int((question.over_at - time.monotonic()) * 1e9)
            if budget_ns > 0 and not question.answer.done():
                question.request.budget_ns = budget_ns
                yield question.request.SerializeToString()

    async def _read(self) -> None:
        failure = await self._read_to_the_end()
        self._outbox.put_nowait(None)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(failure())

    async def _read_to_the_end(self) -> Callable[[], PolicyError]:
        """What makes the failure of those who were not answered."""
        try:
            async for message in self._call:
                self._settle(policy_pb2.ActStreamReply.FromString(message))
        except DecodeError:
            self._call.cancel()
            return malformed_reply
        except grpc.aio.AioRpcError as error:
            return partial(stream_error, error.code(), error.details() or "")
        except asyncio.CancelledError:  # by `leave`, or by the channel's end
            return partial(stream_error, grpc.StatusCode.CANCELLED, "")
        return partial(stream_error, grpc.StatusCode.OK, "")

    def _settle(self, message: policy_pb2.ActStreamReply) -> None:
        answer = self._waiting.get(message.sequence)
        if answer is None or answer.done():
            return  # too late for whoever asked
        try:
            answer.set_result(reply_in(message))
        except PolicyError as error:
            answer.set_exception(error)

    def _end_if_unneeded(self) -> None:
        if self._is_left and not self._waiting:
            self._call.cancel()
