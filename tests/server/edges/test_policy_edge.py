"""`lom_server.edges.policy_edge` through real sockets: bad inputs have their status and reason, also on a stream."""

import asyncio
import re
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from lom_api.codec import pack_array, unpack_tensor
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2, policy_pb2_grpc
from lom_server.batcher import Lane, MicroBatcher
from lom_server.config import ServerConfig
from lom_server.edges import policy_edge
from lom_server.edges.listener import Call, Listener, ListenerLimits
from lom_server.edges.policy_edge import MAX_UNANSWERED, MOST_SPECS_KEPT, PolicyEdge
from lom_server.loading import load_policy
from lom_server.service import ActReply, ActRequest, PolicyService, PolicyVersions, ServedPolicy
from tests.support.bundles import (
    COMPONENT_MEANS,
    NUM_COMPONENTS,
    POLICY,
    STATE_THRESHOLD,
    Flaws,
    actor_action,
    golden_observations,
    greedy_action,
    greedy_margin,
    greedy_mode,
    toy_manifest,
    write_test_bundle,
)
from tests.support.engines import BurningEngine

PATIENCE_S = 20.0
ACT = "/lom_api.v1.PolicyService/Act"
ACT_STREAM = "/lom_api.v1.PolicyService/ActStream"
OBSERVATION = np.array([[0.1, 0.3, 0.2]], dtype=np.float32)
NAN_ABOVE = 100.0
RAISE_ABOVE = 200.0
MAX_BATCH_ROWS = 16
EOF = grpc.aio.EOF

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


def modes(*values: int) -> policy_pb2.Tensor:
    return pack_array(np.array(values, dtype=np.int32), "previous_mode")


def hysteresis(*previous: int, width: float = 0.0) -> policy_pb2.Hysteresis:
    return policy_pb2.Hysteresis(previous_mode=modes(*previous), width=width)


def raw_act(channel: Any) -> Any:
    """`Act` without a serialiser: what is sent need not be a message."""
    return channel.unary_unary(ACT)


def assert_clean(message: str) -> None:
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
    "unknown version": (request(version=2), NOT_FOUND, "VERSION_NOT_FOUND: version: expected one of 1, got 2"),
    "version past 2**31": (request(version=2**31), INVALID, "BAD_VERSION: "),
    "unknown variant": (
        request(variant="greedy"),
        INVALID,
        "UNKNOWN_VARIANT: variant: expected one of 'greedy_mode', 'actor', got 'greedy'",
    ),
    "variant as a path": (request(variant="../actor"), INVALID, "UNKNOWN_VARIANT: "),
    "another contract": (request(contract_hash="0" * 64), PRECONDITION, "CONTRACT_MISMATCH: contract_hash: expected "),
    # The options
    "unknown priority": (
        request(priority=7),
        INVALID,
        "BAD_OPTION: priority: expected 0 (live) or 1 (batch), got 7",
    ),
    "mode past the last": (request(mode=3), INVALID, "BAD_OPTION: mode: expected 0 to 2, got 3"),
    "negative mode": (request(mode=-1), INVALID, "BAD_OPTION: mode: expected 0 to 2, got -1"),
    "explained actor": (request(variant="actor", explain=True), INVALID, "BAD_OPTION: variant 'actor': expected none"),
    "forced actor": (request(variant="actor", mode=0), INVALID, "BAD_OPTION: variant 'actor': expected none"),
    "sampled actor": (request(variant="actor", sampling_seed=0), INVALID, "BAD_OPTION: variant 'actor': expected none"),
    "actor with hysteresis": (request(variant="actor", hysteresis=hysteresis(0)), INVALID, "BAD_OPTION: variant"),
    "negative width": (request(hysteresis=hysteresis(0, width=-1)), INVALID, "BAD_OPTION: hysteresis width: "),
    "width NaN": (request(hysteresis=hysteresis(0, width=np.nan)), INVALID, "BAD_OPTION: hysteresis width: "),
    "width alone": (
        request(hysteresis=policy_pb2.Hysteresis(width=1)),
        INVALID,
        "BAD_OPTION: hysteresis: expected a previous mode beside its width",
    ),
    "previous modes of other rows": (request(hysteresis=hysteresis(0, 1)), INVALID, "BAD_OPTION: previous mode: "),
    "previous mode past the last": (request(hysteresis=hysteresis(3)), INVALID, "BAD_OPTION: previous mode: "),
    "previous mode in float32": (
        request(hysteresis=policy_pb2.Hysteresis(previous_mode=tensor([0.0]))),
        INVALID,
        "BAD_OPTION: previous mode: expected int32[1], got float32[1]",
    ),
    "previous mode without data": (
        request(hysteresis=policy_pb2.Hysteresis(previous_mode=tensor([0.0], data=b""))),
        INVALID,
        "SIZE_MISMATCH: previous mode: expected 4 bytes, got 0",
    ),
    # The model
    "NaN action": (request(tensor([[NAN_ABOVE + 1, 0, 0]])), INTERNAL, "NON_FINITE_ACTION: row 0"),
    "the runtime raises": (
        request(tensor([[RAISE_ABOVE + 1, 0, 0]])),
        INTERNAL,
        "INFERENCE_FAILED: the policy could not be run, id ",
    ),
}


