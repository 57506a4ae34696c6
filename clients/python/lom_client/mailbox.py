"""Slots of memory in which the newest message takes the place of the one before: between two threads or two processes.

Nobody waits for anybody: a message is copied out whole, or counts as not there yet. A doorbell wakes whoever waits for
one.
"""

import mmap
import os
import select
import time
import weakref
import zlib
from typing import Self

_HEADER_BYTES = 16
_MOST_ATTEMPTS = 4
_NS_PER_MS = 1_000_000

QUESTION_BYTES = 4 * 1024 * 1024
"""Largest question; memory is taken by the largest one so far only."""
OUTCOME_BYTES = 64 * 1024
"""Largest answer or refusal."""
_MEMORY_BYTES = QUESTION_BYTES + 2 * OUTCOME_BYTES


class Slot:
    """One message. **Threads**: one that puts, one that takes.

    A version, which is odd while a message is written, and a checksum of version and message. The version alone would
    do where writes become visible in their order; not every processor that robots have promises that.
    """

    def __init__(self, memory: memoryview) -> None:
        self._version = memory[:8].cast("Q")  # one store each, other than struct.pack
        self._fields = memory[8:_HEADER_BYTES].cast("I")
        self._body = memory[_HEADER_BYTES:]
        self._taken = 0

    @property
    def capacity(self) -> int:
        """Bytes of the longest message."""
        return len(self._body)

    def put(self, message: bytes) -> None:
        """Leaves `message`, in place of the one before.

        Raises:
            ValueError: it is longer than the capacity.
        """
        if len(message) > self.capacity:
            raise ValueError(f"a message must have at most {self.capacity} bytes, got {len(message)}")
        writing = (self._version[0] + 1) | 1  # whoever wrote before may have died over it
        self._version[0] = writing
        self._fields[0] = len(message)
        self._fields[1] = _checksum(message, writing + 1)
        self._body[: len(message)] = message
        self._version[0] = writing + 1

    def take(self) -> bytes | None:
        """The newest message; None where it was taken before, or is not whole yet."""
        for _ in range(_MOST_ATTEMPTS):
            version = self._version[0]
            if version == self._taken:
                return None
            length, checksum = self._fields
            message = bytes(self._body[:length])
            if version % 2 == 0 and version == self._version[0] and checksum == _checksum(message, version):
                self._taken = version
                return message
        return None


class Doorbell:
    """An eventfd, closed with the last reference. **Threads**: anybody rings; one waits."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _close_with(self, fd)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def ring(self) -> None:
        """Wakes whoever waits, or will wait next."""
        os.eventfd_write(self.fd, 1)

    def wait(self, until_ns: int) -> None:
        """Returns once it was rung since the last wait, at the latest at `until_ns` of the monotonic clock."""
        remaining_ns = until_ns - time.monotonic_ns()
        if remaining_ns <= 0:
            return
        if remaining_ns < _NS_PER_MS:  # poll counts in milliseconds
            time.sleep(remaining_ns * 1e-9)
        elif self._poll.poll(remaining_ns // _NS_PER_MS):
            os.eventfd_read(self.fd)


class Mailboxes:
    """Between a control loop and whoever asks the policy for it: questions one way, answers and refusals the other.

    The descriptors are closed with the last reference.
    """

    def __init__(self, memory_fd: int, question_bell_fd: int, outcome_bell_fd: int) -> None:
        """Those that `create` made, in this process or in one that inherited the descriptors."""
        self.fds = (memory_fd, question_bell_fd, outcome_bell_fd)
        _close_with(self, memory_fd)
        memory = memoryview(mmap.mmap(memory_fd, _MEMORY_BYTES))
        self.questions = Slot(memory[:QUESTION_BYTES])
        self.answers = Slot(memory[QUESTION_BYTES : QUESTION_BYTES + OUTCOME_BYTES])
        self.refusals = Slot(memory[QUESTION_BYTES + OUTCOME_BYTES :])
        self.question_bell = Doorbell(question_bell_fd)
        self.outcome_bell = Doorbell(outcome_bell_fd)

    @classmethod
    def create(cls) -> Self:
        """New ones, empty."""
        memory_fd = os.memfd_create("lom-control-loop")
        os.ftruncate(memory_fd, _MEMORY_BYTES)
        bells = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        return cls(memory_fd, *bells)


def _close_with(owner: object, fd: int) -> None:
    weakref.finalize(owner, os.close, fd).atexit = False


def _checksum(message: bytes, version: int) -> int:
    return zlib.crc32(message, version & 0xFFFFFFFF)
