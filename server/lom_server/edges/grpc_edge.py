"""`lom_api.v1.PolicyService` and `grpc.health.v1` over grpc.aio: bytes to requests, replies and errors back."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lom_api.codec import CodecError, pack_array, unpack_tensor
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_bundle import SpaceSpec
from lom_server.errors import PolicyError, StartError, quoted
from lom_server.service import ActReply, ActRequest, PolicyService, ServedPolicy
from lom_server.status import status_of

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

SERVICE_NAME = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name
MESSAGE_OVERHEAD_BYTES = 64 * 1024
MESSAGE_CEILING_BYTES = 4 * 1024 * 1024

# What is left open when the last accepted request has its reply: health watchers, and bytes on their way out.
_FLUSH_S = 0.25


class GrpcEdge:
    """A grpc.aio server in front of one `PolicyService`.

    Threads: belongs to the event loop that created it.
    """

    def __init__(
        self, service: PolicyService, *, max_message_bytes: int, default_deadline_s: float, max_deadline_s: float
    ) -> None:
        self._service = service
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s
        self._spec_messages: dict[str, bytes] = {}
        self._running = 0
        self._none_running = asyncio.Event()
        self._none_running.set()
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            options=_server_arguments(max_message_bytes), compression=grpc.Compression.NoCompression
        )
        # Generic handlers: grpc.aio answers bytes that its own deserialiser refuses with UNKNOWN and a class name.
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    SERVICE_NAME,
                    {
                        "Act": grpc.unary_unary_rpc_method_handler(self._guarded(self._act)),
                        "GetPolicySpec": grpc.unary_unary_rpc_method_handler(self._guarded(self._get_policy_spec)),
                    },
                ),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    async def listen(self, host: str, port: int) -> str:
        """Listens, with every health NOT_SERVING, and returns the address with the port that it got.

        Raises:
            StartError: ADDRESS_UNAVAILABLE, where somebody else has the port or the host is not this machine's.
        """
        printable_host = f"[{host}]" if ":" in host else host
        try:
            if port:  # gRPC would report a taken port too, with lines of its own on stderr
                socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
            bound_port = self._server.add_insecure_port(f"{printable_host}:{port}")
        except (OSError, RuntimeError) as error:
            raise StartError(
                "ADDRESS_UNAVAILABLE",
                f"could not listen on {printable_host}:{port}; expected a free port of this machine",
            ) from error
        await self._set_health("", is_serving=False)
        await self._server.start()
        return f"{printable_host}:{bound_port}"

    async def announce(self, policy: str) -> None:
        """Tells health checks and watchers that the server and `policy` are SERVING."""
        await self._set_health(policy, is_serving=True)
        await self._set_health("", is_serving=True)

    async def drain(self, grace_s: float) -> bool:
        """NOT_SERVING first, then no new requests, then accepted ones finish within `grace_s`, then closes.

        Returns:
            Whether every accepted request was answered in time.
        """
        await self._health.enter_graceful_shutdown()
        self._service.drain()
        try:
            await asyncio.wait_for(self._none_running.wait(), grace_s)
        except TimeoutError:
            await self._server.stop(None)
            return False
        await self._server.stop(_FLUSH_S)
        return True

    async def _set_health(self, service: str, *, is_serving: bool) -> None:
        serving = health_pb2.HealthCheckResponse.ServingStatus
        await self._health.set(service, serving.SERVING if is_serving else serving.NOT_SERVING)

    def _guarded(
        self, handler: Callable[[bytes, Context], Awaitable[bytes]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """The only way out for an exception: as a status of our own, never as gRPC's UNKNOWN."""

        async def guarded(message: bytes, context: Context) -> bytes:
            self._running += 1
            self._none_running.clear()
            try:
                return await handler(message, context)
            except Exception as error:
                code, text = status_of(error)
                context.set_code(code)
                context.set_details(text)
                return b""
            finally:
                self._running -= 1
                if not self._running:
                    self._none_running.set()

        return guarded

    async def _act(self, message: bytes, context: Context) -> bytes:
        deadline_ns = self._deadline_ns(context)
        call = _parsed(policy_pb2.ActRequest, message)
        request = ActRequest(
            policy=call.policy,
            version=call.version,
            variant=call.variant,
            contract_hash=call.contract_hash,
            inputs=[(tensor.name, _unpacked(tensor)) for tensor in call.inputs],
        )
        reply = await self._service.act(request, deadline_ns)
        return _reply_message(reply, call.sequence)

    async def _get_policy_spec(self, message: bytes, context: Context) -> bytes:
        policy = self._service.spec(_parsed(policy_pb2.GetPolicySpecRequest, message).policy)
        if policy.bundle_digest not in self._spec_messages:
            self._spec_messages[policy.bundle_digest] = _spec_message(policy)
        return self._spec_messages[policy.bundle_digest]

    def _deadline_ns(self, context: Context) -> int:
        """The caller's deadline on this machine's monotonic clock, cut to what this server grants."""
        remaining_s = context.time_remaining()
        granted_s = self._default_deadline_s if remaining_s is None else min(remaining_s, self._max_deadline_s)
        if granted_s != remaining_s:
            context.set_trailing_metadata((("x-deadline-clamped", "1"),))
        return time.monotonic_ns() + int(granted_s * 1e9)


