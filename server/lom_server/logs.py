"""Log lines that neither delay nor break serving: bounded in number, written by a thread of their own.

Whoever logs only formats a line; a thread writes it. So a log file on a full disk, or a pipe that nobody reads, costs
lines and not answers. What was lost is counted, and said in the log as soon as it can be written again.
"""

import json
import logging
import math
import os
import queue
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]

LOGGER_NAME = "lom_server"
MAX_LINES_PER_SECOND = 100
MAX_MESSAGE_CHARACTERS = 4096

_STDERR = 2
_MAX_KINDS = 256
_OTHER_KINDS = (LOGGER_NAME, "(of many kinds)")
_MAX_WAITING_LINES = 1000
_LAST_WORDS_S = 1.0
_ORDINARY_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

_Kind: TypeAlias = "tuple[str, str]"
_ExceptionInfo: TypeAlias = "tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]"


def configure_logs(format: LogFormat, level: LogLevel, descriptor: int = _STDERR) -> "LogHandler":  # noqa: A002
    """Writes what this package logs to the open file `descriptor`; replaces an earlier configuration.

    The root logger, and with it whatever other libraries log, is left alone.
    """
    logger = logging.getLogger(LOGGER_NAME)
    for earlier in [handler for handler in logger.handlers if isinstance(handler, LogHandler)]:
        logger.removeHandler(earlier)
        earlier.close()
    handler = LogHandler(descriptor)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    return handler


class LogHandler(logging.Handler):
    """Writes at most `MAX_LINES_PER_SECOND` lines of a kind: of one logger, and one `reason` or message template.

    Threads: any. `emit` never waits for the file, and never raises.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        # Not the handler's own lock: at exit `logging` holds that while it waits for `close`, and so for the writer.
        self._state = threading.Lock()
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._second = 0
        self._admitted: dict[_Kind, int] = {}
        self._dropped: dict[_Kind, int] = {}
        self._unwritten = 0
        self._is_torn = False
        self._dropped_lines = 0
        self._writer = threading.Thread(target=self._write_lines, name="lom-log", daemon=True)
        self._writer.start()

    @property
    def dropped_lines(self) -> int:
        """Lines that were not written: too many of a kind, or more than the file took."""
        return self._dropped_lines

    def emit(self, record: logging.LogRecord) -> None:
        """Hands the record's line to the writer, or drops it."""
        with self._state:
            self._begin_second(int(time.monotonic()))
            if self._is_admitted((record.name, str(getattr(record, "reason", record.msg)))):
                try:
                    line = self.format(record)
                except Exception:  # arguments that do not fit their template
                    line = self._line_about(record.name, "a line could not be formatted: %r", str(record.msg))
                self._hand_over(line)

    def close(self) -> None:
        """Writes what waits, as long as that takes no more than a second or two, and ends."""
        super().close()
        with self._state:
            self._begin_second(self._second + 1)
        try:
            self._lines.put(None, timeout=_LAST_WORDS_S)
        except queue.Full:
            return
        self._writer.join(_LAST_WORDS_S)

    def _begin_second(self, second: int) -> None:
        if second == self._second:
            return
        for (logger, kind), count in self._dropped.items():
            self._hand_over(self._line_about(logger, "dropped %d lines like: %s", count, kind))
        self._second = second
        self._admitted.clear()
        self._dropped.clear()

    def _is_admitted(self, kind: _Kind) -> bool:
        if kind not in self._admitted and len(self._admitted) >= _MAX_KINDS:
            kind = _OTHER_KINDS
        admitted = self._admitted.get(kind, 0)
        if admitted < MAX_LINES_PER_SECOND:
            self._admitted[kind] = admitted + 1
            return True
        self._dropped[kind] = self._dropped.get(kind, 0) + 1
        self._dropped_lines += 1
        return False

    def _line_about(self, logger: str, template: str, *arguments: object) -> str:
        return self.format(logging.LogRecord(logger, logging.WARNING, __file__, 0, template, arguments, None))

    def _hand_over(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lose(1)

    def _lose(self, lines: int) -> None:
        self._unwritten += lines
        self._dropped_lines += lines

    def _write_lines(self) -> None:
        while True:
            try:
                line = self._lines.get(timeout=1.0)
            except queue.Empty:
                with self._state:  # after a flood nobody may log for hours
                    self._begin_second(int(time.monotonic()))
                continue
            if line is None:
                return
            self._write(line)

    def _write(self, line: str) -> None:
        with self._state:
            unwritten = self._unwritten
        if unwritten:
            line = self._line_about(__name__, "%d lines could not be written", unwritten) + "\n" + line
        rest = f"\n{line}\n".encode() if self._is_torn else f"{line}\n".encode()
        length = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self._is_torn = False
        except OSError:
            self._is_torn |= len(rest) < length
        with self._state:
            if rest:
                self._lose(1)
            else:
                self._unwritten -= unwritten


class TextFormatter(logging.Formatter):
    """A line for people; under it the traceback, where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line, whatever is in its message."""
        record.message = _printable(_cut(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: _ExceptionInfo) -> str:  # noqa: N802
        """The traceback, whatever is in the exception's text."""
        return "\n".join(_printable(line) for line in super().formatException(ei).split("\n"))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, message, the record's `extra` facts, and the traceback as one text."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, in ASCII."""
        document: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        for name, value in vars(record).items():
            if name not in _ORDINARY_ATTRIBUTES:
                document.setdefault(name, _plain(value))
        return json.dumps(document)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 3] + "..."


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _plain(value: object) -> object:
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return _cut(str(value))