@contextmanager
def serving(path: Path, **choices: Any) -> Iterator[str]:
    """The address of the bundle at `path` behind its edge, in a thread of its own, for clients that block."""
    config = ServerConfig(models=path, max_batch_rows=MAX_BATCH_ROWS, **choices)
    policy = load_policy(POLICY, 1, path, config).policy
    addresses: list[str] = []
    is_listening, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        batcher = MicroBatcher(max_batch_rows=MAX_BATCH_ROWS, max_queue_rows=1000)
        service = PolicyService(batcher=batcher)
        service.publish(POLICY, PolicyVersions(versions={1: policy}, default_version=1))
        listener = Listener(ListenerLimits.of(config))
        PolicyEdge(service).register(listener)
        addresses.append(await listener.listen("127.0.0.1:0"))
        is_listening.set()
        await asyncio.to_thread(is_over.wait)
        await listener.drain(0)
        batcher.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert is_listening.wait(PATIENCE_S)
    try:
        yield addresses[0]
    finally:
        is_over.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def toy_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose policy answers NaN above `NAN_ABOVE` and raises above `RAISE_ABOVE`."""
    path = tmp_path_factory.mktemp("bundles") / "toy"
    write_test_bundle(path, flaws=Flaws(nan_above=NAN_ABOVE, raise_above=RAISE_ABOVE))
    with serving(path) as address:
        yield address


@pytest.fixture
def toy_channel(toy_address: str) -> Iterator[grpc.Channel]:
    """A channel to it, with a connection of its own."""
    with grpc.insecure_channel(toy_address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_has_its_status_and_reason(toy_channel: grpc.Channel, name: str) -> None:
    message, code, start = BAD_REQUESTS[name]
    with pytest.raises(grpc.RpcError) as error:
        raw_act(toy_channel)(message, timeout=PATIENCE_S)
    assert error.value.code() is code
    assert str(error.value.details()).startswith(start)
    assert_clean(str(error.value.details()))
    # The server is as before: the same connection gets its answer.
    raw_act(toy_channel)(request(), timeout=PATIENCE_S)


def asked(channel: Any, messages: list[bytes]) -> list[policy_pb2.ActStreamReply]:
    """The answers to `messages`, sent on one stream by a client that blocks."""
    stream = channel.stream_stream(ACT_STREAM, response_deserializer=policy_pb2.ActStreamReply.FromString)
    return list(stream(iter(messages), timeout=PATIENCE_S))


@pytest.mark.parametrize("name", set(BAD_REQUESTS) - {"another contract"})
def test_a_bad_request_on_a_stream_is_refused_alike_and_the_stream_lives(toy_channel: grpc.Channel, name: str) -> None:
    message, code, start = BAD_REQUESTS[name]
    answers = asked(toy_channel, [message, request(sequence=1), message + b"\x28\x02", request(sequence=3)])
    assert len(answers) == 4
    replies = {answer.sequence: answer.reply for answer in answers if answer.HasField("reply")}
    refusals = [answer for answer in answers if answer.HasField("refusal")]
    assert sorted(replies) == [1, 3]
    is_message = code is not INTERNAL or not start.startswith("BAD_MESSAGE")
    assert sorted(answer.sequence for answer in refusals) == ([0, 2] if is_message else [0, 0])
    for answer in refusals:
        assert answer.refusal.code == code.value[0]
        assert answer.refusal.message.startswith(start)
        assert answer.refusal.retry_after_ms == 0
        assert_clean(answer.refusal.message)


def test_the_largest_allowed_request_fits_the_cap(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "toy")
    with serving(tmp_path / "toy", max_message_bytes=65536 + 60) as address, grpc.insecure_channel(address) as channel:
        reply = policy_pb2.ActReply.FromString(raw_act(channel)(request(tensor(rows(5))), timeout=PATIENCE_S))
        assert list(reply.action.shape) == [5, 2]
        with pytest.raises(grpc.RpcError) as error:
            raw_act(channel)(request(tensor(rows(6))), timeout=PATIENCE_S)
        assert "expected at most 5 rows, got 6" in str(error.value.details())


def test_answers_are_the_hand_worked_ones(toy_channel: grpc.Channel) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(toy_channel)
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
    assert not greedy.HasField("explanation")
    assert not greedy.is_clamped
    actor = stub.Act(policy_pb2.ActRequest(policy=POLICY, variant="actor", inputs=[tensor(observation)]))
    np.testing.assert_allclose(unpack_tensor(actor.action), actor_action(observation), rtol=1e-6)
    assert not actor.HasField("mode")
    assert not actor.HasField("margin")
    assert (
        actor.bundle_digest
        == greedy.bundle_digest
        == stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest()).bundle_digest
    )


def test_scores_say_which_rows_are_worth_a_warning(toy_channel: grpc.Channel) -> None:
    observation = [[0.5, -0.5, 0.25], [1.0, -2.0, 0.5], [2.5, 0.0, 0.0]]  # sums 1.25, 3.5 and 2.5
    message = raw_act(toy_channel)(request(tensor(observation)), timeout=PATIENCE_S)
    (score,) = policy_pb2.ActReply.FromString(message).scores
    assert (score.name, score.threshold) == ("state_score", STATE_THRESHOLD)
    np.testing.assert_array_equal(unpack_tensor(score.values), [1.25, 3.5, 2.5])
    assert list(score.warns) == [False, True, False]


def test_every_option_arrives(toy_channel: grpc.Channel) -> None:
    def act(**fields: Any) -> policy_pb2.ActReply:
        return policy_pb2.ActReply.FromString(raw_act(toy_channel)(request(**fields), timeout=PATIENCE_S))

    def action(**fields: Any) -> Any:
        return unpack_tensor(act(**fields).action)

    explanation = act(explain=True).explanation  # of the observation 0.1, 0.3, 0.2: component 1
    np.testing.assert_allclose(unpack_tensor(explanation.hyper_q), OBSERVATION)
    np.testing.assert_allclose(unpack_tensor(explanation.mixing_weights), np.full((1, NUM_COMPONENTS), 1 / 3))
    np.testing.assert_allclose(unpack_tensor(explanation.component_means), COMPONENT_MEANS[None])
    np.testing.assert_allclose(unpack_tensor(explanation.component_log_stds), np.full((1, NUM_COMPONENTS, 2), -1.0))
    np.testing.assert_array_equal(action(), COMPONENT_MEANS[[1]])
    for mode in range(NUM_COMPONENTS):  # 0 as well: absent is not 0
        np.testing.assert_array_equal(action(mode=mode), COMPONENT_MEANS[[mode]])
    sampled = action(sampling_seed=0)  # likewise
    assert not np.array_equal(sampled, COMPONENT_MEANS[[1]])
    np.testing.assert_array_equal(action(sampling_seed=0), sampled)
    assert not np.array_equal(action(sampling_seed=2**64 - 1), sampled)
    # Component 1 is 0.1 better than component 2, and 0.2 better than component 0.
    np.testing.assert_array_equal(action(hysteresis=hysteresis(2, width=0.15)), COMPONENT_MEANS[[2]])
    np.testing.assert_array_equal(action(hysteresis=hysteresis(0, width=0.15)), COMPONENT_MEANS[[1]])
    np.testing.assert_array_equal(action(hysteresis=hysteresis(-1, width=9)), COMPONENT_MEANS[[1]])
    np.testing.assert_array_equal(action(priority=policy_pb2.PRIORITY_BATCH), COMPONENT_MEANS[[1]])
    np.testing.assert_array_equal(action(version=1, contract_hash=toy_manifest().contract_hash), COMPONENT_MEANS[[1]])


def test_the_spec_is_the_bundles(toy_channel: grpc.Channel) -> None:
    stub = policy_pb2_grpc.PolicyServiceStub(toy_channel)
    spec = stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest(), timeout=PATIENCE_S)
    assert spec == stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest(policy=POLICY, version=1), timeout=PATIENCE_S)
    assert spec.contract_hash == toy_manifest().contract_hash
    assert [(space.name, list(space.shape)) for space in spec.inputs] == [("observation", [3])]
    assert (list(spec.action.low), list(spec.action.high)) == ([-1, -1], [1, 1])
    assert list(spec.inputs[0].high) == [np.inf] * 3
    assert sorted(spec.variants) == ["actor", "greedy_mode"]
    assert (spec.policy, spec.version, spec.default_variant) == (POLICY, 1, "greedy_mode")
    assert (spec.num_components, spec.max_batch_rows) == (3, MAX_BATCH_ROWS)
    assert spec.execution_provider == "CPUExecutionProvider"
    untyped_channel: Any = toy_channel
    get_spec = untyped_channel.unary_unary("/lom_api.v1.PolicyService/GetPolicySpec")
    for message, code in (
        (policy_pb2.GetPolicySpecRequest(policy="other").SerializeToString(), NOT_FOUND),
        (policy_pb2.GetPolicySpecRequest(policy=POLICY, version=2).SerializeToString(), NOT_FOUND),
        (b"\xff", INTERNAL),
    ):
        with pytest.raises(grpc.RpcError) as error:
            get_spec(message, timeout=PATIENCE_S)
        assert error.value.code() is code
        assert_clean(str(error.value.details()))


def test_unknown_fields_are_ignored(toy_channel: grpc.Channel) -> None:
    raw_act(toy_channel)(request() + b"\xf8\x3f\x01", timeout=PATIENCE_S)


def test_a_stream_answers_as_single_calls_do(toy_channel: grpc.Channel) -> None:
    observations = golden_observations()
    answers = asked(
        toy_channel, [request(tensor(row[None]), sequence=number) for number, row in enumerate(observations)]
    )
    assert sorted(answer.sequence for answer in answers) == list(range(len(observations)))
    for answer in answers:
        message = raw_act(toy_channel)(request(tensor(observations[[answer.sequence]]), sequence=answer.sequence))
        single = policy_pb2.ActReply.FromString(message)
        for reply in (single, answer.reply):
            reply.ClearField("timings")
        assert answer.reply == single


# With the event loop in hand: a fake engine behind the edge.


class Stage:
    """An edge over a real service and batcher, with an engine that can be held.

    Its actions are twice the observation.
    """

    def __init__(self, **limits: Any) -> None:
        self.engine = BurningEngine()
        self.batcher = MicroBatcher(max_batch_rows=4, max_queue_rows=1000)
        self.service = PolicyService(batcher=self.batcher)
        self.edge = PolicyEdge(self.service)
        config = ServerConfig(models=Path("unused"))
        self.listener = Listener(replace(ListenerLimits.of(config), **limits))
        self.edge.register(self.listener)
        self.address = ""
        self.action = replace(toy_manifest().inputs[0], name="action")

    def publish(self, *digests: str) -> None:
        """Versions 1, 2 ... with those digests."""
        versions = {number: self._served(number, digest) for number, digest in enumerate(digests or ("0" * 64,), 1)}
        self.service.publish(POLICY, PolicyVersions(versions=versions, default_version=max(versions)))

    def _served(self, version: int, digest: str) -> ServedPolicy:
        manifest = replace(toy_manifest(), action=self.action)
        lane = Lane(engine=self.engine, graph="actor", outputs=("action",), inline_rows=0)
        return ServedPolicy(
            name=POLICY,
            version=version,
            manifest=manifest,
            bundle_digest=digest,
            lanes={"actor": lane, "greedy_mode": lane},
            provider="CPUExecutionProvider",
            max_batch_rows=4,
        )

    async def hold(self, channel: Any) -> Any:
        """A call that the engine is busy with until `engine.gate` is set."""
        self.engine.gate.clear()
        started = len(self.engine.batches)
        busy = raw_act(channel)(request(tensor([[9, 9, 9]])), timeout=PATIENCE_S)
        await until(lambda: len(self.engine.batches) > started, "the engine to start")
        return busy


def connected(address: str, *options: tuple[str, int]) -> Any:
    """A channel with a connection of its own; untyped, as it sends raw bytes."""
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1), *options])


@asynccontextmanager
async def staged(*, is_published: bool = True, **limits: Any) -> AsyncIterator[tuple[Stage, Any]]:
    """A stage, and a channel to it."""
    stage = Stage(**limits)
    if is_published:
        stage.publish()
    stage.address = await stage.listener.listen("127.0.0.1:0")
    try:
        async with connected(stage.address) as channel:
            yield stage, channel
    finally:
        stage.engine.gate.set()
        await stage.listener.drain(0)
        stage.batcher.close()


class Stream:
    """One client's end of `ActStream`."""

    def __init__(self, channel: Any, **options: Any) -> None:
        options = {"timeout": PATIENCE_S, **options}
        self.call = channel.stream_stream(ACT_STREAM, response_deserializer=policy_pb2.ActStreamReply.FromString)(
            **options
        )

    async def send(self, sequence: int, value: float = 1.0, **fields: Any) -> None:
        await self.call.write(request(tensor(np.full((1, 3), value)), sequence=sequence, **fields))

    async def answer(self) -> policy_pb2.ActStreamReply:
        answer = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        assert isinstance(answer, policy_pb2.ActStreamReply)
        return answer

    async def answers(self, count: int) -> dict[int, str]:
        """`OK` or the reason of the refusal, by sequence."""
        return {answer.sequence: outcome(answer) for answer in [await self.answer() for _ in range(count)]}


