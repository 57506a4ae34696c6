"""The grpc.aio server around the edges: gRPC's arguments, who may call, limits, health, drain, one way out for errors.

Handlers see bytes and a `Call`, never gRPC. Whatever they raise becomes a status of `lom_server.status`.
"""

import asyncio
import functools
import logging
import math
import os
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from lom_api.reasons import Reason
from lom_server.config import UNIX_SCHEME, ServerConfig, host_and_port, is_unix
from lom_server.edges.authentication import Authenticator, Role
from lom_server.errors import PolicyError, StartError, quoted
from lom_server.status import Status, status_of

MOST_RATES = 4096
"""Clients whose rate is remembered."""

_T = TypeVar("_T")
if TYPE_CHECKING:
    from lom_server.tracing import Tracer  # which needs what only those have installed who trace

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

# What is left open when the last accepted request has its reply: health watchers, and bytes on their way out.
_FLUSH_S = 0.25
_FOREVER_NS = 2**63 - 1
# What is kept of a request's time for the way back of its answer: a tenth, but no more than this.
_WAY_BACK_SHARE = 10
_WAY_BACK_NS = 5_000_000


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a handler may know of the RPC around its message.

    Attributes:
        deadline_ns: `time.monotonic_ns()` instant after which nobody waits. Of a unary call already cut to what the
            server grants; of a stream the end of the whole stream, which `admit` divides into requests.
        client: who calls, for fairness and logs: token name, else certificate subject, else the connection; on a Unix
            socket, where gRPC does not tell connections apart, all of them together.
        default_budget_ns: what a request is granted that asks for no time of its own.
        max_budget_ns: what a request is granted at most.
        charge: counts one more request of `client`, or raises RATE_LIMITED.
    """

    deadline_ns: int
    client: str
    default_budget_ns: int = _FOREVER_NS
    max_budget_ns: int = _FOREVER_NS
    charge: Callable[[], None] = _nothing

    def admit(self, budget_ns: int = 0) -> int:
        """Takes up a request that arrives now, and returns the instant after which its answer need not leave.

        That is a little before the caller's deadline: the answer has a way back, which takes longest when most callers
        are on it.

        Args:
            budget_ns: nanoseconds that the request asks for; 0 where it does not say.

        Raises:
            PolicyError: RATE_LIMITED.
        """
        self.charge()
        now_ns = time.monotonic_ns()
        left_ns = min(self.deadline_ns - now_ns, budget_ns or self.default_budget_ns, self.max_budget_ns)
        return now_ns + left_ns - min(max(0, left_ns) // _WAY_BACK_SHARE, _WAY_BACK_NS)


UnaryHandler: TypeAlias = Callable[[bytes, Call], Awaitable[bytes]]
StreamHandler: TypeAlias = Callable[[AsyncIterator[bytes], Call], AsyncIterator[bytes]]
"""An async generator: it is closed when its stream ends before it does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListenerLimits:
    """What a listener grants its callers. The fields are those of `ServerConfig`, which says what they trade."""

    max_message_bytes: int
    max_metadata_bytes: int
    default_deadline_s: float
    max_deadline_s: float
    max_connections: int
    max_streams_per_connection: int
    max_concurrent_calls: int
    max_requests_per_s: float
    handshake_timeout_s: float
    max_connection_idle_s: float
    max_connection_age_s: float
    stream_idle_s: float
    slow_reader_s: float

    @classmethod
    def of(cls, config: ServerConfig) -> "ListenerLimits":
        """The limits that `config` chooses."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class Listener:
    """One address and the services behind it.

    Threads: belongs to the event loop that calls `listen`.
    """

    def __init__(
        self,
        limits: ListenerLimits,
        *,
        authenticator: Authenticator | None = None,
        credentials: grpc.ServerCredentials | None = None,
        observe_refusal: Callable[[Reason], None] = lambda _: None,
        tracer: "Tracer | None" = None,
    ) -> None:
        """Listens nowhere yet.

        Args:
            authenticator: who knows callers; None lets everybody in whom the address lets in.
            credentials: TLS, on TCP only; None for plaintext.
            observe_refusal: told of what this class refuses; what handlers refuse, they see themselves.
            tracer: makes a span of every call, where traces are asked for.
        """
        self._limits = limits
        self._authenticator = authenticator
        self._credentials = credentials
        self._observe_refusal = observe_refusal
        self._tracer = tracer
        self._rate = RequestRate(limits.max_requests_per_s)
        self._health = _Health()
        self._handlers = [self._health.handlers]
        self._server: grpc.aio.Server | None = None
        self._is_draining = False
        self._running = 0
        self._none_running = asyncio.Event()
        self._streams: set[_Messages] = set()

    def add_service(
        self,
        name: str,
        *,
        unary: Mapping[str, UnaryHandler],
        streams: Mapping[str, StreamHandler] | None = None,
        role: Role,
    ) -> None:
        """Answers the methods of the service `name`, to callers that have `role`. Before `listen`."""
        # Generic handlers: grpc.aio answers bytes that its own deserialiser refuses with UNKNOWN and a class name.
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            # As a stream of one message: grpc.aio would read it before anybody is asked, and wait for it for ever.
            method: grpc.stream_unary_rpc_method_handler(self._guarded_unary(f"{name}/{method}", handler, role))
            for method, handler in unary.items()
        }
        for method, stream_handler in (streams or {}).items():
            methods[method] = grpc.stream_stream_rpc_method_handler(
                self._guarded_stream(f"{name}/{method}", stream_handler, role)
            )
        self._handlers.append(grpc.method_handlers_generic_handler(name, methods))

    def add_reflection(self, services: Sequence[ServiceDescriptor]) -> None:
        """Tells callers which messages `services` and the health service want, from whatever pools they are."""
        from grpc_reflection.v1alpha import reflection, reflection_pb2

        described = [*services, health_pb2.DESCRIPTOR.services_by_name["Health"]]
        pool = DescriptorPool()
        for service in described:
            _copy_file(service.file, pool)
        servicer = reflection.aio.ReflectionServicer([service.full_name for service in described], pool=pool)

        async def answer(messages: AsyncIterator[bytes], _: Call) -> AsyncGenerator[bytes, None]:
            requests = (parsed(reflection_pb2.ServerReflectionRequest, message) async for message in messages)
            async for reply in servicer.ServerReflectionInfo(requests, None):
                yield reply.SerializeToString()

        self.add_service(reflection.SERVICE_NAME, unary={}, streams={"ServerReflectionInfo": answer}, role=Role.ACT)

    async def listen(self, address: str, *, share_port: bool = False) -> str:
        """Listens on HOST:PORT or unix:/PATH, with every health NOT_SERVING; returns the address with the port got.

        A Unix socket is plaintext, and its owner's alone.

        Args:
            share_port: with other listeners that say so, too; the system spreads connections over them.

        Raises:
            StartError: ADDRESS_UNAVAILABLE, where somebody else has the address or it is not this machine's.
        """
        # Errors of handlers have a status and a line of ours; what gRPC adds is tracebacks about callers who have gone.
        logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
        server = grpc.aio.server(
            options=_server_arguments(self._limits, share_port=share_port), compression=grpc.Compression.NoCompression
        )
        server.add_generic_rpc_handlers(tuple(self._handlers))
        try:
            if is_unix(address):
                _bind_unix(server, address)
            else:
                address = _bind_tcp(server, address, self._credentials, share_port=share_port)
        except (OSError, RuntimeError) as error:
            raise StartError(
                "ADDRESS_UNAVAILABLE", f"could not listen on {address}; expected a free address of this machine"
            ) from error
        await server.start()
        self._server = server
        return address

    @property
    def open_streams(self) -> int:
        """Streams under way."""
        return len(self._streams)

    async def set_serving(self, name: str, is_serving: bool) -> None:
        """Tells health checks and watchers of `name`; the empty name is the whole server."""
        self._health.set_serving(name, is_serving)

    async def drain(self, grace_s: float) -> bool:
        """NOT_SERVING first, then no new requests, then accepted ones finish within `grace_s`, then closes.

        A stream is answered what it has asked, and ends with DRAINING.

        Returns:
            Whether every accepted request was answered in time.
        """
        self._health.drain()
        self._is_draining = True
        for messages in self._streams:
            messages.end()
        is_clean = True
        if self._running:
            try:
                async with asyncio.timeout(grace_s):
                    await self._none_running.wait()
            except TimeoutError:
                is_clean = False
        if self._server is not None:
            await self._server.stop(_FLUSH_S if is_clean else None)
        return is_clean

    def _guarded_unary(
        self, method: str, handler: UnaryHandler, role: Role
    ) -> Callable[[AsyncIterator[bytes], Context], Awaitable[bytes]]:
        """`handler` for those who may, and the only way out for its exceptions: never as gRPC's UNKNOWN."""

        async def guarded(_: AsyncIterator[bytes], context: Context) -> bytes:
            with self._guard(method, context):
                client = self._admitted(context, role)
                granted_s = self._granted_s(context)
                budget_ns = int(granted_s * 1e9)
                call = Call(deadline_ns=time.monotonic_ns() + budget_ns, client=client, default_budget_ns=budget_ns)
                with self._accepted():
                    return await _answer(handler, context, call, granted_s)
            return b""

        return guarded

    def _guarded_stream(
        self, method: str, handler: StreamHandler, role: Role
    ) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
        async def guarded(_: AsyncIterator[bytes], context: Context) -> None:
            with self._guard(method, context):
                call = self._stream_call(context, self._admitted(context, role))
                messages = _Messages(context, self._limits.stream_idle_s, self._refused)
                with self._accepted(), self._open(messages):
                    async with aclosing(cast("AsyncGenerator[bytes, None]", handler(messages, call))) as replies:
                        async for reply in replies:
                            await self._write(context, reply)

        return guarded

    @contextmanager
    def _guard(self, method: str, context: Context) -> Iterator[None]:
        """Around a call: turns what is raised into its status, and traces it where that is asked for."""
        with ExitStack() as stack:
            span = None
            if self._tracer is not None:
                metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
                span = stack.enter_context(self._tracer.start_span(method, metadata))
            try:
                yield
            except Exception as error:
                status = status_of(error)
                _refuse(context, status)
                if span is not None:
                    span.set_refused(status)

    @contextmanager
    def _accepted(self) -> Iterator[None]:
        """Around a call that a drain waits for."""
        self._running += 1
        self._none_running.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._none_running.set()

    @contextmanager
    def _open(self, messages: "_Messages") -> Iterator[None]:
        """Around a stream that a drain ends."""
        self._streams.add(messages)
        try:
            yield
        finally:
            self._streams.discard(messages)

    def _refused(self, reason: Reason, detail: str, *, retry_after_ms: int | None = None) -> PolicyError:
        """What to raise, once it has been counted."""
        self._observe_refusal(reason)
        return PolicyError(reason, detail, retry_after_ms=retry_after_ms)

    def _admitted(self, context: Context, role: Role) -> str:
        """The client, where it may call now; nothing of its message has been parsed."""
        if self._is_draining:
            raise self._refused(Reason.DRAINING, "the server is stopping and takes no new requests")
        if self._running >= self._limits.max_concurrent_calls:
            most = self._limits.max_concurrent_calls
            raise self._refused(Reason.TOO_MANY_CALLS, f"expected at most {most} calls under way in this server")
        client = self._client(context, role)
        self._charge(client)
        return client

    def _charge(self, client: str) -> None:
        wait_s = self._rate.charge(client)
        if wait_s > 0:
            raise self._refused(
                Reason.RATE_LIMITED,
                f"expected at most {self._limits.max_requests_per_s:g} requests per second",
                retry_after_ms=math.ceil(wait_s * 1000),
            )

    def _client(self, context: Context, role: Role) -> str:
        if self._authenticator is not None:
            identity = self._authenticator.identity_of(context.invocation_metadata() or ())
            if identity is None:  # in the same words for no token and for a wrong one
                raise self._refused(
                    Reason.AUTH_REQUIRED, "expected metadata 'authorization: Bearer TOKEN' with a token of this server"
                )
            if not identity.role.includes(role):
                raise self._refused(Reason.ROLE_REQUIRED, f"expected a token of role {role}")
            return identity.name
        if self._credentials is not None:
            for subject in context.auth_context().get("x509_common_name", ()):
                return subject.decode(errors="replace")
        peer: str = context.peer()
        return peer

    def _granted_s(self, context: Context) -> float:
        """What is left of the caller's deadline, cut to what this server grants."""
        limits = self._limits
        remaining_s = context.time_remaining()
        granted_s = limits.default_deadline_s if remaining_s is None else min(remaining_s, limits.max_deadline_s)
        if granted_s != remaining_s:
            context.set_trailing_metadata((("x-deadline-clamped", "1"),))
        return granted_s

    def _stream_call(self, context: Context, client: str) -> Call:
        remaining_s = context.time_remaining()
        return Call(
            deadline_ns=_FOREVER_NS if remaining_s is None else time.monotonic_ns() + int(remaining_s * 1e9),
            client=client,
            default_budget_ns=int(self._limits.default_deadline_s * 1e9),
            max_budget_ns=int(self._limits.max_deadline_s * 1e9),
            charge=functools.partial(self._charge, client),
        )

    async def _write(self, context: Context, reply: bytes) -> None:
        limit_s = self._limits.slow_reader_s
        try:
            async with asyncio.timeout(limit_s):
                await _finished(context.write(reply))
        except TimeoutError:
            raise self._refused(Reason.SLOW_CONSUMER, f"expected replies to be read within {limit_s:g} s") from None
        except grpc.aio.BaseError:
            raise asyncio.CancelledError from None  # the caller has gone, and gRPC is about to say so


