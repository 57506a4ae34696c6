"""`lom_server.edges.grpc_edge` through real sockets: every bad input has its status, reason and a clean message."""

import asyncio
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lom_api.codec import pack_array, unpack_tensor
from lom_api.v1 import policy_pb2, policy_pb2_grpc
from lom_server.batcher import Lane, MicroBatcher
from lom_server.edges.grpc_edge import GrpcEdge
from lom_server.errors import StartError
from lom_server.service import ActReply, ActRequest, PolicyService, ServedPolicy
from tests.server.conftest import MAX_BATCH_ROWS, NAN_ABOVE, RAISE_ABOVE
from tests.support.bundles import (
    POLICY,
    actor_action,
    golden_observations,
    greedy_action,
    greedy_margin,
    greedy_mode,
    toy_manifest,
)
from tests.support.engines import BurningEngine
from tests.support.servers import ServerProcess

PATIENCE_S = 20.0
ACT = "/lom_api.v1.PolicyService/Act"
OBSERVATION = np.array([[0.1, 0.3, 0.2]], dtype=np.float32)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# REASON_CODE: text; one line of printable ASCII; no path of this program, no class, no address, no library's text.
CLEAN_MESSAGE = re.compile(r"[A-Z][A-Z_]+: [ -~]+")
UNCLEAN = re.compile(r"Traceback|\.py\b|0x[0-9a-f]{4,}|<class|Error\b|Exception|onnxruntime|/tmp/|/home/|site-packages")


def tensor(array: Any = OBSERVATION, name: str = "observation", **changes: Any) -> policy_pb2.Tensor:
    message = pack_array(np.asarray(array, dtype=np.float32), name)
    for field, value in changes.items():
        if field == "shape":
            message.shape[:] = value
        else:
            setattr(message, field, value)
    return message


def request(*inputs: policy_pb2.Tensor, **fields: Any) -> bytes:
    fields = {"policy": POLICY, "inputs": inputs or [tensor()], **fields}
    return policy_pb2.ActRequest(**fields).SerializeToString()


def rows(count: int) -> Any:
    return np.zeros((count, 3), dtype=np.float32)


def raw_act(channel: Any) -> Any:
    """`Act` without a serialiser: what is sent need not be a message."""
    return channel.unary_unary(ACT)


def text_of(error: grpc.RpcError) -> str:
    return str(error.details())


def assert_clean(error: grpc.RpcError) -> None:
    message = text_of(error)
    assert error.code() is not grpc.StatusCode.UNKNOWN
    assert CLEAN_MESSAGE.fullmatch(message), message
    assert len(message.encode()) <= 256
    assert not UNCLEAN.search(message), message


SIGNALLING_NAN = struct.pack("<I", 0x7FA00000)
INVALID = grpc.StatusCode.INVALID_ARGUMENT
INTERNAL = grpc.StatusCode.INTERNAL
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION

