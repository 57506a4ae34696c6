"""`lom_server.logs`: one record is one line, floods are cut, and a file that takes nothing stops nobody."""

import contextlib
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lom_server.errors import log_incident
from lom_server.logs import (
    LOGGER_NAME,
    MAX_LINES_PER_SECOND,
    MAX_MESSAGE_CHARACTERS,
    JsonFormatter,
    LogFormat,
    LogHandler,
    TextFormatter,
    configure_logs,
)
from tests.support.servers import wait_until

HOSTILE = "robot\n2026-01-01 ERROR all is well\r\x1b[2J\x1b]0;x\x07\u2028\u202e\ud800 ü"
LOGGER = logging.getLogger(f"{LOGGER_NAME}.tests")


class LogFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def lines(self) -> list[str]:
        return self.path.read_text().split("\n")[:-1]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LogFile]:
    """What is configured in a test ends with it."""
    file = LogFile(tmp_path / "log")
    logger = logging.getLogger(LOGGER_NAME)
    before = (logger.level, logger.propagate, logger.handlers[:])
    yield file
    for handler in [handler for handler in logger.handlers if handler not in before[2]]:
        logger.removeHandler(handler)
        handler.close()
    logger.level, logger.propagate = before[0], before[1]
    os.close(file.descriptor)


def written(file: LogFile, log: Callable[[], object], format: LogFormat = "json") -> list[str]:  # noqa: A002
    handler = configure_logs(format, "info", file.descriptor)
    log()
    handler.close()
    return file.lines()


def test_a_record_is_one_json_object_a_line(file: LogFile) -> None:
    facts: dict[str, object] = {"reason": "QUEUE_FULL", "rows": 3, "share": 0.5, "peer": None}
    before = datetime.now().astimezone()
    written(file, lambda: LOGGER.warning("refused %d rows", 3, extra=facts))
    (record,) = file.records()
    instant = datetime.fromisoformat(record.pop("ts"))
    assert instant.utcoffset() == timedelta(0)
    assert before - timedelta(seconds=1) < instant < before + timedelta(minutes=1)
    assert record == {"level": "warning", "logger": "lom_server.tests", "message": "refused 3 rows", **facts}


def test_a_text_line_reads_as_people_expect(file: LogFile) -> None:
    (line,) = written(file, lambda: LOGGER.warning("refused %d rows", 3), "text")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING lom_server\.tests: refused 3 rows", line)


@pytest.mark.parametrize("format_name", ["text", "json"])
def test_what_a_caller_sent_cannot_end_a_line_or_paint_a_terminal(file: LogFile, format_name: LogFormat) -> None:
    (line,) = written(file, lambda: LOGGER.warning("policy %s", HOSTILE), format_name)
    assert line.isprintable()
    if format_name == "json":
        assert json.loads(line)["message"] == f"policy {HOSTILE}"
    else:
        assert r"policy robot\n2026-01-01 ERROR all is well\r\x1b[2J" in line
        assert line.endswith("ü")


def test_ten_kilobytes_of_a_caller_are_cut(file: LogFile) -> None:
    written(file, lambda: LOGGER.warning("%s", "x" * 10_000, extra={"name_asked": "y" * 10_000}))
    (record,) = file.records()
    assert len(record["message"]) == len(record["name_asked"]) == MAX_MESSAGE_CHARACTERS


def test_a_traceback_is_one_field_of_one_line(file: LogFile) -> None:
    def fail() -> None:
        try:
            raise RuntimeError(HOSTILE)
        except RuntimeError as error:
            log_incident("engine failed", error)

    lines = written(file, fail)
    assert len(lines) == 1
    (record,) = file.records()
    assert record["traceback"].startswith("Traceback (most recent call last):\n")
    assert HOSTILE in record["traceback"]
    assert re.search(r"id [0-9a-f]{12}", record["message"])


def test_a_traceback_for_people_has_lines_but_no_colours(file: LogFile) -> None:
    def fail() -> None:
        try:
            raise RuntimeError("\x1b[2Jred")
        except RuntimeError as error:
            log_incident("engine failed", error)

    lines = written(file, fail, "text")
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == r"RuntimeError: \x1b[2Jred"
    assert all(line.isprintable() for line in lines)


