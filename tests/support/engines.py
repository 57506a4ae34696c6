"""Engines for tests: they satisfy `lom_server.batcher.Engine` and burn processor time, as a model does."""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_server.batcher import Rows

_FUEL = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)


class BurningEngine:
    """Answers `action` = 2 x `observation` (and a mode and a margin per row), and remembers every batch.

    Attributes:
        gate: while it is cleared, a run goes on burning; set at first.
        failures: what the next runs raise, in order; None lets a run succeed.
        batches: a copy of the observations of every run that started.
        failed_batches: those of them that raised.
        threads: name of the thread of every run.
        answers: the arrays that were handed out, as they were handed out.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.failures: deque[BaseException | None] = deque()
        self.batches: list[NDArray[Any]] = []
        self.failed_batches: list[NDArray[Any]] = []
        self.threads: list[str] = []
        self.answers: list[NDArray[Any]] = []

    def run(self, variant: str, outputs: Sequence[str], rows: Rows) -> Rows:
        """As `Engine.run`; `variant` is not looked at."""
        observation = rows["observation"]
        self.threads.append(threading.current_thread().name)
        self.batches.append(observation.copy())
        burn()
        while not self.gate.is_set():
            burn()
        failure = self.failures.popleft() if self.failures else None
        if failure is not None:
            self.failed_batches.append(self.batches[-1])
            raise failure
        action = observation * np.float32(2)
        self.answers.append(action)
        answers = {
            "action": action,
            "mode": np.zeros(len(observation), dtype=np.int32),
            "margin": np.zeros(len(observation), dtype=np.float32),
            "state_score": np.abs(observation).sum(axis=1),
        }
        return {name: answers[name] for name in outputs}


def burn() -> None:
    """Some tens of microseconds of one core, most of them without the GIL."""
    _FUEL @ _FUEL
