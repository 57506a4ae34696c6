"""All requests of a client over one `ActStream`, which spares each of them the cost of a call of its own."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError

from lom_api.v1 import policy_pb2
from lom_client.errors import (
    BadReply,
    PolicyError,
    ServerUnavailable,
    client_closed,
    error_from_refusal,
    error_from_status,
    malformed_reply,
)

Method: TypeAlias = "grpc.StreamStreamMultiCallable[bytes, bytes]"
Metadata: TypeAlias = tuple[tuple[str, str], ...]

# A server ends a stream that is idle, by default after 5 s, and a connection that is old, with 10 s for what is under
# way. A request must not meet either end, so a stream is left before.
_LONGEST_IDLE_S = 2.0
_LONGEST_LIFE_S = 8.0


@dataclass(kw_only=True)
class StreamAge:
    """When a stream began and was last asked something, by the monotonic clock."""

    began_at: float = field(default_factory=time.monotonic)
    asked_at: float = field(default_factory=time.monotonic)

    def may_ask(self) -> bool:
        """Whether the stream is young enough for one more request, which counts from now."""
        now = time.monotonic()
        if now > self.began_at + _LONGEST_LIFE_S or now > self.asked_at + _LONGEST_IDLE_S:
            return False
        self.asked_at = now
        return True


def reply_in(message: policy_pb2.ActStreamReply) -> policy_pb2.ActReply:
    """The reply that a stream brought.

    Raises:
        PolicyError: the refusal that it brought instead; BadReply where it brought neither.
    """
    match message.WhichOneof("result"):
        case "reply":
            return message.reply
        case "refusal":
            raise error_from_refusal(message.refusal)
        case _:
            raise BadReply("EMPTY_REPLY", "expected a reply or a refusal, got neither")


def stream_error(code: grpc.StatusCode, details: str) -> PolicyError:
    """What became of the requests that a stream did not answer before it ended."""
    if code is grpc.StatusCode.OK:
        return ServerUnavailable("STREAM_ENDED", "the server ended the stream before it answered")
    return error_from_status(code, details)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    request: policy_pb2.ActRequest
    over_at: float
    answer: Future[policy_pb2.ActReply]


class ActionStream:
    """Opened by its first request; opened anew by the next one after it ended or became old.

    **Threads**: any. Nothing blocks; each stream's replies are read in a thread of its own.
    """

    def __init__(self, method: Method, metadata: Callable[[], Metadata]) -> None:
        self._method = method
        self._metadata = metadata
        self._sequences = itertools.count(1)
        self._lock = threading.Lock()
        self._open: _OpenStream | None = None

    def act(self, request: policy_pb2.ActRequest, over_at: float) -> Future[policy_pb2.ActReply]:
        """Numbers and sends `request`, useless after `over_at`; the future ends with its reply or a `PolicyError`."""
        question = _Question(request=request, over_at=over_at, answer=Future())
        request.supersede = True
        with self._lock:  # sequence numbers must leave in their order
            request.sequence = next(self._sequences)
            if self._open is None or not self._open.ask(question):
                if self._open is not None:
                    self._open.leave()
                self._open = _OpenStream(self._method, self._metadata(), question)
        return question.answer


class _OpenStream:
    def __init__(self, method: Method, metadata: Metadata, first: _Question) -> None:
        self._age = StreamAge()
        self._is_over = False
        self._is_left = False
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        # Before the stream begins: it may end at once, and must then end this request, too.
        self._waiting = {first.request.sequence: first.answer}
        try:
            self._call = method(self._requests(), metadata=metadata)
        except ValueError:  # so says gRPC of a closed channel
            raise client_closed() from None
        threading.Thread(target=self._read, name="lom-action-stream", daemon=True).start()
        self._send(first)

    def ask(self, question: _Question) -> bool:
        """Whether `question` was taken; one that was not needs another stream."""
        with self._lock:
            if self._is_over or not self._age.may_ask():
                return False
            self._waiting[question.request.sequence] = question.answer
        self._send(question)
        return True

    def leave(self) -> None:
        """Ends the stream with the last answer that somebody waits for."""
        self._outbox.put(None)
        with self._lock:
            self._is_left = True
        self._end_if_unneeded()

    def _send(self, question: _Question) -> None:
        question.answer.add_done_callback(lambda _: self._forget(question.request.sequence))
        self._outbox.put(question)

    def _requests(self) -> Iterator[bytes]:
        while (question := self._outbox.get()) is not None:
            budget_ns = int((question.over_at - time.monotonic()) * 1e9)
            if budget_ns > 0 and not question.answer.done():
                question.request.budget_ns = budget_ns
                yield question.request.SerializeToString()

    def _read(self) -> None:
        failure = self._read_to_the_end()
        with self._lock:
            self._is_over = True
            unanswered = tuple(self._waiting.values())
        self._outbox.put(None)
        for answer in unanswered:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(failure())

    def _read_to_the_end(self) -> Callable[[], PolicyError]:
        """What makes the failure of those who were not answered."""
        try:
            for message in self._call:
                self._settle(policy_pb2.ActStreamReply.FromString(message))
        except DecodeError:
            self._call.cancel()
            return malformed_reply
        except grpc.RpcError:
            pass  # the call knows, as where it ended well
        return partial(stream_error, self._call.code(), self._call.details() or "")

    def _settle(self, message: policy_pb2.ActStreamReply) -> None:
        with self._lock:
            answer = self._waiting.pop(message.sequence, None)
        if answer is None or not answer.set_running_or_notify_cancel():
            return  # too late for whoever asked
        try:
            answer.set_result(reply_in(message))
        except PolicyError as error:
            answer.set_exception(error)

    def _forget(self, sequence: int) -> None:
        with self._lock:
            self._waiting.pop(sequence, None)
        self._end_if_unneeded()

    def _end_if_unneeded(self) -> None:
        if self._is_left and not self._waiting:
            self._call.cancel()