def test_facts_that_are_no_json_become_text(file: LogFile) -> None:
    extra = {"array": [1, 2], "path": Path("x"), "nan": float("nan"), "level": "not the record's"}
    written(file, lambda: LOGGER.warning("odd", extra=extra))
    (record,) = file.records()
    assert (record["array"], record["path"], record["nan"], record["level"]) == ("[1, 2]", "x", "nan", "warning")


def test_a_line_whose_arguments_do_not_fit_is_still_a_line(file: LogFile, capfd: pytest.CaptureFixture[str]) -> None:
    written(file, lambda: LOGGER.warning("%d rows of %s", "three"))
    (record,) = file.records()
    assert "%d rows of %s" in record["message"]
    assert capfd.readouterr().err == ""


def test_only_this_package_is_configured(file: LogFile) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    other = logging.getLogger("another_package")

    def log() -> None:
        other.error("not mine")
        LOGGER.debug("too fine")
        LOGGER.info("mine")

    assert len(written(file, log)) == 1
    assert (root.handlers, root.level) == before
    assert other.handlers == []


def test_configured_twice_a_record_is_still_one_line(file: LogFile) -> None:
    configure_logs("text", "info", file.descriptor)
    configure_logs("text", "info", file.descriptor)
    assert len(logging.getLogger(LOGGER_NAME).handlers) == 1
    assert len(written(file, lambda: LOGGER.warning("once"))) == 1


def test_the_level_is_what_was_asked_for(file: LogFile) -> None:
    handler = configure_logs("json", "error", file.descriptor)
    LOGGER.warning("not bad enough")
    LOGGER.error("bad enough")
    handler.close()
    assert [record["message"] for record in file.records()] == ["bad enough"]


# Floods


def test_a_flood_of_one_kind_is_cut_counted_and_reported(file: LogFile) -> None:
    handler = configure_logs("json", "info", file.descriptor)
    started = time.monotonic()
    for number in range(100_000):
        LOGGER.warning("refused request %d of %s", number, HOSTILE)
    LOGGER.warning("another kind")
    seconds = int(time.monotonic() - started) + 2
    wait_until(
        lambda: bool(file.records()) and file.records()[-1].get("message", "").startswith("dropped"), "a summary"
    )
    handler.close()
    messages = [record["message"] for record in file.records()]
    kept = [message for message in messages if message.startswith("refused request")]
    summaries = [re.fullmatch(r"dropped (\d+) lines like: refused request %d of %s", message) for message in messages]
    dropped = sum(int(summary[1]) for summary in summaries if summary)
    assert MAX_LINES_PER_SECOND <= len(kept) <= MAX_LINES_PER_SECOND * seconds
    assert len(kept) + dropped == 100_000
    assert handler.dropped_lines == dropped
    assert messages.count("another kind") == 1


def test_what_a_flood_lost_is_said_before_the_end(file: LogFile) -> None:
    def log() -> None:
        for number in range(10_000):
            LOGGER.warning("refused request %d", number)

    written(file, log)
    messages = [record["message"] for record in file.records()]
    summaries = [re.match(r"dropped (\d+) lines", message) for message in messages]
    assert sum(int(summary[1]) if summary else 1 for summary in summaries) == 10_000


def test_reasons_are_kinds_of_their_own(file: LogFile) -> None:
    def log() -> None:
        for _ in range(MAX_LINES_PER_SECOND + 50):
            for reason in ("QUEUE_FULL", "DRAINING"):
                LOGGER.warning("refused", extra={"reason": reason})

    handler = configure_logs("json", "info", file.descriptor)
    log()
    handler.close()
    reasons = [record.get("reason") for record in file.records()]
    assert reasons.count("QUEUE_FULL") >= MAX_LINES_PER_SECOND
    assert reasons.count("DRAINING") >= MAX_LINES_PER_SECOND


