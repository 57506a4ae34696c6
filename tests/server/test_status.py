"""`lom_server.status`: every reason has its code, every message keeps the rules."""

import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from lom_api.reasons import Reason
from lom_server.errors import PolicyError
from lom_server.status import MAX_MESSAGE_BYTES, status_of


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_code_that_is_not_unknown(reason: Reason) -> None:
    status = status_of(PolicyError(reason, "what was wrong"))
    assert status.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    assert status.message == f"{reason}: what was wrong"


@given(st.sampled_from(list(Reason)), st.text(max_size=2000))
def test_a_message_is_one_short_line_of_printable_ascii(reason: Reason, detail: str) -> None:
    message = status_of(PolicyError(reason, detail)).message
    assert message.startswith(f"{reason}: ")
    assert len(message.encode()) <= MAX_MESSAGE_BYTES
    assert message.isascii()
    assert message.isprintable()


def test_a_defect_is_internal_and_keeps_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "lom_server"):
        status = status_of(KeyError("/secret/path"))
    message = status.message
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.reason is Reason.INTERNAL_ERROR
    assert message.startswith("INTERNAL_ERROR: ")
    assert "secret" not in message
    assert "KeyError" not in message
    assert message.split()[-1] in caplog.text
    assert "/secret/path" in caplog.text


def test_a_hint_when_to_come_back_is_in_the_message_and_in_the_details() -> None:
    status = status_of(PolicyError(Reason.QUEUE_FULL, "no room", retry_after_ms=12))
    assert status.message == "QUEUE_FULL: no room; retry_after_ms 12"
    info, retry = _details(status.trailers)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "lom")
    assert retry.retry_delay.ToMilliseconds() == 12


def test_the_details_repeat_code_and_message() -> None:
    status = status_of(PolicyError(Reason.MODEL_NOT_FOUND, "no such policy"))
    ((key, content),) = status.trailers
    rich = status_pb2.Status.FromString(content)
    assert key == "grpc-status-details-bin"
    assert (rich.code, rich.message) == (grpc.StatusCode.NOT_FOUND.value[0], status.message)
    assert len(rich.details) == 1


def _details(trailers: tuple[tuple[str, bytes], ...]) -> tuple[Any, Any]:
    first, second = status_pb2.Status.FromString(trailers[0][1]).details
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert first.Unpack(info)
    assert second.Unpack(retry)
    return info, retry
