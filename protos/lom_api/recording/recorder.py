"""Takes what is to be recorded off the hands of whoever answers, in microseconds, and writes it from a thread."""

import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from lom_api.recording.spool import PREFIX, SUFFIX, Layout, SpoolWriter, Step

Item = TypeVar("Item")
Pack: TypeAlias = Callable[[Item, int], Iterable[tuple[Layout, Step]]]

FLUSH_S = 0.1
"""How long a step may wait for the disk: what a killed process loses at most, beside the time that a write takes."""

_MOST_WAITING = 8192
_MOST_WAITING_BYTES = 64 << 20
_STEPS_IN_A_ROW = 8
_LONGEST_GOODBYE_S = 5.0

_logger = logging.getLogger(__name__)


class Recorder(Generic[Item]):
    """A bounded queue in front of a spool. What finds no room is dropped and counted, and ends the episode.

    A disk that is full or fails, or the size limit, ends the recording with one line in the log; `put` goes on, and
    only counts.

    **Threads**: `put` belongs to one thread, never blocks and never raises. The rest may be called from any.

    Attributes:
        path: of the spool.
        failure: why the recording has ended before it was closed; empty while it has not.
    """

    def __init__(
        self,
        folder: Path,
        pack: "Pack[Item]",
        *,
        max_bytes: int,
        writers: int = 1,
        on_failure: Callable[[str], object] | None = None,
    ) -> None:
        """Begins a spool.

        Args:
            folder: of all recordings; made where it is missing.
            pack: what an item comes to, in the writing thread; told how often something was missing so far (`epoch`).
            max_bytes: of all recordings in the folder, those that were there before included.
            writers: how many processes share what is left of that.
            on_failure: told `failure`, in the writing thread.

        Raises:
            OSError: nothing can be written there.
        """
        self._spool = SpoolWriter(folder)
        self._room = (max_bytes - _folder_bytes(folder)) / writers
        self._max_bytes = max_bytes
        self._pack = pack
        self._on_failure = on_failure
        self._queue: deque[tuple[int, int, Item]] = deque()
        self._bytes_put = 0
        self._bytes_taken = 0
        self._put = 0
        self._refused = 0
        self._lost = 0
        self._unflushed = 0
        self._is_open = True
        self._closing = threading.Event()
        self._pid = os.getpid()
        self.path = self._spool.path
        self.failure = ""
        self._thread = threading.Thread(target=self._run, name="lom-recorder", daemon=True)
        self._thread.start()

    @property
    def recorded(self) -> int:
        """Items that were taken; those of the last instant still wait for the disk."""
        return self._put - self._lost

    @property
    def dropped(self) -> int:
        """Items that are not in the recording."""
        return self._refused + self._lost

    def put(self, item: Item, size: int) -> None:
        """Has `item`, of about `size` bytes, recorded; or dropped, where too much waits."""
        if (
            self._is_open
            and len(self._queue) < _MOST_WAITING
            and self._bytes_put - self._bytes_taken + size < _MOST_WAITING_BYTES
        ):
            self._queue.append((self._refused, size, item))
            self._bytes_put += size
            self._put += 1
        else:
            self._refused += 1

    def close(self) -> None:
        """Writes what waits, and lets go of the spool. May be called twice, and in a process that was forked off."""
        self._is_open = False
        self._closing.set()
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join(_LONGEST_GOODBYE_S)

    def _run(self) -> None:
        try:
            is_last = False
            while not is_last and not self.failure:
                is_last = self._closing.wait(FLUSH_S)
                self._drain()
        except OSError as error:
            self._fail(error.strerror or "the disk failed")
        except Exception:  # a defect of ours must cost the recording, not the robot
            _logger.exception("the recording met a defect")
            self._fail("a defect")
        finally:
            self._is_open = False
            self._queue.clear()
            self._spool.close()

    def _drain(self) -> None:
        for count in range(len(self._queue)):
            refused, size, item = self._queue.popleft()
            self._bytes_taken += size
            try:
                for layout, step in self._pack(item, refused + self._lost):
                    self._spool.add(layout, step)
                self._unflushed += 1
            except (ValueError, TypeError, LookupError, ArithmeticError, struct.error):
                self._lost += 1
            if count % _STEPS_IN_A_ROW == 0:
                time.sleep(0)  # whoever answers may want to go on
        if self._spool.bytes_written + self._spool.bytes_waiting > self._room:
            self._fail(f"the recordings of its folder reached their {self._max_bytes / 2**20:g} MiB")
            return
        self._spool.flush()
        self._unflushed = 0

    def _fail(self, reason: str) -> None:
        self._is_open = False
        self._lost += len(self._queue) + self._unflushed
        self.failure = reason
        _logger.warning("the recording %s has ended: %s", self.path, reason)
        if self._on_failure is not None:
            try:
                self._on_failure(reason)
            except Exception:
                _logger.exception("the hook of a recording raised")


def _folder_bytes(folder: Path) -> int:
    """What recordings in `folder` take, finished or not; nothing else that may be there is counted."""
    total = 0
    for entry in folder.glob("*flight-*"):
        files = [entry] if entry.name.startswith(PREFIX) and entry.suffix == SUFFIX else entry.rglob("*")
        for file in files:
            try:
                total += file.stat().st_size if file.is_file() else 0
            except OSError:  # finished or removed meanwhile
                continue
    return total
