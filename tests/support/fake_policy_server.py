"""A policy server on a real socket that answers whatever a test tells it to: honest, late, hostile or nothing.

Its policy: observation `o` in R^3, action = clip(o[:2], -1, 1); `greedy_mode` also says mode = argmax(o), and as
margin the distance to the runner-up; explained, hyper-Q is `o`, every mixing weight 1/3, every component's mean the
action and every log-std -1. It answers single calls and streams alike. Run as a program, it is the same server in a
process of its own, which a test can freeze and kill.
"""

import os
import queue
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NoReturn, Self, TypeAlias

import grpc
import numpy as np
from google.protobuf.message import Message

from lom_api.codec import Array, pack_array, unpack_tensor
from lom_api.v1 import policy_pb2

PATIENCE_S = 20.0
OBSERVATION_DIM = 3
ACTION_DIM = 2
NUM_COMPONENTS = 3
POLICY = "toy"
BUNDLE_DIGEST = "d" * 64
CONTRACT_HASH = "c" * 64
_SERVER_OPTIONS = [("grpc.http2.min_ping_interval_without_data_ms", 50), ("grpc.so_reuseport", 0)]

Context: TypeAlias = "grpc.ServicerContext | _StreamContext"
Reply: TypeAlias = policy_pb2.ActReply | bytes
_Answers: TypeAlias = "queue.SimpleQueue[policy_pb2.ActStreamReply | bytes | None]"
Act: TypeAlias = Callable[[policy_pb2.ActRequest, Context], Reply]


def honest_spec() -> policy_pb2.PolicySpec:
    """The spec of the policy at the top of this module."""
    float32 = policy_pb2.DATA_TYPE_FLOAT32
    return policy_pb2.PolicySpec(
        policy=POLICY,
        version=1,
        inputs=[
            policy_pb2.Space(
                name="observation",
                dtype=float32,
                shape=[OBSERVATION_DIM],
                low=[-np.inf] * OBSERVATION_DIM,
                high=[np.inf] * OBSERVATION_DIM,
            )
        ],
        action=policy_pb2.Space(
            name="action", dtype=float32, shape=[ACTION_DIM], low=[-1.0] * ACTION_DIM, high=[1.0] * ACTION_DIM
        ),
        variants=["greedy_mode", "actor"],
        default_variant="greedy_mode",
        bundle_digest=BUNDLE_DIGEST,
        contract_hash=CONTRACT_HASH,
        num_components=NUM_COMPONENTS,
        max_batch_rows=64,
        execution_provider="CPUExecutionProvider",
    )


def honest_act(request: policy_pb2.ActRequest, _context: Context) -> policy_pb2.ActReply:
    """What a sound server answers."""
    observation = unpack_tensor(request.inputs[0])
    reply = policy_pb2.ActReply(
        action=pack_array(np.clip(observation[:, :ACTION_DIM], -1, 1), "action"),
        policy=request.policy,
        version=1,
        variant=request.variant,
        bundle_digest=BUNDLE_DIGEST,
        sequence=request.sequence,
        timings=policy_pb2.ServerTimings(queue_ns=1000, inference_ns=2000, batch_rows=len(observation)),
    )
    if request.variant == "greedy_mode":
        mode = np.argmax(observation, axis=1).astype(np.int32)
        if request.HasField("mode"):
            mode[:] = request.mode
        best_two = np.sort(observation, axis=1)[:, -2:]
        reply.mode.CopyFrom(pack_array(mode, "mode"))
        reply.margin.CopyFrom(pack_array(best_two[:, 1] - best_two[:, 0], "margin"))
    if request.explain:
        reply.explanation.CopyFrom(_honest_explanation(observation))
    return reply


def _honest_explanation(observation: Array) -> policy_pb2.Explanation:
    components = (len(observation), NUM_COMPONENTS)
    action = np.clip(observation[:, None, :ACTION_DIM], -1, 1)
    return policy_pb2.Explanation(
        hyper_q=pack_array(observation),
        mixing_weights=pack_array(np.full(components, 1 / NUM_COMPONENTS, np.float32)),
        component_means=pack_array(np.broadcast_to(action, (*components, ACTION_DIM))),
        component_log_stds=pack_array(np.full((*components, ACTION_DIM), -1, np.float32)),
    )