BAD_REQUESTS: Mapping[str, tuple[bytes, grpc.StatusCode, str]] = {
    # The bytes
    "not protobuf": (b"\xff\xff\xff\xff", INTERNAL, "BAD_MESSAGE: "),
    "truncated protobuf": (request()[:-3], INTERNAL, "BAD_MESSAGE: "),
    "nested 200 deep": (b"\x1b" * 200, INTERNAL, "BAD_MESSAGE: "),
    "invalid UTF-8 in a string": (b"\x0a\x02\xff\xfe", INTERNAL, "BAD_MESSAGE: "),
    # The inputs
    "no inputs": (request(inputs=[]), INVALID, "MISSING_INPUT: input 'observation'"),
    "another input instead": (
        request(tensor(name="state")),
        INVALID,
        "UNKNOWN_INPUT: input 'state': expected one of 'obs",
    ),
    "nameless input": (request(tensor(name="")), INVALID, "UNKNOWN_INPUT: input ''"),
    "an input too many": (request(tensor(), tensor(name="x")), INVALID, "UNKNOWN_INPUT: input 'x'"),
    "hostile input name": (
        request(tensor(name="\n\x1b[2J\u2024" * 40)),
        INVALID,
        r"UNKNOWN_INPUT: input '\n\x1b[2J\u2024",
    ),
    "same input twice": (request(tensor(), tensor()), INVALID, "DUPLICATE_INPUT: input 'observation'"),
    # The tensor
    "byte short": (
        request(tensor(data=b"\0" * 11)),
        INVALID,
        "SIZE_MISMATCH: input 'observation': expected 12 bytes, got 11",
    ),
    "byte long": (request(tensor(data=b"\0" * 13)), INVALID, "SIZE_MISMATCH: "),
    "no data": (request(tensor(data=b"")), INVALID, "SIZE_MISMATCH: "),
    "product overflows 64 bits": (request(tensor(shape=[2**30, 2**30, 2**30])), INVALID, "SHAPE_OVERFLOW: "),
    "dim of 2**31": (request(tensor(shape=[2**31, 3])), INVALID, "SHAPE_OVERFLOW: "),
    "dim of 2**31 beside a zero": (request(tensor(shape=[2**31, 0], data=b"")), INVALID, "SHAPE_OVERFLOW: "),
    "negative dim": (
        request(tensor(shape=[-1, 3])),
        INVALID,
        "BAD_DIM: input 'observation': expected dimensions of 0 or more, g",
    ),
    "two negative dims": (request(tensor(shape=[-1, -3])), INVALID, "BAD_DIM: "),
    "rank 0": (request(tensor(shape=[])), INVALID, "BAD_RANK: "),
    "rank 9": (request(tensor(shape=[1, 3] + [1] * 7)), INVALID, "BAD_RANK: "),
    "rank 1": (request(tensor(np.zeros(3))), INVALID, "BAD_RANK: input 'observation': expected 2 dimensions, got 1"),
    "rank 3": (request(tensor(np.zeros((1, 1, 3)))), INVALID, "BAD_RANK: "),
    "feature too many": (
        request(tensor(np.zeros((1, 4)))),
        INVALID,
        "BAD_SHAPE: input 'observation': expected [3] per row, got [4]",
    ),
    "transposed": (request(tensor(np.zeros((3, 2)))), INVALID, "BAD_SHAPE: "),
    "int32": (
        request(tensor(dtype=policy_pb2.DATA_TYPE_INT32)),
        INVALID,
        "BAD_DTYPE: input 'observation': expected float32, got i",
    ),
    "float64's bytes": (request(tensor(data=np.zeros((1, 3)).tobytes())), INVALID, "SIZE_MISMATCH: "),
    "no dtype": (request(tensor(dtype=0)), INVALID, "UNKNOWN_DTYPE: "),
    "unknown dtype": (
        request(tensor(dtype=999)),
        INVALID,
        "UNKNOWN_DTYPE: input 'observation': expected float32 (1) or int32 (2), got 999",
    ),
    "no rows": (request(tensor(rows(0))), INVALID, "EMPTY_BATCH: "),
    "one row too many": (
        request(tensor(rows(MAX_BATCH_ROWS + 1))),
        INVALID,
        "BATCH_TOO_LARGE: input 'observation': expected at most 16 rows, got 17",
    ),
    "NaN": (
        request(tensor([[0, np.nan, 0]])),
        INVALID,
        "NON_FINITE: input 'observation': expected finite values, got none at flat index 1",
    ),
    "infinity": (request(tensor([[0, 0, np.inf]])), INVALID, "NON_FINITE: "),
    "minus infinity": (
        request(tensor([[0, 0, 0], [-np.inf, 0, 0]])),
        INVALID,
        "NON_FINITE: input 'observation': expected finite values, got none at flat index 3",
    ),
    "signalling NaN": (request(tensor(data=SIGNALLING_NAN + b"\0" * 8)), INVALID, "NON_FINITE: "),
    # The policy
    "empty request": (b"", INVALID, "MISSING_MODEL: "),
    "no policy": (request(policy=""), INVALID, "MISSING_MODEL: "),
    "parent folder": (request(policy="../toy"), INVALID, "BAD_MODEL_NAME: "),
    "path": (request(policy="a/../toy"), INVALID, "BAD_MODEL_NAME: "),
    "trailing slash": (request(policy="toy/"), INVALID, "BAD_MODEL_NAME: "),
    "absolute path": (request(policy="/etc/passwd"), INVALID, "BAD_MODEL_NAME: "),
    "percent escapes": (request(policy="%2e%2e%2ftoy"), INVALID, "BAD_MODEL_NAME: "),
    "NUL": (
        request(policy="toy\0"),
        INVALID,
        r"BAD_MODEL_NAME: policy: expected [a-z0-9][a-z0-9_-]{0,63}, got 'toy\x00'",
    ),
    "newline": (request(policy="toy\nx"), INVALID, "BAD_MODEL_NAME: "),
    "trailing newline": (request(policy="toy\n"), INVALID, "BAD_MODEL_NAME: "),
    "ANSI escape": (request(policy="\x1b[31mtoy"), INVALID, "BAD_MODEL_NAME: "),
    "dot": (request(policy="."), INVALID, "BAD_MODEL_NAME: "),
    "two dots": (request(policy=".."), INVALID, "BAD_MODEL_NAME: "),
    "space": (request(policy=" "), INVALID, "BAD_MODEL_NAME: "),
    "tab": (request(policy="\t"), INVALID, "BAD_MODEL_NAME: "),
    "upper case": (request(policy="Toy"), INVALID, "BAD_MODEL_NAME: "),
    "60 KiB of name": (request(policy="a" * 60 * 1024), INVALID, "BAD_MODEL_NAME: "),
    "look-alike dots": (request(policy="\u2024\u2024/toy"), INVALID, "BAD_MODEL_NAME: "),
    "unknown policy": (request(policy="other"), NOT_FOUND, "MODEL_NOT_FOUND: policy 'other' is not served here"),
    "unknown version": (request(version=2), NOT_FOUND, "VERSION_NOT_FOUND: version: expected 1, got 2"),
    "version past 2**31": (request(version=2**31), INVALID, "BAD_VERSION: "),
    "unknown variant": (
        request(variant="greedy"),
        INVALID,
        "UNKNOWN_VARIANT: variant: expected one of 'greedy_mode', 'actor', got 'greedy'",
    ),
    "variant as a path": (request(variant="../actor"), INVALID, "UNKNOWN_VARIANT: "),
    "another contract": (request(contract_hash="0" * 64), PRECONDITION, "CONTRACT_MISMATCH: contract_hash: expected "),
    # The model
    "NaN action": (request(tensor([[NAN_ABOVE + 1, 0, 0]])), INTERNAL, "NON_FINITE_ACTION: row 0"),
    "the runtime raises": (
        request(tensor([[RAISE_ABOVE + 1, 0, 0]])),
        INTERNAL,
        "INFERENCE_FAILED: the policy could not be run, id ",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_has_its_status_and_reason(flawed_channel: grpc.Channel, name: str) -> None:
    message, code, start = BAD_REQUESTS[name]
    with pytest.raises(grpc.RpcError) as error:
        raw_act(flawed_channel)(message, timeout=PATIENCE_S)
    assert error.value.code() is code
    assert text_of(error.value).startswith(start)
    assert_clean(error.value)
    # The server is as before: the same connection gets its answer.
    raw_act(flawed_channel)(request(), timeout=PATIENCE_S)


LIBRARY_REFUSALS: Mapping[str, tuple[str, bytes, Mapping[str, Any], grpc.StatusCode, str]] = {
    "message over the cap": (
        ACT, request(tensor(rows(20_000))), {}, grpc.StatusCode.RESOURCE_EXHAUSTED, r".*message larger than max.*",
    ),
    "gzip": (
        ACT, request(), {"compression": grpc.Compression.Gzip}, grpc.StatusCode.UNIMPLEMENTED,
        r"Compression algorithm 'gzip' is disabled\.",
    ),
    "unknown method": ("/lom_api.v1.PolicyService/Load", b"", {}, grpc.StatusCode.UNIMPLEMENTED, "Method not found!"),
    "reflection": (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"", {}, grpc.StatusCode.UNIMPLEMENTED,
        "Method not found!",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIBRARY_REFUSALS)
def test_what_the_library_refuses(flawed_channel: grpc.Channel, name: str) -> None:
    method, message, options, code, text = LIBRARY_REFUSALS[name]
    untyped_channel: Any = flawed_channel
    with pytest.raises(grpc.RpcError) as error:
        untyped_channel.unary_unary(method)(message, timeout=PATIENCE_S, **options)
    assert error.value.code() is code
    assert re.fullmatch(text, text_of(error.value), re.IGNORECASE | re.DOTALL), text_of(error.value)


def test_metadata_over_the_cap_is_refused_every_time(flawed_channel: grpc.Channel) -> None:
    for _ in range(12):  # with gRPC's own hard limit, about half of these would pass
        with pytest.raises(grpc.RpcError) as error:
            raw_act(flawed_channel)(request(), metadata=(("x", "y" * 12 * 1024),), timeout=PATIENCE_S)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "metadata size exceeds" in text_of(error.value)


def test_a_silent_connection_is_closed(flawed_server: ServerProcess) -> None:
    host, _, port = flawed_server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as silent:
        while silent.recv(4096):  # the server's settings, then the end
            pass


def test_the_largest_allowed_request_fits_the_cap(flawed_channel: grpc.Channel) -> None:
    reply = policy_pb2.ActReply.FromString(raw_act(flawed_channel)(request(tensor(rows(MAX_BATCH_ROWS)))))
    assert list(reply.action.shape) == [MAX_BATCH_ROWS, 2]


def test_answers_are_the_hand_worked_ones(flawed_channel: grpc.Channel) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(flawed_channel)
    observation = golden_observations()
    greedy = stub.Act(
        policy_pb2.ActRequest(policy=POLICY, inputs=[tensor(observation)], sequence=2**63), timeout=PATIENCE_S
    )
    np.testing.assert_array_equal(unpack_tensor(greedy.action), greedy_action(observation))
    np.testing.assert_array_equal(unpack_tensor(greedy.mode), greedy_mode(observation))
    np.testing.assert_allclose(unpack_tensor(greedy.margin), greedy_margin(observation), rtol=1e-6)
    assert (greedy.policy, greedy.version, greedy.variant, greedy.sequence) == (POLICY, 1, "greedy_mode", 2**63)
    assert greedy.timings.batch_rows == len(observation)
    assert greedy.timings.inference_ns > 0
    actor = stub.Act(policy_pb2.ActRequest(policy=POLICY, variant="actor", inputs=[tensor(observation)]))
    np.testing.assert_allclose(unpack_tensor(actor.action), actor_action(observation), rtol=1e-6)
    assert not actor.HasField("mode")
    assert not actor.HasField("margin")
    assert (
        actor.bundle_digest
        == greedy.bundle_digest
        == stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest()).bundle_digest
    )


def test_the_spec_is_the_bundles(flawed_channel: grpc.Channel) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(flawed_channel)
    spec = stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest(), timeout=PATIENCE_S)
    assert spec == stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest(policy=POLICY), timeout=PATIENCE_S)
    assert spec.contract_hash == toy_manifest().contract_hash
    assert [(space.name, list(space.shape)) for space in spec.inputs] == [("observation", [3])]
    assert (list(spec.action.low), list(spec.action.high)) == ([-1, -1], [1, 1])
    assert list(spec.inputs[0].high) == [np.inf] * 3
    assert sorted(spec.variants) == ["actor", "greedy_mode"]
    assert (spec.policy, spec.version, spec.default_variant) == (POLICY, 1, "greedy_mode")
    assert (spec.num_components, spec.max_batch_rows) == (3, MAX_BATCH_ROWS)
    assert spec.execution_provider == "CPUExecutionProvider"
    with pytest.raises(grpc.RpcError) as error:
        stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest(policy="other"), timeout=PATIENCE_S)
    assert error.value.code() is NOT_FOUND
    assert_clean(error.value)


