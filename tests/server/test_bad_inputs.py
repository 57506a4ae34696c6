"""Every bad input of the table has its status, its reason code and a clean message, from a real `lom-serve`.

Rows B01 to B93. What is no business of a server, or needs a defect to be seen, is named with the reason.
"""

import contextlib
import os
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from onnx import TensorProto, helper

from lom_api.codec import pack_array
from lom_api.v1 import admin_pb2, policy_pb2
from lom_server.edges.oip_schema import message_type
from tests.support.bundles import Flaws, toy_graphs, write_test_bundle, write_test_repository
from tests.support.servers import PATIENCE_S, running_server

SERVICE = "/lom_api.v1.PolicyService"
ADMIN = "/lom_api.v1.AdminService"
OIP = "/inference.GRPCInferenceService"
OBSERVATION = np.array([[0.1, 0.3, 0.2]], dtype=np.float32)
MAX_BATCH_ROWS = 16
MESSAGE_CAP_BYTES = 128 * 1024
BOUND = 10.0
NAN_ABOVE, RAISE_ABOVE, OVERSHOOT_ABOVE = 100.0, 200.0, 50.0
TOKENS = {"admin": "token-of-the-admin-1", "patient": "token-of-patient-rob", "greedy": "token-of-greedy-robo"}

OK = grpc.StatusCode.OK
INVALID = grpc.StatusCode.INVALID_ARGUMENT
INTERNAL = grpc.StatusCode.INTERNAL
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED
EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

# REASON_CODE: text; one line of printable ASCII; no path, no class, no address, no library's text.
CLEAN_MESSAGE = re.compile(r"[A-Z][A-Z_]+: [ -~]{1,240}")
UNCLEAN = re.compile(r"Traceback|\.py\b|0x[0-9a-f]{4,}|<class|Error\b|Exception|onnxruntime|/tmp/|/home/|site-packages")

