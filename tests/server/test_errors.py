"""`lom_server.errors`: what a caller's text and an incident look like."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lom_server.errors import MAX_QUOTED_CHARACTERS, log_incident, quoted


@given(st.text())
def test_quoted_text_is_short_printable_ascii(text: str) -> None:
    quotation = quoted(text)
    assert quotation.isascii()
    assert quotation.isprintable()
    assert len(quotation) <= MAX_QUOTED_CHARACTERS + 2


def test_plain_text_is_quoted_as_it_is() -> None:
    assert quoted("observation") == "'observation'"
    assert quoted("a\n\x1b[31m\u2024") == r"'a\n\x1b[31m\u2024'"


def test_an_incident_leaves_its_traceback_in_the_log_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "lom_server"):
        incident = log_incident("inference failed", RuntimeError("/secret/path"))
    assert incident in caplog.text
    assert "/secret/path" in caplog.text
    assert "secret" not in incident