class _Messages(AsyncIterator[bytes]):
    """The messages of one stream, until it ends, has brought none for too long, or the server drains."""

    def __init__(self, context: Context, idle_s: float, refused: Callable[[Reason, str], PolicyError]) -> None:
        self._context = context
        self._idle_s = idle_s
        self._refused = refused
        self._is_ended = False
        self._waiting: asyncio.Timeout | None = None

    def end(self) -> None:
        """Lets no further message in."""
        self._is_ended = True
        if self._waiting is not None:
            self._waiting.reschedule(0)

    async def __anext__(self) -> bytes:
        if not self._is_ended:
            try:
                async with asyncio.timeout(self._idle_s) as self._waiting:
                    message = await _finished(self._context.read())
            except TimeoutError:
                pass
            except grpc.aio.BaseError:
                raise StopAsyncIteration from None  # the caller has gone
            else:
                if not isinstance(message, bytes):  # the end
                    raise StopAsyncIteration
                return message
            finally:
                self._waiting = None
        if self._is_ended:
            raise self._refused(Reason.DRAINING, "the server is stopping and takes no new requests")
        raise self._refused(Reason.STREAM_IDLE, f"expected a request within {self._idle_s:g} s")


class _Health:
    """`grpc.health.v1`, open to everybody and never refused: who restarts the server must not need what it lacks.

    The library's servicer forgets every watcher of a name when one of them goes.
    """

    def __init__(self) -> None:
        self._statuses = {"": health_pb2.HealthCheckResponse.NOT_SERVING}
        self._is_draining = False
        self._changed = asyncio.Event()
        self.handlers = grpc.method_handlers_generic_handler(
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self._check),
                "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
            },
        )

    def set_serving(self, name: str, is_serving: bool) -> None:
        serving = health_pb2.HealthCheckResponse
        self._statuses[name] = serving.SERVING if is_serving and not self._is_draining else serving.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    def drain(self) -> None:
        """NOT_SERVING for good."""
        self._is_draining = True
        for name in self._statuses:
            self.set_serving(name, False)

    async def _check(self, message: bytes, context: Context) -> bytes:
        try:
            name = parsed(health_pb2.HealthCheckRequest, message).service
            if name not in self._statuses:
                raise PolicyError(Reason.MODEL_NOT_FOUND, f"service {quoted(name)} is not served here")
        except PolicyError as error:
            _refuse(context, status_of(error))
            return b""
        return self._reply(name)

    async def _watch(self, message: bytes, context: Context) -> None:
        try:
            name = parsed(health_pb2.HealthCheckRequest, message).service
        except PolicyError as error:
            _refuse(context, status_of(error))
            return
        last = None
        while True:
            changed = self._changed
            reply = self._reply(name)
            if reply != last:
                await context.write(reply)
                last = reply
            await changed.wait()

    def _reply(self, name: str) -> bytes:
        status = self._statuses.get(name, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        message: bytes = health_pb2.HealthCheckResponse(status=status).SerializeToString()
        return message


class RequestRate:
    """Requests a second that each client may make, with a second's worth at once; no limit where it is 0.

    A token bucket is kept as the instant at which it will be full again. Of many clients the last ones are remembered.
    """

    def __init__(self, per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is monotonic, in seconds."""
        self._interval_s = 1 / per_s if per_s else 0.0
        self._most_ahead_s = max(0.0, 1 - self._interval_s)
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def charge(self, client: str) -> float:
        """Counts a request of `client`, or returns after how many seconds there will be room for one."""
        if not self._interval_s:
            return 0.0
        now = self._clock()
        full_at = max(now, self._full_at.get(client, now))
        wait_s = full_at - now - self._most_ahead_s
        if wait_s > 0:
            return wait_s
        self._full_at[client] = full_at + self._interval_s
        self._full_at.move_to_end(client)
        if len(self._full_at) > MOST_RATES:
            self._full_at.popitem(last=False)
        return 0.0


def parsed(message_type: Any, message: bytes) -> Any:
    """The message that `message` holds.

    Raises:
        PolicyError: BAD_MESSAGE.
    """
    try:
        return message_type.FromString(message)
    except DecodeError:
        raise PolicyError(Reason.BAD_MESSAGE, f"expected a {message_type.DESCRIPTOR.full_name} message") from None


async def _answer(handler: UnaryHandler, context: Context, call: Call, granted_s: float) -> bytes:
    try:
        # gRPC ends a call at the deadline that its caller gave; this one may be the server's.
        async with asyncio.timeout(granted_s) as deadline:
            message = await _finished(context.read())
            if not isinstance(message, bytes):
                raise PolicyError(Reason.UNSUPPORTED, "expected exactly one message, got none")
            return await handler(message, call)
    except TimeoutError:
        if not deadline.expired():
            raise
        raise PolicyError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the answer was there") from None


async def _finished(operation: Awaitable[_T]) -> _T:
    """The result of an operation of gRPC, which goes on if nobody waits: cancelled, it would never free its message."""
    running = asyncio.ensure_future(operation)
    running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody may be left to ask
    return await asyncio.shield(running)


def _refuse(context: Context, status: Status) -> None:
    context.set_code(status.code)
    context.set_details(status.message)
    context.set_trailing_metadata((*context.trailing_metadata(), *status.trailers))


def _copy_file(file: FileDescriptor, pool: DescriptorPool) -> None:
    for dependency in file.dependencies:
        _copy_file(dependency, pool)
    pool.AddSerializedFile(file.serialized_pb)


def _bind_tcp(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None, *, share_port: bool
) -> str:
    host, port = host_and_port("listen", address)
    if port:  # gRPC would report a taken port too, with lines of its own on stderr
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share_port)
            probe.bind((host, port))  # without listening, or it would be given connections of those who share
    if credentials is None:
        bound_port = server.add_insecure_port(address)
    else:
        bound_port = server.add_secure_port(address, credentials)
    return f"{address.rpartition(':')[0]}:{bound_port}"


def _bind_unix(server: grpc.aio.Server, address: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address.removeprefix(UNIX_SCHEME))
        except (FileNotFoundError, ConnectionRefusedError):
            pass  # no file, or a dead server's, which gRPC replaces
        else:
            raise OSError  # gRPC would take a live server's file away, too
    # Before the file exists, so that it is never wider. Other threads' files become narrower meanwhile.
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(address)
    finally:
        os.umask(umask)


def _server_arguments(limits: ListenerLimits, *, share_port: bool) -> list[tuple[str, int]]:
    """gRPC ignores a misspelt name in silence: a line whose effect can be seen from outside has a test of it."""
    return [
        ("grpc.so_reuseport", int(share_port)),  # by default a second server takes half of the connections in silence
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # identity: no decompression bombs
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes * 5 // 4),  # between them: refused at random
        ("grpc.server_handshake_timeout_ms", _ms(limits.handshake_timeout_s)),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.max_connection_idle_ms", _ms(limits.max_connection_idle_s)),
        ("grpc.max_connection_age_ms", _ms(limits.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _ms(limits.max_deadline_s)),  # every unary call can end
        ("grpc.http2.min_ping_interval_without_data_ms", 500),  # robots look for a dead server once a second
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 10 * 1000),
        ("grpc.keepalive_timeout_ms", 2000),
    ]


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