ELSEWHERE: Mapping[str, str] = {
    "B04": "compression cannot be switched on by any setting",
    "B64": "the client refuses before it sends: tests/clients/test_client.py",
    "B65": "the client refuses before it sends: tests/clients/test_client.py",
    "B71": "gRPC's own client refuses before it sends",
    "B72": "a request's id is echoed and nothing else: no log, no metric, no limit depends on it",
    "B83": "a stream has no session: its requests carry all that they need",
    "B88": "a stream has no session that another robot could name",
    "B93": "needs a defect: tests/server/edges/test_listener.py",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a call ended."""

    code: grpc.StatusCode
    message: str = ""
    trailers: Mapping[str, str | bytes] | None = None
    reply: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Servers:
    """What the rows talk to.

    Attributes:
        channel, admin_channel: to a server that takes everybody; untyped, as they send raw bytes.
        guarded_channel, guarded_admin_channel: to one with tokens, few calls at once and a low rate.
        address: of the first.
        repository: its folder.
    """

    channel: Any
    admin_channel: Any
    guarded_channel: Any
    guarded_admin_channel: Any
    address: str
    repository: Path

    def call(self, method: str, message: bytes, *, timeout: float | None = PATIENCE_S, **options: Any) -> Answer:
        return ended(self.channel.unary_unary(method).future(message, timeout=timeout, **options))

    def act(self, message: bytes, **options: Any) -> Answer:
        return self.call(f"{SERVICE}/Act", message, **options)

    def admin(self, method: str, request: Any) -> Answer:
        call = self.admin_channel.unary_unary(f"{ADMIN}/{method}")
        return ended(call.future(request.SerializeToString(), timeout=PATIENCE_S))

    def load(self, policy: str, version: int) -> Answer:
        return self.admin("LoadPolicy", admin_pb2.LoadPolicyRequest(policy=policy, version=version))

    def guarded(self, name: str, message: bytes, *, metadata: Any = None) -> Any:
        metadata = metadata if metadata is not None else (("authorization", f"Bearer {TOKENS[name]}"),)
        call = self.guarded_channel.unary_unary(f"{SERVICE}/Act")
        return call.future(message, timeout=PATIENCE_S, metadata=metadata)


def ended(call: Any) -> Answer:
    code = call.code()
    return Answer(
        code=code,
        message=call.details() or "",
        trailers=dict(call.trailing_metadata() or ()),
        reply=call.result() if code is OK else b"",
    )


def connected(address: str) -> Any:
    """A channel with a connection of its own."""
    return grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


def tensor(array: Any = OBSERVATION, name: str = "observation", **changes: Any) -> policy_pb2.Tensor:
    message = pack_array(np.asarray(array, dtype=np.float32), name)
    for field, value in changes.items():
        if field == "shape":
            message.shape[:] = value
        else:
            setattr(message, field, value)
    return message


def request(*inputs: policy_pb2.Tensor, **fields: Any) -> bytes:
    fields = {"policy": "toy", "inputs": inputs or [tensor()], **fields}
    return policy_pb2.ActRequest(**fields).SerializeToString()


def of_size(size_bytes: int) -> bytes:
    """A request of exactly so many bytes: an unknown field takes what is left."""
    known = request()
    left = size_bytes - len(known) - 2 - 4
    length = bytes([left & 0x7F | 0x80, left >> 7 & 0x7F | 0x80, left >> 14 & 0x7F | 0x80, left >> 21])
    padded = known + b"\xfa\x07" + length + bytes(left)
    assert len(padded) == size_bytes
    return padded


def acts(message: bytes, **options: Any) -> Callable[[Servers], Answer]:
    return lambda servers: servers.act(message, **options)


def infers(datatype: str, content: bytes, shape: tuple[int, ...] = (1, 3)) -> Callable[[Servers], Answer]:
    message = message_type("ModelInferRequest")(model_name="toy", raw_input_contents=[content])
    message.inputs.add(name="observation", datatype=datatype, shape=shape)
    return lambda servers: servers.call(f"{OIP}/ModelInfer", message.SerializeToString())


def of_policy(name: str, version: int = 0) -> Callable[[Servers], Answer]:
    return acts(request(policy=name, version=version))


def loads(policy: str, version: int) -> Callable[[Servers], Answer]:
    return lambda servers: servers.load(policy, version)


def observes(*first: float, policy: str = "toy") -> Callable[[Servers], Answer]:
    return acts(request(tensor([[value, 0.1, 0.2] for value in first]), policy=policy))


def many_messages(count: int) -> Callable[[Servers], Answer]:
    def send(servers: Servers) -> Answer:
        call = servers.channel.stream_unary(f"{SERVICE}/Act")
        return ended(call.future(iter([request()] * count), timeout=PATIENCE_S))

    return send


def compressed(servers: Servers) -> Answer:
    return servers.act(request(), compression=grpc.Compression.Gzip)


def streamed(*messages: bytes, pause_s: float = 0.0) -> Callable[[Servers], Answer]:
    """The last thing that a stream of these messages says: a refusal, or how it ends."""

    def exchange(servers: Servers) -> Answer:
        def send() -> Iterator[bytes]:
            yield from messages
            time.sleep(pause_s)

        call = servers.channel.stream_stream(f"{SERVICE}/ActStream")(send(), timeout=PATIENCE_S)
        last = Answer(code=OK)
        with contextlib.suppress(grpc.RpcError):
            for message in call:
                reply = policy_pb2.ActStreamReply.FromString(message)
                if reply.HasField("refusal"):
                    code = next(code for code in grpc.StatusCode if code.value[0] == reply.refusal.code)
                    last = Answer(code=code, message=reply.refusal.message)
        return last if call.code() is OK else Answer(code=call.code(), message=call.details())

    return exchange


def reads_nothing(servers: Servers) -> Answer:
    stopped = threading.Event()
    sent = 0

    def send() -> Iterator[bytes]:
        nonlocal sent
        for sequence in range(1, 1_000_000):
            if stopped.is_set():
                return
            sent = sequence
            yield request(tensor(np.zeros((MAX_BATCH_ROWS, 3))), sequence=sequence, explain=True)

    with connected(servers.address) as channel:
        call = channel.stream_stream(f"{SERVICE}/ActStream")(send(), timeout=PATIENCE_S)
        settled = -1
        while settled != sent:  # everything is full: answers, requests, the connection
            settled = sent
            time.sleep(1.0)
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        stopped.set()
        return Answer(code=call.code(), message=call.details())


def fills_the_queue(servers: Servers) -> Answer:
    message = request(tensor(np.zeros((MAX_BATCH_ROWS, 3))), policy="slow")
    call = servers.channel.unary_unary(f"{SERVICE}/Act")
    answers = [ended(future) for future in [call.future(message, timeout=PATIENCE_S) for _ in range(12)]]
    refused = [answer for answer in answers if answer.code is not OK]
    assert refused
    assert any(answer.code is OK for answer in answers)
    return refused[0]


def asks_too_often(servers: Servers) -> Answer:
    answers = [ended(servers.guarded("greedy", request())) for _ in range(3)]
    return answers[-1]


def asks_beside_a_long_call(servers: Servers) -> Answer:
    long_call = servers.guarded("patient", request(tensor(np.zeros((MAX_BATCH_ROWS, 3))), policy="slow"))
    try:
        answer = Answer(code=OK)
        while not long_call.done() and answer.code is not EXHAUSTED:
            answer = ended(servers.guarded("admin", b""))
        return answer
    finally:
        long_call.cancel()


def asks_admin_with_the_wrong_role(servers: Servers) -> Answer:
    call = servers.guarded_admin_channel.unary_unary(f"{ADMIN}/ListPolicies")
    return ended(call.future(b"", timeout=PATIENCE_S, metadata=(("authorization", f"Bearer {TOKENS['patient']}"),)))


def without_a_right_token(*metadata: tuple[str, str]) -> Callable[[Servers], Answer]:
    return lambda servers: ended(servers.guarded("", request(), metadata=metadata))


def loads_while_loading(servers: Servers) -> Answer:
    call = servers.admin_channel.unary_unary(f"{ADMIN}/LoadPolicy")
    message = admin_pb2.LoadPolicyRequest(policy="slow", version=1).SerializeToString()
    answers = [ended(future) for future in [call.future(message, timeout=PATIENCE_S) for _ in range(2)]]
    assert sorted(answer.code is OK for answer in answers) == [False, True]
    return next(answer for answer in answers if answer.code is not OK)


def asks_while_it_is_loaded(servers: Servers) -> Answer:
    write_test_bundle(servers.repository / "late" / "1", policy="late", flaws=Flaws(burn_layers=100))
    loading = threading.Thread(target=servers.load, args=("late", 1))
    loading.start()
    answer = servers.act(request(policy="late"))
    while answer.code is NOT_FOUND:  # the server has not heard of the policy yet
        answer = servers.act(request(policy="late"))
    loading.join()
    assert servers.act(request(policy="late")).code is OK
    return answer


def unloads_what_serves(servers: Servers) -> Answer:
    return servers.admin("UnloadPolicy", admin_pb2.UnloadPolicyRequest(policy="toy", version=1))


def loads_an_unsigned_bundle(servers: Servers) -> Answer:
    folder = servers.repository.parent / "signed"
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_test_bundle(folder / "toy" / "1", sign_key=pem)
    write_test_bundle(folder / "toy" / "2")
    public = folder.parent / "trusted.pem"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    admin = f"unix:{folder.parent}/trusting.sock"
    with (
        running_server(folder, "--pin", "toy=1", "--trusted-keys", str(public), "--admin-listen", admin),
        connected(admin) as channel,
    ):
        call = channel.unary_unary(f"{ADMIN}/LoadPolicy")
        message = admin_pb2.LoadPolicyRequest(policy="toy", version=2).SerializeToString()
        return ended(call.future(message, timeout=PATIENCE_S))


def asks_while_it_drains(servers: Servers) -> Answer:
    with (
        running_server(servers.repository, "--pin", "toy=1", "--max-batch-rows", "16") as server,
        connected(server.address) as channel,
    ):
        call = channel.unary_unary(f"{SERVICE}/Act")
        heavy = request(tensor(np.zeros((MAX_BATCH_ROWS, 3))), policy="slow")
        under_way = [call.future(heavy, timeout=PATIENCE_S) for _ in range(20)]
        server.process.terminate()
        # CANCELLED is gRPC's own word for what it had not handed over yet when it closed.
        cancelled = grpc.StatusCode.CANCELLED
        answer = Answer(code=OK)
        while answer.code in (OK, cancelled):
            answer = ended(call.future(request(), timeout=PATIENCE_S))
        codes = {ended(future).code for future in under_way}
        assert codes <= {OK, EXHAUSTED, UNAVAILABLE, cancelled}
        assert server.wait() == 0
        return answer


def raw_bytes(content: bytes) -> Callable[[Servers], Answer]:
    """What is no gRPC at all: the connection is closed, and everybody else is answered."""

    def send(servers: Servers) -> Answer:
        host, port = servers.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
            connection.sendall(content)
            connection.settimeout(PATIENCE_S)
            started = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
            assert time.monotonic() - started < PATIENCE_S
        return servers.act(request())

    return send


def has_a_bad_binary_header(servers: Servers) -> Answer:
    """A request whose `-bin` header is not base64, as no gRPC client would write it."""

    def literal(name: bytes, value: bytes) -> bytes:
        return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = b"".join(
        literal(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", f"{SERVICE}/Act".encode()),
            (b":authority", b"localhost"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"x-bad-bin", b"%%%not base64%%%"),
        )
    )

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    message = request()
    body = b"\x00" + struct.pack(">I", len(message)) + message
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    host, port = servers.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        connection.sendall(preface + frame(1, 4, 1, headers) + frame(0, 1, 1, body))
        connection.settimeout(0.5)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while connection.recv(65536):
                pass
    return servers.act(request())


def with_metadata(size_bytes: int) -> Callable[[Servers], Answer]:
    return acts(request(), metadata=(("x-large", "x" * size_bytes),))


def clamps(message: bytes, timeout: float | None) -> Callable[[Servers], Answer]:
    def ask(servers: Servers) -> Answer:
        answer = servers.act(message, timeout=timeout)
        assert answer.trailers == {"x-deadline-clamped": "1"}
        return answer

    return ask


def one_bad_row_of_many_callers(servers: Servers) -> Answer:
    call = servers.channel.unary_unary(f"{SERVICE}/Act")
    good = [call.future(request(policy="flawed"), timeout=PATIENCE_S) for _ in range(8)]
    bad = call.future(request(tensor([[np.nan, 0, 0]]), policy="flawed"), timeout=PATIENCE_S)
    assert {ended(future).code for future in good} == {OK}
    return ended(bad)


def overshoots(servers: Servers) -> Answer:
    answer = observes(OVERSHOOT_ABOVE + 1, policy="wild")(servers)
    reply = policy_pb2.ActReply.FromString(answer.reply)
    assert reply.is_clamped
    assert np.frombuffer(reply.action.data, np.float32).tolist() == [1.0, 1.0]
    return answer


def wrong_ca(servers: Servers) -> Answer:
    # A TLS client at a plaintext port sees what one with the wrong authority sees: no connection.
    channel: Any = grpc.secure_channel(servers.address, grpc.ssl_channel_credentials())
    with channel:
        return ended(channel.unary_unary(f"{SERVICE}/Act").future(request(), timeout=PATIENCE_S))


Row = tuple[Callable[[Servers], Answer], grpc.StatusCode, str]
ROWS: Mapping[str, Row | list[Row]] = {
    "B01": (acts(of_size(MESSAGE_CAP_BYTES + 1)), EXHAUSTED, "SERVER: Received message larger than max ("),
    "B02": (acts(of_size(2 * MESSAGE_CAP_BYTES)), EXHAUSTED, "SERVER: Received message larger than max ("),
    "B03": (compressed, UNIMPLEMENTED, "Compression algorithm 'gzip' is disabled."),
    "B05": (acts(b"\xff\xff\xff\xff"), INTERNAL, "BAD_MESSAGE: "),
    "B06": (acts(request()[:-3]), INTERNAL, "BAD_MESSAGE: "),
    "B07": (acts(b"\x1b" * 200), INTERNAL, "BAD_MESSAGE: "),
    "B08": (acts(request() + b"\xfa\x07\x02hi"), OK, ""),
    "B09": (lambda servers: servers.call(f"{SERVICE}/NoSuchMethod", b""), UNIMPLEMENTED, "Method not found!"),
    "B10": (
        lambda servers: servers.call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b""),
        UNIMPLEMENTED,
        "Method not found!",
    ),
    "B11": (many_messages(0), UNIMPLEMENTED, "UNSUPPORTED: "),
    "B12": (many_messages(2), OK, ""),
    "B13": (acts(b""), INVALID, "MISSING_MODEL: "),
    "B14": (acts(request(inputs=[])), INVALID, "MISSING_INPUT: input 'observation'"),
    "B15": (acts(request(policy="pair")), INVALID, "MISSING_INPUT: input 'goal'"),
    "B16": (acts(request(tensor(name="x\ny"))), INVALID, r"UNKNOWN_INPUT: input 'x\ny': expected one of 'observation'"),
    "B17": (acts(request(tensor(), tensor())), INVALID, "DUPLICATE_INPUT: input 'observation'"),
    "B18": (
        acts(request(tensor(data=b"\0" * 11))),
        INVALID,
        "SIZE_MISMATCH: input 'observation': expected 12 bytes, got 11",
    ),
    "B19": (acts(request(tensor(shape=[2**30, 2**30, 2**30]))), INVALID, "SHAPE_OVERFLOW: "),
    "B20": (acts(request(tensor(shape=[-1, 3]))), INVALID, "BAD_DIM: "),
    "B21": [
        (acts(request(tensor(shape=[]))), INVALID, "BAD_RANK: "),
        (acts(request(tensor(shape=[1] * 9))), INVALID, "BAD_RANK: "),
    ],
    "B22": (acts(request(tensor(shape=[2**31, 3]))), INVALID, "SHAPE_OVERFLOW: "),
    "B23": (
        acts(request(tensor(OBSERVATION[0]))),
        INVALID,
        "BAD_RANK: input 'observation': expected 2 dimensions, got 1",
    ),
    "B24": (acts(request(tensor([[1, 2]]))), INVALID, "BAD_SHAPE: input 'observation': expected [3] per row, got [2]"),
    "B25": (acts(request(tensor(OBSERVATION.T))), INVALID, "BAD_SHAPE: "),
    "B26": (infers("FP64", bytes(24)), INVALID, "BAD_DTYPE: "),
    "B27": [
        (acts(request(tensor(dtype=policy_pb2.DATA_TYPE_INT32))), INVALID, "BAD_DTYPE: "),
        (infers("INT32", bytes(12)), INVALID, "BAD_DTYPE: "),
    ],
    "B28": (infers("INT8", bytes(3)), INVALID, "BAD_DTYPE: "),
    "B29": [
        (acts(request(tensor(dtype=999))), INVALID, "UNKNOWN_DTYPE: "),
        (infers("FP999", bytes(12)), INVALID, "UNKNOWN_DTYPE: "),
    ],
    "B30": (infers("BOOL", b"\x02\x03\x04"), INVALID, "BAD_DTYPE: "),
    "B31": (infers("BYTES", b"\1\0\0\0x" * 3), INVALID, "BAD_DTYPE: "),
    "B32": (acts(request(tensor(np.zeros((0, 3))))), INVALID, "EMPTY_BATCH: "),
    "B33": (
        acts(request(tensor(np.zeros((MAX_BATCH_ROWS + 1, 3))))),
        INVALID,
        "BATCH_TOO_LARGE: input 'observation': expected at most 16 rows, got 17",
    ),
    "B34": (
        acts(request(tensor(), tensor(np.zeros((2, 3)), "goal"), policy="pair")),
        INVALID,
        "BATCH_MISMATCH: input 'goal': expected 1 rows, as in the first input, got 2",
    ),
    "B35": (
        observes(0, np.nan),
        INVALID,
        "NON_FINITE: input 'observation': expected finite values, got none at flat index 3",
    ),
    "B36": [(observes(np.inf), INVALID, "NON_FINITE: "), (observes(-np.inf), INVALID, "NON_FINITE: ")],
    "B37": [
        (acts(request(tensor(data=struct.pack("<III", 0x7FA00000, 0, 0)))), INVALID, "NON_FINITE: "),
        (observes(-0.0), OK, ""),
    ],
    "B38": (observes(1e-42), OK, ""),
    "B39": (
        observes(0, BOUND + 1, policy="bounded"),
        grpc.StatusCode.OUT_OF_RANGE,
        "OBS_OUT_OF_RANGE: input 'observation': expected -10 to 10 at flat index 3, got 11",
    ),
    "B40": (one_bad_row_of_many_callers, INVALID, "NON_FINITE: "),
    "B41": (of_policy("../x"), INVALID, "BAD_MODEL_NAME: "),
    "B42": [(of_policy(name), INVALID, "BAD_MODEL_NAME: ") for name in ("a/../b", "a/b", "a/")],
    "B43": (of_policy("/etc/passwd"), INVALID, "BAD_MODEL_NAME: "),
    "B44": [(of_policy(name), INVALID, "BAD_MODEL_NAME: ") for name in ("toy\0", "toy\n", "\x1b[2J")],
    "B45": [
        *((of_policy(name), INVALID, "BAD_MODEL_NAME: ") for name in (".", "..", " ", "\t")),
        (of_policy(""), INVALID, "MISSING_MODEL: "),
    ],
    "B46": (
        of_policy("x" * 65536),
        INVALID,
        f"BAD_MODEL_NAME: policy: expected [a-z0-9][a-z0-9_-]{{0,63}}, got '{'x' * 61}...'",
    ),
    "B47": [
        (of_policy("\u2024\u2024"), INVALID, "BAD_MODEL_NAME: "),
        (acts(b"\x0a\x02\xff\xfe"), INTERNAL, "BAD_MESSAGE: "),
    ],
    "B48": (of_policy("stranger"), NOT_FOUND, "MODEL_NOT_FOUND: policy 'stranger' is not served here"),
    "B49": (of_policy("toy", 77), NOT_FOUND, "VERSION_NOT_FOUND: version: expected one of 1, got 77"),
    "B50": (of_policy("toy", 2**31), INVALID, "BAD_VERSION: "),
    "B51": (asks_while_it_is_loaded, UNAVAILABLE, "MODEL_LOADING: "),
    "B52": (of_policy("broken"), PRECONDITION, "MODEL_FAILED: policy 'broken' could not be loaded"),
    "B53": (acts(request(contract_hash="0" * 64)), PRECONDITION, "CONTRACT_MISMATCH: contract_hash: expected "),
    "B54": [
        (loads("toy", 99), NOT_FOUND, "BUNDLE_NOT_FOUND: "),
        (loads("toy", 3), PRECONDITION, "BUNDLE_INCOMPLETE: manifest.json"),
    ],
    "B55": (loads("toy", 4), grpc.StatusCode.DATA_LOSS, "DIGEST_MISMATCH: actor.onnx"),
    "B56": (loads_an_unsigned_bundle, grpc.StatusCode.PERMISSION_DENIED, "BAD_SIGNATURE: "),
    "B57": [(loads("toy", number), PRECONDITION, "BUNDLE_UNSAFE_FILE: ") for number in (5, 6, 7)],
    "B58": (loads("toy", 8), PRECONDITION, "EXTERNAL_DATA_FORBIDDEN: "),
    "B59": (loads("toy", 9), PRECONDITION, "OP_FORBIDDEN: "),
    "B60": [
        (loads("toy", 10), EXHAUSTED, "MODEL_TOO_LARGE: "),
        (loads("toy", 11), PRECONDITION, "SELF_TEST_FAILED: "),
        (loads("toy", 12), EXCEEDED, "WARMUP_TIMEOUT: "),
    ],
    "B61": (clamps(request(), None), OK, ""),
    "B62": (acts(request(budget_ns=1)), EXCEEDED, "DEADLINE_EXCEEDED: "),
    "B63": (
        acts(request(tensor(np.zeros((MAX_BATCH_ROWS, 3))), policy="slow", budget_ns=1_000_000)),
        EXHAUSTED,
        "DEADLINE_INFEASIBLE: ",
    ),
    "B66": (clamps(request(), 600.0), OK, ""),
    "B67": (fills_the_queue, EXHAUSTED, "QUEUE_FULL: "),
    "B68": (asks_too_often, EXHAUSTED, "RATE_LIMITED: "),
    "B69": (asks_beside_a_long_call, EXHAUSTED, "TOO_MANY_CALLS: "),
    "B70": [(with_metadata(kib * 1024), EXHAUSTED, "received metadata size exceeds ") for kib in (12, 20, 200)],
    "B73": (has_a_bad_binary_header, OK, ""),
    "B74": (without_a_right_token(), grpc.StatusCode.UNAUTHENTICATED, "AUTH_REQUIRED: "),
    "B75": (
        without_a_right_token(("authorization", "Bearer not-a-token-of-this-server")),
        grpc.StatusCode.UNAUTHENTICATED,
        "AUTH_REQUIRED: ",
    ),
    "B76": (
        asks_admin_with_the_wrong_role,
        grpc.StatusCode.PERMISSION_DENIED,
        "ROLE_REQUIRED: expected a token of role admin",
    ),
    "B77": (lambda servers: servers.call(f"{ADMIN}/ListPolicies", b""), UNIMPLEMENTED, "Method not found!"),
    "B78": (wrong_ca, UNAVAILABLE, ""),
    "B79": [
        (raw_bytes(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), OK, ""),
        (raw_bytes(os.urandom(4096)), OK, ""),
        (raw_bytes(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)), OK, ""),
    ],
    "B80": (loads_while_loading, grpc.StatusCode.ABORTED, "RELOAD_IN_PROGRESS: "),
    "B81": (unloads_what_serves, PRECONDITION, "LAST_VERSION: "),
    "B82": (asks_while_it_drains, UNAVAILABLE, ""),
    "B84": (streamed(request(sequence=5), request(sequence=5)), INVALID, "SEQ_NOT_INCREASING: "),
    "B85": (
        streamed(request(sequence=1), request(sequence=2, contract_hash="0" * 64), pause_s=0.2),
        PRECONDITION,
        "CONTRACT_MISMATCH: ",
    ),
    "B86": (streamed(request(sequence=1), pause_s=2.0), EXCEEDED, "STREAM_IDLE: "),
    "B87": (reads_nothing, EXHAUSTED, "SLOW_CONSUMER: "),
    "B89": (observes(NAN_ABOVE + 1, policy="flawed"), INTERNAL, "NON_FINITE_ACTION: "),
    "B90": (loads("toy", 13), PRECONDITION, "SELF_TEST_FAILED: "),
    "B91": (overshoots, OK, ""),
    "B92": (observes(RAISE_ABOVE + 1, policy="flawed"), INTERNAL, "INFERENCE_FAILED: the policy could not be run, id "),
}
# Words of the library, not of ours: they hold neither a reason nor anything of this server.
GRPC_WORDS = ("Method not found!", "SERVER: Received message", "Compression algorithm", "received metadata size")


def test_the_table_is_complete() -> None:
    assert sorted([*ROWS, *ELSEWHERE]) == [f"B{number:02}" for number in range(1, 94)]


@pytest.mark.parametrize(
    ("row", "case"),
    [(row, case) for row, cases in ROWS.items() for case in range(len(cases) if isinstance(cases, list) else 1)],
)
def test_a_bad_input_has_its_status_and_reason(servers: Servers, row: str, case: int) -> None:
    cases = ROWS[row]
    send, code, text = cases[case] if isinstance(cases, list) else cases
    answer = send(servers)
    assert (answer.code, answer.message[: len(text)]) == (code, text), answer.message
    if answer.code is not OK and text and not text.startswith(GRPC_WORDS):
        assert CLEAN_MESSAGE.fullmatch(answer.message), answer.message
        assert not UNCLEAN.search(answer.message), answer.message
    assert servers.act(request()).code is OK  # and the next one is answered


def test_no_token_and_a_wrong_one_are_told_the_same(servers: Servers) -> None:
    none = without_a_right_token()(servers)
    wrong = without_a_right_token(("authorization", "Bearer not-a-token-of-this-server"))(servers)
    assert none.message == wrong.message
    assert none.trailers == wrong.trailers


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("bad inputs")
    repository = folder / "models"
    slow = Flaws(burn_layers=200)
    write_test_repository(
        repository,
        {
            "toy": {1: Flaws(), **dict.fromkeys(range(3, 14), Flaws())},
            "flawed": {1: Flaws(nan_above=NAN_ABOVE, raise_above=RAISE_ABOVE)},
            "wild": {1: Flaws(overshoot_above=OVERSHOOT_ABOVE)},
            "broken": {1: Flaws(wrong_golden=True)},
            "bounded": {1: Flaws(observation_bound=BOUND)},
            "pair": {1: Flaws(has_goal=True)},
            "slow": {1: slow},
        },
    )
    spoil(repository / "toy")
    tokens = folder / "tokens"
    tokens.write_text("".join(f"{'admin' if n == 'admin' else 'act'} {n} {token}\n" for n, token in TOKENS.items()))
    tokens.chmod(0o600)
    sizes = ("--max-batch-rows", str(MAX_BATCH_ROWS), "--max-queue-rows", str(MAX_BATCH_ROWS), "--pin", "toy=1")
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    admins = [f"unix:{folder}/{name}.sock" for name in ("open", "guarded")]
    with (
        running_server(
            repository,
            *sizes,
            *("--max-message-bytes", str(MESSAGE_CAP_BYTES), "--admin-listen", admins[0], "--load-limit-s", "8"),
            *("--stream-idle-s", "0.5", "--slow-reader-s", "0.5"),
        ) as plain,
        running_server(
            repository,
            *sizes,
            *("--tokens", str(tokens), "--admin-listen", admins[1]),
            *("--max-requests-per-s", "1.5", "--max-concurrent-calls", "1"),
        ) as guarded,
        grpc.insecure_channel(plain.address, own) as channel,
        grpc.insecure_channel(admins[0], own) as admin_channel,
        grpc.insecure_channel(guarded.address, own) as guarded_channel,
        grpc.insecure_channel(admins[1], own) as guarded_admin_channel,
    ):
        yield Servers(
            channel=channel,
            admin_channel=admin_channel,
            guarded_channel=guarded_channel,
            guarded_admin_channel=guarded_admin_channel,
            address=plain.address,
            repository=repository,
        )
        for server in (plain, guarded):
            assert server.process.poll() is None
            assert "Traceback" not in "\n".join(line for line in server.stderr if "INFERENCE" in line)


def spoil(policy: Path) -> None:
    """What is wrong with the versions of `policy` from 3 on."""
    (policy / "3" / "manifest.json").unlink()
    graph = policy / "4" / "actor.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    graph = policy / "5" / "actor.onnx"
    graph.rename(policy.parent.parent / "outside.onnx")
    graph.symlink_to(policy.parent.parent / "outside.onnx")
    graph = policy / "6" / "actor.onnx"
    graph.unlink()
    os.mkfifo(graph)
    (policy / "7" / "extra.bin").write_bytes(b"nobody listed it")
    actor = toy_graphs(Flaws())["actor"]
    outside = actor.graph.initializer[0]
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="../../secret")
    write_again(policy / "8", actor=actor)
    actor = toy_graphs(Flaws())["actor"]
    actor.graph.node.append(helper.make_node("NonZero", ["observation"], ["unused"]))
    write_again(policy / "9", actor=actor)
    os.truncate(policy / "10" / "actor.onnx", 600 * 1024 * 1024)
    write_again(policy / "11", flaws=Flaws(wrong_golden=True))
    write_again(policy / "12", flaws=Flaws(burn_layers=9000))
    actor = toy_graphs(Flaws())["actor"]
    del actor.graph.output[0].type.tensor_type.shape.dim[1]
    last = next(node for node in actor.graph.node if node.output[0] == "action")
    last.CopyFrom(helper.make_node("ReduceSum", [last.input[0], "columns"], ["action"], keepdims=0))
    write_again(policy / "13", actor=actor)


def write_again(path: Path, **choices: Any) -> None:
    shutil.rmtree(path)
    write_test_bundle(path, policy="toy", **choices)