def _parsed(message_type: Any, message: bytes) -> Any:
    try:
        return message_type.FromString(message)
    except DecodeError:
        raise PolicyError(Reason.BAD_MESSAGE, f"expected a {message_type.DESCRIPTOR.full_name} message") from None


def _unpacked(tensor: policy_pb2.Tensor) -> Any:
    try:
        return unpack_tensor(tensor)
    except CodecError as error:
        raise PolicyError(error.reason, f"input {quoted(tensor.name)}: {error.detail}") from None


def _reply_message(reply: ActReply, sequence: int) -> bytes:
    return policy_pb2.ActReply(
        action=pack_array(reply.action, "action"),
        policy=reply.policy,
        version=reply.version,
        variant=reply.variant,
        bundle_digest=reply.bundle_digest,
        sequence=sequence,
        mode=None if reply.mode is None else pack_array(reply.mode, "mode"),
        margin=None if reply.margin is None else pack_array(reply.margin, "margin"),
        timings=policy_pb2.ServerTimings(
            queue_ns=reply.queue_ns, inference_ns=reply.inference_ns, batch_rows=reply.batch_rows
        ),
        scores=[
            policy_pb2.Score(name=name, values=pack_array(score.values, name), threshold=score.threshold)
            for name, score in reply.scores.items()
        ],
    ).SerializeToString()


def _spec_message(policy: ServedPolicy) -> bytes:
    manifest = policy.manifest
    return policy_pb2.PolicySpec(
        policy=manifest.policy,
        version=policy.version,
        inputs=[_space_message(space) for space in manifest.inputs],
        action=_space_message(manifest.action),
        variants=sorted(manifest.variants),
        default_variant=manifest.default_variant,
        bundle_digest=policy.bundle_digest,
        contract_hash=policy.contract_hash,
        num_components=manifest.num_components,
        max_batch_rows=policy.max_batch_rows,
        execution_provider=policy.provider,
    ).SerializeToString()


def _space_message(space: SpaceSpec) -> policy_pb2.Space:
    return policy_pb2.Space(
        name=space.name, dtype=policy_pb2.DATA_TYPE_FLOAT32, shape=space.shape, low=space.low, high=space.high
    )


def _server_arguments(max_message_bytes: int) -> list[tuple[str, int]]:
    """gRPC ignores a misspelt name in silence: a line whose effect can be seen from outside has a test of it."""
    return [
        ("grpc.so_reuseport", 0),  # by default a second server takes half of the connections without a word
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # identity: no decompression bombs
        ("grpc.max_metadata_size", 8192),
        ("grpc.absolute_max_metadata_size", 10240),  # between the two gRPC refuses at random
        ("grpc.server_handshake_timeout_ms", 2000),
        ("grpc.max_allowed_incoming_connections", 256),
        ("grpc.max_concurrent_streams", 64),
        ("grpc.max_connection_idle_ms", 10 * 60 * 1000),
        ("grpc.max_connection_age_ms", 30 * 60 * 1000),
        ("grpc.max_connection_age_grace_ms", 10 * 1000),
        ("grpc.http2.min_ping_interval_without_data_ms", 500),  # robots look for a dead server once a second
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 10 * 1000),
        ("grpc.keepalive_timeout_ms", 2000),
    ]
