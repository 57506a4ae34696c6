"""Every failure is typed, says why, and says whether it may pass."""

import copy

import grpc
import pytest

from lom_api.v1 import policy_pb2
from lom_client import (
    BadReply,
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    NotPermitted,
    Overloaded,
    PolicyError,
    PolicyNotFound,
    ServerFault,
    ServerUnavailable,
    Superseded,
)
from lom_client.errors import error_from_refusal, error_from_status
from tests.clients.conftest import AnyClient
from tests.support.fake_policy_server import FakePolicyServer, refusing_act

Status = grpc.StatusCode
STATUSES = [
    (Status.INVALID_ARGUMENT, "BAD_SHAPE: expected 3, got 4", InvalidRequest, "BAD_SHAPE", False),
    (Status.NOT_FOUND, "MODEL_NOT_FOUND: no policy 'x'", PolicyNotFound, "MODEL_NOT_FOUND", False),
    (Status.FAILED_PRECONDITION, "CONTRACT_MISMATCH: other spaces", ContractMismatch, "CONTRACT_MISMATCH", False),
    (Status.FAILED_PRECONDITION, "SELF_TEST_FAILED: golden rows", ServerFault, "SELF_TEST_FAILED", False),
    (Status.RESOURCE_EXHAUSTED, "QUEUE_FULL: 64 rows wait", Overloaded, "QUEUE_FULL", True),
    (Status.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", Overloaded, "RESOURCE_EXHAUSTED", True),
    (Status.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED: not run", DeadlineExceeded, "DEADLINE_EXCEEDED", True),
    (Status.UNAVAILABLE, "DRAINING: shutting down", ServerUnavailable, "DRAINING", True),
    (Status.INTERNAL, "NON_FINITE_ACTION: row 0", ServerFault, "NON_FINITE_ACTION", False),
    (Status.UNKNOWN, "Exception calling application: boom", ServerFault, "UNKNOWN", False),
    (Status.UNIMPLEMENTED, "Method not found!", ServerFault, "UNIMPLEMENTED", False),
    (Status.CANCELLED, "", ServerUnavailable, "CANCELLED", True),
    (Status.PERMISSION_DENIED, "ROLE_REQUIRED: operator", NotPermitted, "ROLE_REQUIRED", False),
    (Status.UNAUTHENTICATED, "AUTH_REQUIRED: expected a token", NotPermitted, "AUTH_REQUIRED", False),
    (Status.NOT_FOUND, "VERSION_NOT_FOUND: expected 1", PolicyNotFound, "VERSION_NOT_FOUND", False),
    (Status.OUT_OF_RANGE, "OBS_OUT_OF_RANGE: expected 0 to 1", InvalidRequest, "OBS_OUT_OF_RANGE", False),
    (Status.ABORTED, "SUPERSEDED: a later request", Superseded, "SUPERSEDED", False),
    (Status.ABORTED, "RELOAD_IN_PROGRESS: wait", ServerFault, "RELOAD_IN_PROGRESS", False),
]


@pytest.mark.parametrize(("status", "message", "error_class", "reason", "retryable"), STATUSES)
def test_a_status_becomes_its_typed_failure(
    server: FakePolicyServer,
    any_client: AnyClient,
    status: grpc.StatusCode,
    message: str,
    error_class: type[PolicyError],
    reason: str,
    retryable: bool,
) -> None:
    server.act = refusing_act(status, message)
    with pytest.raises(PolicyError) as caught:
        any_client.act([0.0, 0.0, 0.0], deadline_s=10)
    assert type(caught.value) is error_class
    assert (caught.value.reason, caught.value.retryable) == (reason, retryable)
    assert str(caught.value) == f"{reason}: {caught.value.detail}"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("message", "retry_after_s"),
    [
        ("QUEUE_FULL: 64 rows wait; retry_after_ms 250", 0.25),
        ("QUEUE_FULL: 64 rows wait; retry_after_ms 0", 0.0),
        ("QUEUE_FULL: 64 rows wait", None),
        ("QUEUE_FULL: 64 rows wait; retry_after_ms -5", None),
        ("QUEUE_FULL: 64 rows wait; retry_after_ms " + "9" * 400, None),
    ],
)
def test_a_hint_when_to_come_back_is_a_number(
    server: FakePolicyServer, any_client: AnyClient, message: str, retry_after_s: float | None
) -> None:
    server.act = refusing_act(Status.RESOURCE_EXHAUSTED, message)
    with pytest.raises(Overloaded) as caught:
        any_client.act([0.0, 0.0, 0.0], deadline_s=10)
    assert caught.value.retry_after_s == retry_after_s


@pytest.mark.parametrize("code", [-1 % 2**32, 0, 17, 2**31])
def test_a_refusal_with_no_code_of_grpc_is_the_servers_fault(code: int) -> None:
    error = error_from_refusal(policy_pb2.Refusal(code=code, message="QUEUE_FULL: x", retry_after_ms=1500))
    assert (type(error), error.reason, error.retry_after_s) == (ServerFault, "QUEUE_FULL", 1.5)


def test_no_failure_is_retried_by_the_client(server: FakePolicyServer, any_client: AnyClient) -> None:
    server.act = refusing_act(Status.UNAVAILABLE, "DRAINING: shutting down")
    before = len(server.requests)
    with pytest.raises(ServerUnavailable):
        any_client.act([0.0, 0.0, 0.0], deadline_s=10)
    assert len(server.requests) == before + 1


@pytest.mark.parametrize(
    ("message", "error_class"),
    [
        ("CLIENT: Received message larger than max (5000 vs. 1024)", BadReply),
        ("CLIENT: Sent message larger than max (5000 vs. 1024)", InvalidRequest),
        ("SERVER: Received message larger than max (5000 vs. 1024)", InvalidRequest),
    ],
)
def test_an_oversized_message_is_blamed_on_whoever_sent_it(message: str, error_class: type[PolicyError]) -> None:
    error = error_from_status(Status.RESOURCE_EXHAUSTED, message)
    assert type(error) is error_class
    assert error.reason == "MESSAGE_TOO_LARGE"


def test_a_hostile_text_is_one_bounded_printable_line() -> None:
    error = error_from_status(Status.INTERNAL, "INTERNAL_ERROR: \x1b[2J\r\nforged" + "x" * 10_000)
    assert error.reason == "INTERNAL_ERROR"
    assert error.detail.isprintable()
    assert len(error.detail) == 300


def test_a_failure_can_be_copied() -> None:
    error = copy.deepcopy(Overloaded("QUEUE_FULL", "64 rows wait", retry_after_s=0.5))
    assert (type(error), error.reason, error.detail, error.retry_after_s) == (
        Overloaded,
        "QUEUE_FULL",
        "64 rows wait",
        0.5,
    )