def outcome(answer: policy_pb2.ActStreamReply) -> str:
    return "OK" if answer.HasField("reply") else answer.refusal.message.partition(":")[0]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        await asyncio.sleep(0.002)


async def test_a_policy_that_is_still_being_checked() -> None:
    async with staged(is_published=False) as (stage, channel):
        stage.service.withdraw(POLICY, Reason.MODEL_LOADING)
        error = await refusal(raw_act(channel)(request(), timeout=PATIENCE_S))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert str(error.details()).startswith("MODEL_LOADING: ")
        stream = Stream(channel)
        await stream.send(1)
        answer = await stream.answer()
        assert outcome(answer) == "MODEL_LOADING"
        assert answer.refusal.retry_after_ms == 1000
        stage.publish()
        await stream.send(2)
        assert await stream.answers(1) == {2: "OK"}


async def test_a_drain_loses_no_accepted_request() -> None:
    async with staged() as (stage, channel):
        stage.engine.gate.clear()
        act = raw_act(channel)
        accepted = [act(request(tensor(np.full((1, 3), value))), timeout=PATIENCE_S) for value in range(20)]
        await until(lambda: len(stage.engine.batches) == 1, "the engine to start")
        running = len(stage.engine.batches[0])
        await until(lambda: stage.batcher.waiting_rows == 20 - running, "all twenty to be accepted")
        draining = asyncio.create_task(stage.listener.drain(PATIENCE_S))
        error = await refusal(act(request(), timeout=PATIENCE_S))
        assert str(error.details()).startswith("DRAINING: ")
        assert not draining.done()
        stage.engine.gate.set()
        replies = [policy_pb2.ActReply.FromString(await call) for call in accepted]
        for value, reply in enumerate(replies):
            np.testing.assert_array_equal(unpack_tensor(reply.action), np.full((1, 3), 2 * value))
        assert await draining