def tampered(change: Callable[[policy_pb2.ActReply], object]) -> Act:
    """An honest answer after `change` has had its way with it."""

    def act(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        reply = honest_act(request, context)
        change(reply)
        return reply

    return act


def late_act(delay_s: float) -> Act:
    """An honest answer, `delay_s` later, unless the caller gives up first."""

    def act(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        _wait_for_caller_to_give_up(context, delay_s)
        return honest_act(request, context)

    return act


def never_act(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
    """No answer as long as the caller waits for one."""
    _wait_for_caller_to_give_up(context, PATIENCE_S)
    return honest_act(request, context)


def erratic_act(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
    """An honest answer; one of ten comes later, up to 0.1 s."""
    if random.random() < 0.1:
        _wait_for_caller_to_give_up(context, random.choice([0.002, 0.005, 0.012, 0.03, 0.1]))
    return honest_act(request, context)


def refusing_act(code: grpc.StatusCode, message: str) -> Act:
    """A status instead of an answer."""

    def act(_request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        context.abort(code, message)

    return act


class _RefusalError(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class _StreamContext:
    """One request's view of its stream: what refuses it leaves the stream alone."""

    def __init__(self, stream: grpc.ServicerContext) -> None:
        self.peer = stream.peer
        self.is_active = stream.is_active
        self.add_callback = stream.add_callback

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise _RefusalError(code, details)


class FakePolicyServer:
    """The server, while its `with` block lasts.

    Attributes:
        act: what it answers with; may be replaced between calls.
        spec: what it says it serves; may be changed between calls.
        requests: the `Act` requests so far.
        peers: who sent each of them, one name for each connection.
        streams: how many streams were opened so far.
        open_streams: how many of them have not ended.
        metadata: of every call and stream so far.
        spec_requests: `GetPolicySpec` requests so far.
        spec_delay_s: how late the spec is.
        holds_streams: whether a stream whose caller asks no more is kept open until the caller leaves.
        most_at_once: the most `Act` requests that were in work at one time.
        given_up: set when a caller ended a call before it was answered.
    """

    def __init__(
        self,
        act: Act = honest_act,
        *,
        spec: policy_pb2.PolicySpec | None = None,
        port: int = 0,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self.act = act
        self.spec = spec or honest_spec()
        self.spec_delay_s = 0.0
        self.holds_streams = False
        self.requests: list[policy_pb2.ActRequest] = []
        self.peers: list[str] = []
        self.streams = 0
        self.open_streams = 0
        self._newest_answers: _Answers = queue.SimpleQueue()
        self.metadata: list[dict[str, str | bytes]] = []
        self.spec_requests = 0
        self.most_at_once = 0
        self.given_up = threading.Event()
        self._at_once = 0
        self._lock = threading.Lock()
        self._handlers = ThreadPoolExecutor(32)
        self._server = grpc.server(self._handlers, options=[*_SERVER_OPTIONS, *options])
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Act": grpc.unary_unary_rpc_method_handler(
                self._act,
                request_deserializer=policy_pb2.ActRequest.FromString,
                response_serializer=_serialised,
            ),
            "ActStream": grpc.stream_stream_rpc_method_handler(
                self._act_stream,
                request_deserializer=policy_pb2.ActRequest.FromString,
                response_serializer=_serialised,
            ),
            "GetPolicySpec": grpc.unary_unary_rpc_method_handler(
                self._get_policy_spec,
                request_deserializer=policy_pb2.GetPolicySpecRequest.FromString,
                response_serializer=policy_pb2.PolicySpec.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("lom_api.v1.PolicyService", handlers),)
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def target(self) -> str:
        """Where a `PolicyClient` finds it."""
        return f"grpc://127.0.0.1:{self.port}"

    def end_stream(self) -> None:
        """Ends the newest stream, whatever has not been answered."""
        self._newest_answers.put(None)

    def stop(self) -> None:
        """Ends the calls under way and frees the port."""
        assert self._server.stop(grace=0).wait(PATIENCE_S), "the fake server did not stop"
        self._handlers.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _act(self, request: policy_pb2.ActRequest, context: Context) -> Reply:
        if isinstance(context, grpc.ServicerContext):
            self.metadata.append(dict(context.invocation_metadata()))
        with self._lock:
            self.requests.append(request)
            self.peers.append(context.peer())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.act(request, context)
            if not context.is_active():
                self.given_up.set()
            return reply
        finally:
            with self._lock:
                self._at_once -= 1

    def _act_stream(
        self, requests: Iterator[policy_pb2.ActRequest], context: grpc.ServicerContext
    ) -> Iterator[policy_pb2.ActStreamReply | bytes]:
        """Every request in a thread of its own, so that one without an answer holds up no other."""
        answers: _Answers = queue.SimpleQueue()
        self._newest_answers = answers
        with self._lock:
            self.streams += 1
            self.open_streams += 1
            self.metadata.append(dict(context.invocation_metadata()))

        def end() -> None:
            with self._lock:
                self.open_streams -= 1
            answers.put(None)

        context.add_callback(end)

        def answer(request: policy_pb2.ActRequest) -> None:
            try:
                reply = self._act(request, _StreamContext(context))
            except _RefusalError as refused:
                code: int = refused.code.value[0]
                refusal = policy_pb2.Refusal(code=code, message=refused.message)
                answers.put(policy_pb2.ActStreamReply(sequence=request.sequence, refusal=refusal))
            else:
                if isinstance(reply, policy_pb2.ActReply):
                    answers.put(policy_pb2.ActStreamReply(sequence=request.sequence, reply=reply))
                else:
                    answers.put(reply)

        def read() -> None:
            try:
                under_way = [self._handlers.submit(answer, request) for request in requests]
                wait(under_way)
            except grpc.RpcError:
                pass  # the caller has gone
            if not self.holds_streams:
                answers.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (reply := answers.get()) is not None:
            yield reply

    def _get_policy_spec(self, request: policy_pb2.GetPolicySpecRequest, context: Context) -> policy_pb2.PolicySpec:
        self.spec_requests += 1
        if request.policy not in ("", self.spec.policy):
            context.abort(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND: no such policy")
        if self.spec_delay_s:
            _wait_for_caller_to_give_up(context, self.spec_delay_s)
        return self.spec


class FakePolicyServerProcess:
    """The same server in a process of its own: `behaviour` is "honest", "never" or "erratic"."""

    def __init__(self, behaviour: str = "honest", *, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, behaviour, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = int(self._next_line())

    @property
    def target(self) -> str:
        """Where a `PolicyClient` finds it."""
        return f"grpc://127.0.0.1:{self.port}"

    def wait_until_asked(self) -> None:
        """Returns once an `Act` request is in work."""
        assert self._next_line() == "asked\n"

    def freeze(self) -> None:
        """Stops the process where it is; its sockets stay open."""
        self._process.send_signal(signal.SIGSTOP)
        # A process of many threads may answer once more after the signal was sent.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """Ends the freeze."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends the process without a chance to say goodbye."""
        self._process.kill()
        self._process.wait(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _next_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fake server's process ended"
        return line


def _serialised(reply: Message | bytes) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


def _wait_for_caller_to_give_up(context: Context, patience_s: float) -> None:
    over = threading.Event()
    if context.add_callback(over.set):
        over.wait(patience_s)


def _main(behaviour: str, port: str) -> None:
    act = {"honest": honest_act, "never": never_act, "erratic": erratic_act}[behaviour]

    def announced(request: policy_pb2.ActRequest, context: Context) -> Reply:
        if behaviour == "never":
            print("asked", flush=True)
        return act(request, context)

    with FakePolicyServer(announced, port=int(port)) as server:
        print(server.port, flush=True)
        sys.stdin.read()  # until the test's end of the pipe closes, whatever became of the test


if __name__ == "__main__":
    _main(*sys.argv[1:])
