"""Every failure is typed, says why, and says whether it may pass."""

import pickle

import grpc
import pytest

from lom_client import (
    BadReply,
    ContractMismatch,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PolicyClient,
    PolicyError,
    PolicyNotFound,
    ServerFault,
    ServerUnavailable,
)
from lom_client.errors import error_from_status
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
    (Status.CANCELLED, "", ServerFault, "CANCELLED", False),
    (Status.PERMISSION_DENIED, "ROLE_REQUIRED: operator", InvalidRequest, "ROLE_REQUIRED", False),
]


@pytest.mark.parametrize(("status", "message", "error_class", "reason", "retryable"), STATUSES)
def test_a_status_becomes_its_typed_failure(
    server: FakePolicyServer,
    client: PolicyClient,
    status: grpc.StatusCode,
    message: str,
    error_class: type[PolicyError],
    reason: str,
    retryable: bool,
) -> None:
    server.act = refusing_act(status, message)
    with pytest.raises(PolicyError) as caught:
        client.act([0.0, 0.0, 0.0], deadline_s=10)
    assert type(caught.value) is error_class
    assert (caught.value.reason, caught.value.retryable) == (reason, retryable)
    assert str(caught.value) == f"{reason}: {caught.value.detail}"
    assert caught.value.__cause__ is None


def test_no_failure_is_retried_by_the_client(server: FakePolicyServer, client: PolicyClient) -> None:
    server.act = refusing_act(Status.UNAVAILABLE, "DRAINING: shutting down")
    before = len(server.requests)
    with pytest.raises(ServerUnavailable):
        client.act([0.0, 0.0, 0.0], deadline_s=10)
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


def test_failures_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(Overloaded("QUEUE_FULL", "64 rows wait")))
    assert (type(error), error.reason, error.detail) == (Overloaded, "QUEUE_FULL", "64 rows wait")