async def test_a_drain_answers_what_streams_have_asked() -> None:
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        streams = [Stream(channel) for _ in range(3)]
        for stream in streams:
            for sequence in range(5):
                await stream.send(sequence, value=sequence)
        await until(lambda: stage.batcher.waiting_rows == 15, "all of them to be accepted")
        draining = asyncio.create_task(stage.listener.drain(PATIENCE_S))
        await until(lambda: stage.listener.open_streams == 3, "the drain to begin")
        stage.engine.gate.set()
        await busy
        for stream in streams:
            answers = [await stream.answer() for _ in range(5)]
            for answer in answers:
                np.testing.assert_array_equal(unpack_tensor(answer.reply.action), np.full((1, 3), 2 * answer.sequence))
            error = await refusal(stream.call.read())
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert str(error.details()).startswith("DRAINING: ")
        assert await draining


async def test_a_cancelled_call_leaves_the_queue() -> None:
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        act = raw_act(channel)
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


async def test_an_expired_call_is_not_run() -> None:
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        act = raw_act(channel)
        error = await refusal(act(request(tensor(rows(2))), timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The caller's clock may be the first to say so; the rows leave once the server knows, too.
        await until(lambda: stage.batcher.waiting_rows == 0, "the expired one to leave")
        stage.engine.gate.set()
        await busy
        await act(request(), timeout=PATIENCE_S)
        assert [len(batch) for batch in stage.engine.batches] == [1, 1]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_budget_that_is_over_is_not_run(is_stream: bool) -> None:
    async with staged(default_deadline_s=30, max_deadline_s=30) as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        calls = []
        for sequence, budget_ns in enumerate([5 * 10**7, 10**10, 0], 1):
            if is_stream:
                await stream.send(sequence, budget_ns=budget_ns)
            else:
                calls.append(raw_act(channel)(request(budget_ns=budget_ns), timeout=PATIENCE_S))
        await until(lambda: stage.batcher.waiting_rows == 3, "all of them to wait")
        await asyncio.sleep(0.06)  # the first budget's time
        stage.engine.gate.set()
        await busy
        if is_stream:
            assert await stream.answers(3) == {1: "DEADLINE_EXCEEDED", 2: "OK", 3: "OK"}
        else:
            error = await refusal(calls[0])
            assert str(error.details()).startswith("DEADLINE_EXCEEDED: ")
            await asyncio.gather(*calls[1:])
        assert [len(batch) for batch in stage.engine.batches] == [1, 2]


async def test_a_request_of_a_stream_is_granted_the_default() -> None:
    async with staged(default_deadline_s=0.05) as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        await stream.send(1)
        await stream.send(2, budget_ns=10**10)
        await until(lambda: stage.batcher.waiting_rows == 2, "both to wait")
        await asyncio.sleep(0.06)  # the default's time
        stage.engine.gate.set()
        await busy
        assert await stream.answers(2) == {1: "DEADLINE_EXCEEDED", 2: "OK"}


async def test_the_client_and_its_priority_reach_the_batcher(monkeypatch: pytest.MonkeyPatch) -> None:
    async with staged() as (stage, channel):
        seen: list[tuple[str, int]] = []
        submit = stage.batcher.submit

        def spy(*arguments: Any, **options: Any) -> Any:
            seen.append((options["client"], options["priority"]))
            return submit(*arguments, **options)

        monkeypatch.setattr(stage.batcher, "submit", spy)
        await raw_act(channel)(request(priority=policy_pb2.PRIORITY_BATCH), timeout=PATIENCE_S)
        stream = Stream(channel)
        await stream.send(1)
        assert await stream.answers(1) == {1: "OK"}
        (client, priority), (same_client, other_priority) = seen
        assert client == same_client
        assert client.startswith("ipv4:127.0.0.1:")
        assert (priority, other_priority) == (policy_pb2.PRIORITY_BATCH, policy_pb2.PRIORITY_LIVE)


async def test_an_action_that_had_to_be_cut_says_so() -> None:
    async with staged(is_published=False) as (stage, channel):
        stage.action = replace(stage.action, low=(-1.0,) * 3, high=(1.0,) * 3)
        stage.publish()
        for value, is_clamped in ((0.5, False), (0.75, True)):  # the engine answers twice the observation
            message = await raw_act(channel)(request(tensor([[value, 0, -value]])), timeout=PATIENCE_S)
            reply = policy_pb2.ActReply.FromString(message)
            np.testing.assert_array_equal(unpack_tensor(reply.action), [[1, 0, -1]])
            assert reply.is_clamped is is_clamped


# Streams.


async def test_answers_come_when_they_are_ready_not_in_order() -> None:
    """A full batch runs while a small request would wait: whoever is served first is answered first."""
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        await stream.call.write(request(tensor(rows(4)), sequence=1, priority=policy_pb2.PRIORITY_BATCH))
        await stream.send(2)
        await until(lambda: stage.batcher.waiting_rows == 5, "both to wait")
        stage.engine.gate.set()
        await busy
        assert [(await stream.answer()).sequence for _ in range(2)] == [2, 1]


@pytest.mark.parametrize("again", [5, 4, 0])
async def test_a_sequence_has_to_increase(again: int) -> None:
    async with staged() as (_, channel):
        stream = Stream(channel)
        await stream.send(5)
        assert await stream.answers(1) == {5: "OK"}
        await stream.send(again)
        answer = await stream.answer()
        assert answer.sequence == again
        assert answer.refusal.code == INVALID.value[0]
        assert answer.refusal.message == f"SEQ_NOT_INCREASING: sequence: expected more than 5, got {again}"
        await stream.send(6)
        assert await stream.answers(1) == {6: "OK"}


async def test_a_stream_may_begin_with_any_sequence() -> None:
    async with staged() as (_, channel):
        for first in (0, 2**64 - 1):
            stream = Stream(channel)
            await stream.send(first)
            assert await stream.answers(1) == {first: "OK"}


async def test_a_broken_message_is_answered_as_sequence_0_and_the_stream_lives() -> None:
    async with staged() as (_, channel):
        stream = Stream(channel)
        await stream.send(7)
        await stream.call.write(b"\xff")
        await stream.send(8)
        assert await stream.answers(3) == {7: "OK", 0: "BAD_MESSAGE", 8: "OK"}


async def test_another_contract_ends_the_stream_after_what_was_asked_before() -> None:
    async with staged(stream_idle_s=3600) as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        await stream.send(1)
        await until(lambda: stage.batcher.waiting_rows == 1, "the first to wait")
        await stream.send(2, contract_hash="0" * 64)
        answer = await stream.answer()
        assert (answer.sequence, outcome(answer)) == (2, "CONTRACT_MISMATCH")
        assert answer.refusal.code == PRECONDITION.value[0]
        stage.engine.gate.set()
        await busy
        assert await stream.answers(1) == {1: "OK"}
        error = await refusal(stream.call.read())
        assert error.code() is PRECONDITION
        assert error.details() == answer.refusal.message
        await until(lambda: stage.listener.open_streams == 0, "the stream to end")


async def test_an_engine_that_fails_fails_its_request_and_not_the_stream() -> None:
    async with staged() as (stage, channel):
        stage.engine.failures.append(RuntimeError("/secret/path"))
        stream = Stream(channel)
        await stream.send(1)
        answer = await stream.answer()
        assert outcome(answer) == "INFERENCE_FAILED"
        assert_clean(answer.refusal.message)
        await stream.send(2)
        assert await stream.answers(1) == {2: "OK"}


async def test_the_end_of_the_requests_waits_for_their_answers() -> None:
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        for sequence in range(10):
            await stream.send(sequence)
        await stream.call.done_writing()
        await until(lambda: stage.batcher.waiting_rows == 10, "all of them to wait")
        stage.engine.gate.set()
        await busy
        assert await stream.answers(10) == dict.fromkeys(range(10), "OK")
        assert await stream.call.read() is EOF
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_a_superseded_request_is_not_run() -> None:
    async with staged() as (stage, channel):
        stream, other = Stream(channel), Stream(channel)
        stage.engine.gate.clear()
        await stream.send(1, value=1)
        await until(lambda: len(stage.engine.batches) == 1, "the first to run")
        await other.send(1, value=9)
        await stream.send(2, value=2)
        await stream.send(3, value=3)
        await until(lambda: stage.batcher.waiting_rows == 3, "the others to wait")
        await stream.send(4, value=4, supersede=True)
        answers = [await stream.answer() for _ in range(2)]
        assert [answer.sequence for answer in answers] == [2, 3]
        for answer in answers:
            assert answer.refusal.code == grpc.StatusCode.ABORTED.value[0]
            assert outcome(answer) == "SUPERSEDED"
            assert_clean(answer.refusal.message)
        await until(lambda: stage.batcher.waiting_rows == 2, "the superseded ones to leave")
        stage.engine.gate.set()
        assert await stream.answers(2) == {1: "OK", 4: "OK"}  # the first one ran already
        assert await other.answers(1) == {1: "OK"}
        assert sorted(float(row[0]) for batch in stage.engine.batches for row in batch) == [1, 4, 9]


async def test_what_waits_is_superseded_even_if_nothing_of_its_stream_runs() -> None:
    """Else a stream that shares the engine would be answered by its oldest observation, for ever."""
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        for sequence in range(3):
            await stream.send(sequence, value=sequence, supersede=True)
        assert await stream.answers(2) == {0: "SUPERSEDED", 1: "SUPERSEDED"}
        await until(lambda: stage.batcher.waiting_rows == 1, "the superseded ones to leave")
        stage.engine.gate.set()
        await busy
        assert await stream.answers(1) == {2: "OK"}
        assert [float(row[0]) for batch in stage.engine.batches for row in batch] == [9, 2]


async def test_every_request_of_a_superseding_stream_is_answered_once() -> None:
    async with staged() as (stage, channel):
        stream = Stream(channel)
        outcomes: dict[int, str] = {}

        async def collect() -> None:
            while (answer := await stream.call.read()) is not EOF:
                assert answer.sequence not in outcomes
                outcomes[answer.sequence] = outcome(answer)

        collecting = asyncio.create_task(collect())
        for sequence in range(300):
            await stream.send(sequence, supersede=True)
        await stream.call.done_writing()
        await asyncio.wait_for(collecting, PATIENCE_S)
        assert sorted(outcomes) == list(range(300))
        assert set(outcomes.values()) <= {"OK", "SUPERSEDED"}
        assert outcomes[299] == "OK"
        assert stage.batcher.waiting_rows == 0


async def test_requests_that_come_at_once_are_answered_once_each() -> None:
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)

        async def messages() -> AsyncIterator[bytes]:
            for sequence in range(10):  # without a turn of the event loop between them
                yield request(sequence=sequence, supersede=True)

        outcomes: list[tuple[int, str]] = []
        call = Call(deadline_ns=time.monotonic_ns() + int(PATIENCE_S * 1e9), client="robot")
        async for message in stage.edge._act_stream(messages(), call):
            answer = policy_pb2.ActStreamReply.FromString(message)
            outcomes.append((answer.sequence, outcome(answer)))
            if len(outcomes) == 8:
                stage.engine.gate.set()
        await busy
        assert sorted(sequence for sequence, _ in outcomes) == list(range(10))
        assert dict(outcomes)[9] == "OK"


async def test_a_stream_that_is_not_answered_is_not_read() -> None:
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        total = 3 * MAX_UNANSWERED

        async def send_all() -> None:
            for sequence in range(total):
                await stream.send(sequence)

        sending = asyncio.create_task(send_all())
        await until(lambda: stage.batcher.waiting_rows == MAX_UNANSWERED, "as many as may wait")
        async with connected(stage.address) as other_channel:
            other = Stream(other_channel)
            await other.send(1)
            await until(lambda: stage.batcher.waiting_rows == MAX_UNANSWERED + 1, "another stream's")
            stage.engine.gate.set()
            await busy
            assert await other.answers(1) == {1: "OK"}
        assert await stream.answers(total) == dict.fromkeys(range(total), "OK")
        await sending


async def test_answers_that_are_not_read_stop_the_reading_of_requests() -> None:
    """Refusals cost nothing to make: without the bound they would pile up."""
    narrow_window = ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)
    async with (
        staged(slow_reader_s=60, stream_idle_s=60) as (stage, _),
        connected(stage.address, *narrow_window) as channel,
    ):
        stream = Stream(channel, timeout=60)
        padding = b"\xfa\x07\xb8\x17" + bytes(3000)  # a field that the server does not know
        sent = 0

        async def send_all() -> None:
            nonlocal sent
            for _ in range(20_000):
                await stream.call.write(request(sequence=1) + padding)  # all but the first are refused
                sent += 1

        sending = asyncio.create_task(send_all())
        settled = -1
        while settled != sent:
            settled = sent
            await asyncio.sleep(0.5)  # what must not happen has no condition to wait for
        assert not sending.done()
        await stream.answers(MAX_UNANSWERED)
        stream.call.cancel()
        await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.parametrize("how", ["cancel", "deadline", "connection"])