def test_unknown_fields_are_ignored(flawed_channel: grpc.Channel) -> None:
    raw_act(flawed_channel)(request() + b"\xf8\x3f\x01", timeout=PATIENCE_S)


@pytest.mark.parametrize(("timeout_s", "is_clamped"), [(None, True), (600.0, True), (5.0, False)])
def test_deadlines_are_clamped_and_say_so(
    flawed_channel: grpc.Channel, timeout_s: float | None, is_clamped: bool
) -> None:
    _, call = raw_act(flawed_channel).with_call(request(), timeout=timeout_s)
    assert (("x-deadline-clamped", "1") in call.trailing_metadata()) is is_clamped


def test_health_of_what_is_served_and_what_is_not(flawed_channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(flawed_channel)
    for service in ("", POLICY):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status == SERVING
    with pytest.raises(grpc.RpcError) as error:
        stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=PATIENCE_S)
    assert error.value.code() is NOT_FOUND


def test_an_idle_client_may_ping_twice_a_second(flawed_server: ServerProcess) -> None:
    """By default a server closes such a connection (too_many_pings), after the third ping."""
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.keepalive_time_ms", 600),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    with grpc.insecure_channel(flawed_server.address, options) as channel:
        raw_act(channel)(request(), timeout=PATIENCE_S)
        states: list[grpc.ChannelConnectivity] = []
        channel.subscribe(states.append)
        time.sleep(3.5)  # what must not happen has no condition to wait for
        assert set(states) <= {grpc.ChannelConnectivity.READY}