def test_a_flood_of_ever_new_kinds_is_cut_too(file: LogFile) -> None:
    handler = configure_logs("json", "info", file.descriptor)
    started = time.monotonic()
    for number in range(20_000):
        LOGGER.warning(f"template {number}")
    seconds = int(time.monotonic() - started) + 2
    handler.close()
    assert handler.dropped_lines > 0
    # 256 kinds of their own, and one that all others share.
    assert len(file.lines()) <= (256 + MAX_LINES_PER_SECOND + 10) * seconds


# Files that take nothing


def test_a_full_disk_stops_nobody_and_loses_lines_by_count(capfd: pytest.CaptureFixture[str]) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    handler = configured(LogHandler(descriptor))
    for number in range(50):
        log_to(handler, "line %d", number)
    wait_until(lambda: handler.dropped_lines == 50, "every line is counted as lost")
    handler.close()
    os.close(descriptor)
    assert capfd.readouterr().err == ""


def test_what_was_lost_is_said_when_there_is_room_again(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "log")
    target = os.open("/dev/full", os.O_WRONLY)
    handler = configured(LogHandler(target))
    for number in range(3):
        log_to(handler, "line %d", number)
    wait_until(lambda: handler.dropped_lines == 3, "the first lines are lost")
    os.dup2(file.descriptor, target)
    log_to(handler, "room again")
    log_to(handler, "and more")
    handler.close()
    assert [record["message"] for record in file.records()] == [
        "3 lines could not be written",
        "room again",
        "and more",
    ]
    assert handler.dropped_lines == 3


def test_a_pipe_that_nobody_reads_delays_nobody() -> None:
    reader, writer = os.pipe()
    handler = configured(LogHandler(writer))
    for number in range(5000):  # of many kinds, and more than a pipe and the waiting lines hold
        log_to(handler, f"kind {number % 100} {'x' * 1000}")
    assert handler.dropped_lines > 3000
    # Whoever reads again gets whole lines, and is told of the others.
    os.set_blocking(reader, False)
    received = b""

    def read() -> bool:
        nonlocal received
        with contextlib.suppress(BlockingIOError):
            received += os.read(reader, 1 << 20)
        return b"lines could not be written" in received

    log_to(handler, "after the jam")
    wait_until(read, "the reader is told")
    for line in received.split(b"\n")[:-1]:
        json.loads(line)
    handler.close()
    os.close(reader)
    os.close(writer)


def test_a_torn_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "log")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # a full one takes part of a long line, and then no more
    os.write(writer, b"x" * (fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) - 4096))
    handler = configured(LogHandler(writer))
    log_to(handler, "a long line %s", "y" * 4000)
    log_to(handler, "another long line %s", "y" * 4000)
    wait_until(lambda: handler.dropped_lines > 0, "a line does not fit")
    os.dup2(file.descriptor, writer)
    log_to(handler, "room again")
    handler.close()
    first, *_, last = file.lines()
    assert first == ""
    assert json.loads(last)["message"] == "room again"
    os.close(reader)
    os.close(writer)


def test_a_process_that_logs_to_a_full_disk_still_exits_in_order() -> None:
    program = (
        "import logging\n"
        "from lom_server.logs import configure_logs\n"
        "configure_logs('json', 'info')\n"
        "for number in range(1000):\n"
        "    logging.getLogger('lom_server.x').error('line %d', number)\n"
        "print('served')\n"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, b"served\n")


def test_the_last_words_of_a_process_are_written() -> None:
    program = (
        "import logging, sys\n"
        "from lom_server.logs import configure_logs\n"
        "configure_logs('text', 'info')\n"
        "logging.getLogger('lom_server.x').error('last words')\n"
        "sys.exit(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, timeout=60)
    assert ended.returncode == 3
    assert ended.stderr.endswith(b"ERROR lom_server.x: last words\n")


def configured(handler: LogHandler) -> LogHandler:
    handler.setFormatter(JsonFormatter())
    return handler


def log_to(handler: LogHandler, template: str, *arguments: object) -> None:
    handler.handle(logging.LogRecord("lom_server.x", logging.ERROR, __file__, 0, template, arguments, None))


def test_formatters_do_not_change_a_record_for_others() -> None:
    record = logging.LogRecord("lom_server.x", logging.ERROR, __file__, 0, "%s", (HOSTILE,), None)
    TextFormatter().format(record)
    assert record.getMessage() == HOSTILE