async def test_a_stream_that_is_gone_leaves_the_queue(how: str) -> None:
    async with staged() as (stage, channel):
        busy = await stage.hold(channel)
        async with connected(stage.address) as other_channel:
            stream = Stream(other_channel, timeout=0.5 if how == "deadline" else PATIENCE_S)
            for sequence in range(10):
                await stream.send(sequence)
            await until(lambda: stage.batcher.waiting_rows == 10, "all of them to wait")
            if how == "cancel":
                stream.call.cancel()
            if how == "deadline":
                assert (await refusal(stream.call.read())).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if how == "connection":
                await other_channel.close()
            await until(lambda: stage.batcher.waiting_rows == 0, "all of them to leave")
        await until(lambda: stage.listener.open_streams == 0, "the stream to end")
        stage.engine.gate.set()
        await busy
        assert len(stage.engine.batches) == 1


async def test_a_stream_ends_for_idleness_after_its_answers() -> None:
    async with staged(stream_idle_s=0.2) as (stage, channel):
        busy = await stage.hold(channel)
        stream = Stream(channel)
        await stream.send(1)
        await asyncio.sleep(0.4)  # idle, though not answered
        stage.engine.gate.set()
        await busy
        assert await stream.answers(1) == {1: "OK"}
        error = await refusal(stream.call.read())
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert str(error.details()).startswith("STREAM_IDLE: ")


