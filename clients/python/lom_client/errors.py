"""Typed failures of a policy call. No gRPC exception leaves this package."""

# Named for what happened, which is how a caller reads them: `except Overloaded`.
# ruff: noqa: N818

import re

import grpc

from lom_api.v1 import policy_pb2

_CODED_MESSAGE = re.compile(r"([A-Z][A-Z0-9_]{2,47}): (.*)", re.DOTALL)
_RETRY_HINT = re.compile(r"retry_after_ms ([0-9]{1,9})\b")
_MAX_DETAIL_CHARS = 300


class PolicyError(Exception):
    """A policy call that brought no action.

    Attributes:
        reason: a code from the closed vocabulary of `lom_api.reasons`, the name of a gRPC status where the
            server gave no code, or a code of this client (`ACTION_OUT_OF_BOUNDS`, `WRONG_SEQUENCE`, ...).
        detail: one printable line: what was wrong, what was expected, what was got.
        retryable: True where the same request may succeed later without anybody changing anything.
            It is never permission to repeat the call within one control tick: a retried action is a stale one.
        retry_after_s: how long the server asks to be left alone; None where it did not say.
    """

    retryable: bool = False

    def __init__(self, reason: str, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason, detail)
        self.reason = str(reason)
        self.detail = detail
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class InvalidRequest(PolicyError):
    """The request contradicts the policy's contract; found here before sending, or by the server."""


class NotPermitted(PolicyError):
    """The server does not know who asks, or does not allow it."""


class PolicyNotFound(PolicyError):
    """The server does not serve the policy, or the version of it, that was asked for."""


class ContractMismatch(PolicyError):
    """The policy, or the environment, has other spaces than the ones that this client agreed on."""


class Overloaded(PolicyError):
    """The server refused at once because it could not have answered in time."""

    retryable = True


class Superseded(PolicyError):
    """A later call on the same stream took this one's place."""


class DeadlineExceeded(PolicyError):
    """No answer before the deadline."""

    retryable = True


class ServerUnavailable(PolicyError):
    """There is no connection, or the server is shutting down. The connection is renewed in the background."""

    retryable = True


class ServerFault(PolicyError):
    """The server failed while it worked on a sound request, or is no policy server."""


class BadReply(PolicyError):
    """The server answered something that must not reach a robot."""


class ClientClosed(PolicyError):
    """`close()` was called, before or during this call."""


_ERRORS: dict[grpc.StatusCode, type[PolicyError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: NotPermitted,
    grpc.StatusCode.PERMISSION_DENIED: NotPermitted,
    grpc.StatusCode.NOT_FOUND: PolicyNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    # Never by this side, which answers its own cancellations itself.
    grpc.StatusCode.CANCELLED: ServerUnavailable,
}
_ERRORS_BY_REASON: dict[tuple[grpc.StatusCode, str], type[PolicyError]] = {
    (grpc.StatusCode.FAILED_PRECONDITION, "CONTRACT_MISMATCH"): ContractMismatch,
    (grpc.StatusCode.ABORTED, "SUPERSEDED"): Superseded,
}
_STATUS_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def error_from_status(code: grpc.StatusCode, message: str) -> PolicyError:
    """The one mapping from a gRPC status to a typed failure; whatever is not in the tables is a ServerFault."""
    # gRPC's own texts: they carry no reason code, and their status alone would name the wrong culprit.
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in message:
        error = BadReply if "CLIENT: Received" in message else InvalidRequest
        return error("MESSAGE_TOO_LARGE", _printable(message))

    coded = _CODED_MESSAGE.fullmatch(message)
    reason, detail = (coded[1], coded[2]) if coded else (code.name, message)
    failure = _ERRORS_BY_REASON.get((code, reason)) or _ERRORS.get(code, ServerFault)
    hint = _RETRY_HINT.search(detail)
    return failure(reason, _printable(detail), retry_after_s=int(hint[1]) * 1e-3 if hint else None)


def error_from_refusal(refusal: policy_pb2.Refusal) -> PolicyError:
    """The failure that a stream's refusal stands for: the one that a call by itself would have met."""
    error = error_from_status(_STATUS_CODES.get(refusal.code, grpc.StatusCode.UNKNOWN), refusal.message)
    if refusal.retry_after_ms:
        error.retry_after_s = refusal.retry_after_ms * 1e-3
    return error


def client_closed() -> ClientClosed:
    """`close()` was called."""
    return ClientClosed("CLIENT_CLOSED", "this client was closed")


def malformed_reply() -> BadReply:
    """What arrived cannot be read."""
    return BadReply("MALFORMED_MESSAGE", "the reply is not the message that the contract names")


def _printable(text: str) -> str:
    """A stranger's text as one line of bounded length that cannot steer a terminal or forge a log line."""
    line = "".join(char if char.isprintable() else " " for char in text[: _MAX_DETAIL_CHARS + 1])
    return line if len(line) <= _MAX_DETAIL_CHARS else line[: _MAX_DETAIL_CHARS - 1] + "…"
