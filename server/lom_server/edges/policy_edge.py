"""`lom_api.v1.PolicyService`: bytes to requests, replies and errors back, one at a time or on a stream."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator

from lom_api.codec import Array, CodecError, pack_array, unpack_tensor
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_bundle import SpaceSpec
from lom_server.batcher import Priority, Ticket
from lom_server.edges.authentication import Role
from lom_server.edges.listener import Call, Listener, parsed
from lom_server.errors import PolicyError, quoted
from lom_server.service import ActReply, ActRequest, PolicyService, ServedPolicy
from lom_server.status import status_of

SERVICE = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"]

MAX_UNANSWERED = 64
"""Requests of one stream whose answers are not written yet; beyond them, no more are read."""

MOST_SPECS_KEPT = 64

_STREAM_NUMBERS = itertools.count(1)


class PolicyEdge:
    """The service in front of one `PolicyService`.

    Threads: belongs to the event loop of the listener that it is registered with.
    """

    def __init__(self, service: PolicyService) -> None:
        self._service = service
        self._spec_messages: dict[tuple[str, int, str], bytes] = {}

    def register(self, listener: Listener) -> None:
        """Answers on `listener`."""
        listener.add_service(
            SERVICE.full_name,
            unary={"Act": self._act, "GetPolicySpec": self._get_policy_spec},
            streams={"ActStream": self._act_stream},
            role=Role.ACT,
        )

    async def _act(self, message: bytes, call: Call) -> bytes:
        with self._service.counting_refusals():
            request = parsed(policy_pb2.ActRequest, message)
        deadline_ns = call.admit(request.budget_ns)
        with self._service.counting_refusals(request.policy):
            act_request = _act_request(request, call.client)
        reply = await self._service.act(act_request, deadline_ns)
        return _reply_message(reply, request.sequence).SerializeToString()

    def _act_stream(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
        return _ActStream(self._service, call).answers_to(messages)

    async def _get_policy_spec(self, message: bytes, _: Call) -> bytes:
        request = parsed(policy_pb2.GetPolicySpecRequest, message)
        policy = self._service.find(request.policy, request.version)
        key = policy.name, policy.version, policy.bundle_digest
        if key not in self._spec_messages:
            if len(self._spec_messages) == MOST_SPECS_KEPT:  # versions come and go for as long as the server runs
                del self._spec_messages[next(iter(self._spec_messages))]
            self._spec_messages[key] = _spec_message(policy).SerializeToString()
        return self._spec_messages[key]


class _ActStream:
    """One stream. Every request is a task of its own; answers leave in the order in which they are ready.

    However the requests end, those that were taken up are answered before the stream ends. Where nobody is left to
    answer to, they are cancelled.
    """

    def __init__(self, service: PolicyService, call: Call) -> None:
        self._service = service
        self._call = call
        self._source = f"stream {next(_STREAM_NUMBERS)}"
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: there will be no more
        self._tasks: dict[asyncio.Task[None], tuple[int, Ticket]] = {}  # unanswered, with their sequence
        self._room = asyncio.Semaphore(MAX_UNANSWERED - 1)  # one is taken up before there must be room for it
        self._last_sequence = -1
        self._broken_contract: PolicyError | None = None

    async def answers_to(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """An `ActStreamReply` for each of `messages`; then raises what ended them, if it was not their sender."""
        self._reading = asyncio.create_task(self._read(messages))
        self._reading.add_done_callback(self._end_after_last)
        try:
            while (answer := await self._answers.get()) is not None:
                yield answer
                self._room.release()
            if self._broken_contract is not None:
                raise self._broken_contract
            self._reading.result()
        finally:
            unfinished = (self._reading, *self._tasks)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            self._take_up(message)
            await self._room.acquire()

    def _take_up(self, message: bytes) -> None:
        sequence = 0
        try:
            with self._service.counting_refusals():
                request = parsed(policy_pb2.ActRequest, message)
                sequence = request.sequence
                self._check_order(sequence)
            deadline_ns = self._call.admit(request.budget_ns)
            ticket = Ticket()
            with self._service.counting_refusals(request.policy):
                act_request = _act_request(request, self._call.client, ticket, self._source)
        except Exception as error:
            self._refuse(sequence, error)
            return
        if request.supersede:
            self._supersede()
        task = asyncio.create_task(self._act(act_request, sequence, deadline_ns))
        self._tasks[task] = sequence, ticket
        task.add_done_callback(self._forget)

    def _check_order(self, sequence: int) -> None:
        if sequence <= self._last_sequence:
            raise PolicyError(
                Reason.SEQ_NOT_INCREASING, f"sequence: expected more than {self._last_sequence}, got {sequence}"
            )
        self._last_sequence = sequence

    def _supersede(self) -> None:
        for task, (sequence, ticket) in tuple(self._tasks.items()):
            if not ticket.has_begun and task.cancel():
                del self._tasks[task]
                self._refuse(sequence, PolicyError(Reason.SUPERSEDED, "a later request of this stream took its place"))

    async def _act(self, request: ActRequest, sequence: int, deadline_ns: int) -> None:
        try:
            reply = await self._service.act(request, deadline_ns)
            answer = policy_pb2.ActStreamReply(sequence=sequence, reply=_reply_message(reply, sequence))
        except Exception as error:
            self._refuse(sequence, error)
            if isinstance(error, PolicyError) and error.reason is Reason.CONTRACT_MISMATCH:
                self._broken_contract = error
                self._reading.cancel()
        else:
            self._answers.put_nowait(answer.SerializeToString())

    def _refuse(self, sequence: int, error: Exception) -> None:
        status = status_of(error)
        code: int = status.code.value[0]
        refusal = policy_pb2.Refusal(code=code, message=status.message, retry_after_ms=status.retry_after_ms or 0)
        self._answers.put_nowait(policy_pb2.ActStreamReply(sequence=sequence, refusal=refusal).SerializeToString())

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        self._end_after_last(task)

    def _end_after_last(self, _: asyncio.Task[None]) -> None:
        if self._reading.done() and not self._tasks:
            self._answers.put_nowait(None)


def _act_request(
    request: policy_pb2.ActRequest, client: str, ticket: Ticket | None = None, source: str = ""
) -> ActRequest:
    hysteresis = request.hysteresis
    return ActRequest(
        policy=request.policy,
        version=request.version,
        variant=request.variant,
        inputs=[(tensor.name, _unpacked(tensor, f"input {quoted(tensor.name)}")) for tensor in request.inputs],
        contract_hash=request.contract_hash,
        explain=request.explain,
        mode=request.mode if request.HasField("mode") else None,
        sampling_seed=request.sampling_seed if request.HasField("sampling_seed") else None,
        previous_mode=_unpacked(hysteresis.previous_mode, "previous mode")
        if hysteresis.HasField("previous_mode")
        else None,
        hysteresis_width=hysteresis.width,
        priority=_priority(request.priority),
        client=client,
        source=source,
        ticket=ticket,
    )


def _priority(number: int) -> Priority:
    try:
        return Priority(number)
    except ValueError:
        raise PolicyError(Reason.BAD_OPTION, f"priority: expected 0 (live) or 1 (batch), got {number}") from None


def _unpacked(tensor: policy_pb2.Tensor, what: str) -> Array:
    try:
        return unpack_tensor(tensor)
    except CodecError as error:
        raise PolicyError(error.reason, f"{what}: {error.detail}") from None


def _reply_message(reply: ActReply, sequence: int) -> policy_pb2.ActReply:
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
            policy_pb2.Score(
                name=name, values=pack_array(score.values, name), threshold=score.threshold, warns=score.warns.tolist()
            )
            for name, score in reply.scores.items()
        ],
        explanation=policy_pb2.Explanation(
            **{name: pack_array(values, name) for name, values in reply.explanation.items()}
        )
        if reply.explanation
        else None,
        is_clamped=reply.is_clamped,
    )


def _spec_message(policy: ServedPolicy) -> policy_pb2.PolicySpec:
    manifest = policy.manifest
    return policy_pb2.PolicySpec(
        policy=policy.name,
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
    )


def _space_message(space: SpaceSpec) -> policy_pb2.Space:
    return policy_pb2.Space(
        name=space.name, dtype=policy_pb2.DATA_TYPE_FLOAT32, shape=space.shape, low=space.low, high=space.high
    )