async def test_a_rate_is_kept_on_a_stream_request_by_request() -> None:
    async with staged(max_requests_per_s=5) as (_, channel):
        stream = Stream(channel)  # opening it is the first
        for sequence in range(8):
            await stream.send(sequence)
        answers = {answer.sequence: answer for answer in [await stream.answer() for _ in range(8)]}
        outcomes = [outcome(answers[sequence]) for sequence in range(8)]
        assert outcomes[:4] == ["OK"] * 4
        assert outcomes[-1] == "RATE_LIMITED"
        assert answers[7].refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert 1 <= answers[7].refusal.retry_after_ms <= 1000


async def test_specs_are_made_once_and_those_of_the_past_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    spec_message = policy_edge._spec_message

    def spy(policy: ServedPolicy) -> policy_pb2.PolicySpec:
        made.append(policy.version)
        return spec_message(policy)

    monkeypatch.setattr(policy_edge, "_spec_message", spy)
    async with staged() as (stage, channel):
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        for number in range(2 * MOST_SPECS_KEPT):
            stage.publish("0" * 64, f"{number:064d}")
            for _ in range(2):
                spec = await stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest(), timeout=PATIENCE_S)
                assert (spec.version, spec.bundle_digest) == (2, f"{number:064d}")
            old = await stub.GetPolicySpec(policy_pb2.GetPolicySpecRequest(version=1), timeout=PATIENCE_S)
            assert (old.version, old.bundle_digest) == (1, "0" * 64)
        assert made.count(2) == 2 * MOST_SPECS_KEPT
        assert made.count(1) <= 3
        assert len(stage.edge._spec_messages) == MOST_SPECS_KEPT


