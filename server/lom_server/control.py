"""Commands from the supervisor to a worker, and answers back: one JSON object a line, over the worker's pipes.

A worker that finds its input ended has lost its supervisor, and ends: no orphan keeps the port.
"""

import asyncio
import itertools
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from lom_api.reasons import Reason
from lom_bundle import BundleError
from lom_server.errors import PolicyError, StartError, log_incident

Facts: TypeAlias = dict[str, Any]
Command: TypeAlias = Callable[[Facts], Awaitable[Facts]]

LINE_LIMIT_BYTES = 16 * 1024 * 1024

HUNG = "hung"
"""Event of a worker: a run was stopped. It goes on, but is better replaced: what hangs once may have done more harm."""


class ControlError(Exception):
    """A command that the other process refused.

    Attributes:
        reason: its code; of `lom_api.reasons` wherever a client may come to see it.
        detail: the sentence after it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ControlChannel:
    """The supervisor's end: asks, and hears of events.

    Attributes:
        is_lost: nothing will be answered any more.

    Threads: belongs to one event loop.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_event: Callable[[str], None]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_event = on_event
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Facts]] = {}
        self.is_lost = False

    async def listen(self) -> None:
        """Hands answers and events on until the child's output ends; then everything that waits fails.

        Raises:
            ValueError, LookupError, TypeError: the child said something that is neither.
        """
        try:
            while line := await self._reader.readline():
                self._receive(json.loads(line))
        finally:
            self.is_lost = True
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(_lost())

    async def ask(self, command: str, **facts: Any) -> Facts:
        """The child's answer to `command`.

        Raises:
            ControlError: it refused, with its reason; WORKER_LOST, where it ended instead.
        """
        if self.is_lost:
            raise _lost()
        number = next(self._numbers)
        answer: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(_line({"number": number, "command": command, **facts}))
        try:
            return await answer
        finally:
            del self._waiting[number]

    def close(self) -> None:
        """Lets the child know that it is needed no longer."""
        self._writer.close()

    def _receive(self, message: Facts) -> None:
        if "event" in message:
            self._on_event(message["event"])
            return
        answer = self._waiting.get(message["number"])
        if answer is None or answer.done():
            return
        if "reason" in message:
            answer.set_exception(ControlError(message["reason"], message["detail"]))
        else:
            answer.set_result(message["facts"])


class CommandLoop:
    """The child's end: answers commands, each as a task of its own, until its input ends.

    Standard output belongs to the channel; whatever else the process prints goes to standard error.
    """

    def __init__(self) -> None:
        self._output = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._is_writing = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, commands: Mapping[str, Command]) -> None:
        """Returns when the supervisor is gone."""
        reader = asyncio.StreamReader(limit=LINE_LIMIT_BYTES)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            message = json.loads(line)
            task = asyncio.create_task(self._answer(commands, message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def tell(self, event: str) -> None:
        """Tells the supervisor of `event`. Threads: any."""
        self._write({"event": event})

    async def _answer(self, commands: Mapping[str, Command], message: Facts) -> None:
        number = message["number"]
        try:
            self._write({"number": number, "facts": await commands[message["command"]](message)})
        except Exception as error:
            refusal = refused(error)
            self._write({"number": number, "reason": refusal.reason, "detail": refusal.detail})

    def _write(self, message: Facts) -> None:
        content = memoryview(_line(message))
        with self._is_writing:  # a line that fills the pipe is written in pieces
            while content:
                content = content[os.write(self._output, content) :]


def refused(error: Exception) -> ControlError:
    """`error` as the other process is to hear of it."""
    if isinstance(error, BundleError | StartError | PolicyError):
        return ControlError(error.reason, error.detail)
    incident = log_incident("command failed", error)
    return ControlError(Reason.INTERNAL_ERROR, f"the command could not be carried out, id {incident}")


def _line(message: Facts) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _lost() -> ControlError:
    return ControlError(Reason.WORKER_LOST, "the worker ended before it answered")