# With the event loop in hand: a fake engine behind the edge.


class Stage:
    """An edge over a real service and batcher, with an engine that can be held."""

    def __init__(self, service_type: type[PolicyService] = PolicyService) -> None:
        self.engine = BurningEngine()
        self.batcher = MicroBatcher(max_batch_rows=4, max_queue_rows=1000)
        self.service = service_type(self.batcher)
        self.edge = GrpcEdge(self.service, max_message_bytes=65536, default_deadline_s=10, max_deadline_s=30)

    def publish(self) -> None:
        lane = Lane(engine=self.engine, variant="actor", outputs=("action",), inline_rows=0)
        self.service.publish(
            ServedPolicy(
                manifest=toy_manifest(),
                bundle_digest="0" * 64,
                lanes={"actor": lane, "greedy_mode": lane},
                provider="CPUExecutionProvider",
                max_batch_rows=4,
            )
        )


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.engine.gate.set()
    await stage.edge.drain(0)
    stage.batcher.close()


async def until(condition: Any, what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        await asyncio.sleep(0.002)


async def test_health_follows_the_policy(stage: Stage) -> None:
    address = await stage.edge.listen("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=PATIENCE_S)
        assert (await watch.read()).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await raw_act(channel)(request(), timeout=PATIENCE_S)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert text_of(error.value).startswith("MODEL_LOADING: ")
        stage.publish()
        await stage.edge.announce(POLICY)
        assert (await watch.read()).status == SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=POLICY))).status == SERVING
        await raw_act(channel)(request(), timeout=PATIENCE_S)
        draining = asyncio.create_task(stage.edge.drain(PATIENCE_S))
        assert (await watch.read()).status == NOT_SERVING
        assert await draining


