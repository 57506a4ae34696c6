"""Stops a run that takes too long: from a thread of its own, because the run may hold the event loop."""

import logging
import os
import threading
from collections.abc import Callable, Iterable

from lom_server.engine import OnnxEngine

EXIT_HUNG = 70

_logger = logging.getLogger(__name__)
_LOOKS_PER_LIMIT = 20


class RunWatch:
    """Watches engines until it is closed.

    A run beyond `limit_s` is stopped. One that cannot be stopped within as much again is ended with its process, by
    exit status `EXIT_HUNG`: nothing else frees the thread that it holds.
    """

    def __init__(
        self, engines: Callable[[], Iterable[OnnxEngine]], limit_s: float, on_hung: Callable[[], None]
    ) -> None:
        """Starts watching.

        Args:
            engines: those to look at; called in the watching thread.
            on_hung: called in the watching thread, once for each run that was stopped.
        """
        self._engines = engines
        self._limit_s = limit_s
        self._on_hung = on_hung
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lom-run-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        stopped: OnnxEngine | None = None
        while not self._closed.wait(self._limit_s / _LOOKS_PER_LIMIT):
            for engine in self._engines():
                seconds = engine.running_for_ns * 1e-9
                if seconds > 2 * self._limit_s:
                    _logger.critical("a run could not be stopped after %.3g s; this process ends", seconds)
                    logging.shutdown()  # lines are written by another thread
                    os._exit(EXIT_HUNG)
                if seconds > self._limit_s and engine is not stopped:
                    _logger.error("a run was stopped: expected at most %g s, took %.3g s", self._limit_s, seconds)
                    engine.stop_run()
                    stopped = engine
                    self._on_hung()
                elif seconds <= self._limit_s and engine is stopped:
                    stopped = None