class Refusals:
    """What an observer of the service is told of refusals."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Reason]] = []

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        pass

    def refused(self, policy: str, reason: Reason) -> None:
        self.seen.append((policy, reason))


async def test_what_is_refused_before_the_service_sees_it_is_counted_once() -> None:
    batcher = MicroBatcher(max_batch_rows=1, max_queue_rows=1)
    refusals = Refusals()
    listener = Listener(ListenerLimits.of(ServerConfig(models=Path("models"))))
    PolicyEdge(PolicyService(batcher=batcher, observer=refusals)).register(listener)
    address = await listener.listen("127.0.0.1:0")
    no_such_priority = request(priority=7, sequence=1)
    async with grpc.aio.insecure_channel(address) as channel:
        for message in (b"\xff", no_such_priority, request()):
            with pytest.raises(grpc.aio.AioRpcError):
                await raw_act(channel)(message, timeout=PATIENCE_S)
        unary, refusals.seen = refusals.seen, []
        stream: Any = channel.stream_stream(ACT_STREAM)(timeout=PATIENCE_S)
        for message in (b"\xff", no_such_priority, request(sequence=1), request(sequence=2)):
            await stream.write(message)
            assert await stream.read() is not EOF
    await listener.drain(0)
    batcher.close()
    reasons = [Reason.BAD_MESSAGE, Reason.BAD_OPTION, Reason.MODEL_NOT_FOUND]
    assert unary == [("", reason) for reason in reasons]
    assert refusals.seen == [("", reason) for reason in (*reasons[:2], Reason.SEQ_NOT_INCREASING, reasons[2])]