async def test_a_drain_loses_no_accepted_request(stage: Stage) -> None:
    address = await stage.edge.listen("127.0.0.1", 0)
    stage.publish()
    await stage.edge.announce(POLICY)
    stage.engine.gate.clear()
    async with grpc.aio.insecure_channel(address) as channel:
        act = raw_act(channel)
        accepted = [act(request(tensor(np.full((1, 3), value))), timeout=PATIENCE_S) for value in range(20)]
        await until(lambda: len(stage.engine.batches) == 1, "the engine to start")
        running = len(stage.engine.batches[0])
        await until(lambda: stage.batcher.waiting_rows == 20 - running, "all twenty to be accepted")
        draining = asyncio.create_task(stage.edge.drain(PATIENCE_S))
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", POLICY):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await act(request(), timeout=PATIENCE_S)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert text_of(error.value).startswith("DRAINING: ")
        assert not draining.done()
        stage.engine.gate.set()
        replies = [policy_pb2.ActReply.FromString(await call) for call in accepted]
        for value, reply in enumerate(replies):
            np.testing.assert_array_equal(unpack_tensor(reply.action), np.full((1, 3), 2 * value))
        assert await draining


async def test_a_drain_past_its_grace_says_so(stage: Stage) -> None:
    address = await stage.edge.listen("127.0.0.1", 0)
    stage.publish()
    stage.engine.gate.clear()
    async with grpc.aio.insecure_channel(address) as channel:
        call = raw_act(channel)(request(), timeout=PATIENCE_S)
        await until(lambda: len(stage.engine.batches) == 1, "the engine to start")
        assert not await stage.edge.drain(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_cancelled_call_leaves_the_queue(stage: Stage) -> None:
    address = await stage.edge.listen("127.0.0.1", 0)
    stage.publish()
    stage.engine.gate.clear()
    async with grpc.aio.insecure_channel(address) as channel:
        act = raw_act(channel)
        busy = act(request(), timeout=PATIENCE_S)
        await until(lambda: len(stage.engine.batches) == 1, "the engine to start")
        gone, kept = (
            act(request(tensor(rows(2))), timeout=PATIENCE_S),
            act(request(tensor(rows(1))), timeout=PATIENCE_S),
        )
        await until(lambda: stage.batcher.waiting_rows == 3, "both to wait")
        gone.cancel()
        await until(lambda: stage.batcher.waiting_rows == 1, "the cancelled one to leave")
        stage.engine.gate.set()
        await asyncio.gather(busy, kept)
        assert [len(batch) for batch in stage.engine.batches] == [1, 1]


async def test_an_expired_call_is_not_run(stage: Stage) -> None:
    address = await stage.edge.listen("127.0.0.1", 0)
    stage.publish()
    stage.engine.gate.clear()
    async with grpc.aio.insecure_channel(address) as channel:
        act = raw_act(channel)
        busy = act(request(), timeout=PATIENCE_S)
        await until(lambda: len(stage.engine.batches) == 1, "the engine to start")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await act(request(tensor(rows(2))), timeout=0.2)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The caller's clock may be the first to say so; the rows leave once the server knows, too.
        await until(lambda: stage.batcher.waiting_rows == 0, "the expired one to leave")
        stage.engine.gate.set()
        await busy
        await act(request(), timeout=PATIENCE_S)
        assert [len(batch) for batch in stage.engine.batches] == [1, 1]


async def test_a_defect_of_the_server_is_internal_without_a_word_of_it() -> None:
    class DefectiveService(PolicyService):
        async def act(self, request: ActRequest, deadline_ns: int) -> ActReply:
            raise KeyError("/secret/path\n")

    stage = Stage(DefectiveService)
    address = await stage.edge.listen("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await raw_act(channel)(request(), timeout=PATIENCE_S)
    assert error.value.code() is INTERNAL
    assert text_of(error.value).startswith("INTERNAL_ERROR: the request could not be answered, id ")
    assert_clean(error.value)
    await stage.edge.drain(0)
    stage.batcher.close()


async def test_nobody_shares_the_port(stage: Stage) -> None:
    """`SO_REUSEPORT`, gRPC's default, would let a second server take half of the connections."""
    address = await stage.edge.listen("127.0.0.1", 0)
    with socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="Address already in use"):
            second.bind(("127.0.0.1", int(address.rpartition(":")[2])))


async def test_a_taken_port_is_refused(stage: Stage) -> None:
    address = await stage.edge.listen("127.0.0.1", 0)
    second = Stage()
    with pytest.raises(StartError, match=r"^ADDRESS_UNAVAILABLE: could not listen on 127\.0\.0\.1:"):
        await second.edge.listen("127.0.0.1", int(address.rpartition(":")[2]))
    await second.edge.drain(0)
    second.batcher.close()
