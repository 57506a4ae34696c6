"""What carries a client's calls: gRPC, by single calls or over one stream, or a server in this process.

Messages travel as bytes: gRPC's own deserialiser logs a traceback for what it cannot read, or hands over None.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from lom_api.v1 import policy_pb2
from lom_client.action_stream import ActionStream, Metadata
from lom_client.config import ClientConfig
from lom_client.credentials import call_metadata, channel_credentials, require_fitting
from lom_client.errors import client_closed, error_from_status, malformed_reply
from lom_client.targets import Scheme, Target, parse_target

SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name
TRANSPORTS = "lom_client.transports"
"""Entry points that make a `Transport` of what follows `NAME:` in a target."""

_Reply = TypeVar("_Reply", bound=Message)

Answer: TypeAlias = tuple[grpc.StatusCode, str, bytes]
"""Status, its message, and the reply where the status is OK."""


class Transport(Protocol):
    """Carries single calls. **Threads**: any."""

    def call(self, method: str, message: bytes, timeout_s: float) -> Future[Answer]:
        """Has a method of `lom_api.v1.PolicyService` answered; cancelling takes the call back. Does not block."""
        ...

    def close(self) -> None:
        """Ends every call under way."""
        ...


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A way to a server; the stream, where there is one, is for actions."""

    transport: Transport
    stream: ActionStream | None = None


def connect(target: str, config: ClientConfig) -> Connection:
    """A way to `target`. Reads files; connects to nothing.

    Raises:
        ValueError: `target` is none, or does not go with `config`; a file of `config` is not usable; `inproc:` names
            a bundle that cannot be served, or no server is installed.
    """
    parsed = parse_target(target)
    require_fitting(config, parsed)
    if parsed.scheme is Scheme.INPROC:
        return Connection(transport=in_process_transport(parsed))
    transport = GrpcTransport(parsed, config)
    return Connection(transport=transport, stream=transport.stream() if config.use_stream else None)


def in_process_transport(target: Target) -> Transport:
    """A server in this process, for an `inproc:` target; blocks while it loads the bundle.

    Raises:
        ValueError: the bundle cannot be served, or no server is installed.
    """
    found = entry_points(group=TRANSPORTS, name=target.scheme)
    if not found:
        raise ValueError("a target inproc:BUNDLE needs the server: pip install 'lom[server]'")
    transport: Transport = next(iter(found)).load()(target.address)
    return transport


def reply_of(answer: Answer, reply_type: type[_Reply]) -> _Reply:
    """The reply that `answer` brought.

    Raises:
        PolicyError: the failure that it brought instead.
    """
    code, message, reply = answer
    if code is not grpc.StatusCode.OK:
        raise error_from_status(code, message)
    try:
        return reply_type.FromString(reply)
    except DecodeError:
        raise malformed_reply() from None


class GrpcTransport:
    """One gRPC channel."""

    def __init__(self, target: Target, config: ClientConfig) -> None:
        """Raises ValueError where a file of `config` is not usable."""
        options = config.channel_options()
        self._token = call_metadata(config)
        self._trace_headers = config.trace_headers
        if target.scheme is Scheme.GRPCS:
            self._channel = grpc.secure_channel(target.address, channel_credentials(config), options=options)
        else:
            self._channel = grpc.insecure_channel(target.address, options=options)

    def call(self, method: str, message: bytes, timeout_s: float) -> Future[Answer]:
        """As `Transport.call`."""
        answer: Future[Answer] = Future()
        start: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            call = start.future(message, timeout=timeout_s, metadata=self._metadata())
        except ValueError:  # so says gRPC of a closed channel
            raise client_closed() from None

        def settle(_: object) -> None:
            if answer.set_running_or_notify_cancel():
                code = call.code()
                reply = call.result() if code is grpc.StatusCode.OK else b""
                answer.set_result((code, call.details() or "", reply))

        call.add_done_callback(settle)
        answer.add_done_callback(lambda _: call.cancel())
        return answer

    def stream(self) -> ActionStream:
        """Carries actions over the same channel; ends with it."""
        return ActionStream(self._channel.stream_stream(f"/{SERVICE}/ActStream"), self._metadata)

    def _metadata(self) -> Metadata:
        if self._trace_headers is None:
            return self._token
        return (*self._token, *self._trace_headers().items())

    def close(self) -> None:
        """As `Transport.close`."""
        self._channel.close()
