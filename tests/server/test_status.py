"""`lom_server.status`: every reason has its code, every message keeps the rules."""

import logging

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lom_api.reasons import Reason
from lom_server.errors import PolicyError
from lom_server.status import MAX_MESSAGE_BYTES, status_of


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_code_that_is_not_unknown(reason: Reason) -> None:
    code, message = status_of(PolicyError(reason, "what was wrong"))
    assert code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
    assert message == f"{reason}: what was wrong"


@given(st.sampled_from(list(Reason)), st.text(max_size=2000))
def test_a_message_is_one_short_line_of_printable_ascii(reason: Reason, detail: str) -> None:
    _, message = status_of(PolicyError(reason, detail))
    assert message.startswith(f"{reason}: ")
    assert len(message.encode()) <= MAX_MESSAGE_BYTES
    assert message.isascii()
    assert message.isprintable()


def test_a_defect_is_internal_and_keeps_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "lom_server"):
        code, message = status_of(KeyError("/secret/path"))
    assert code is grpc.StatusCode.INTERNAL
    assert message.startswith("INTERNAL_ERROR: ")
    assert "secret" not in message
    assert "KeyError" not in message
    assert message.split()[-1] in caplog.text
    assert "/secret/path" in caplog.text
