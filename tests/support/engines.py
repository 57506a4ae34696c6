"""Engines for tests: they satisfy `lom_server.batcher.Engine` and burn processor time, as a model does."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_server.batcher import Rows

_FUEL = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
_CALIBRATION_ROUNDS = 5000


class BurningEngine:
    """Answers `action` = 2 x `observation` (and a mode and a margin per row), and remembers every batch.

    Attributes:
        gate: while it is cleared, a run goes on burning; set at first.
        failures: what the next runs raise, in order; None lets a run succeed.
        batches: a copy of the observations of every run that started.
        failed_batches: those of them that raised.
        threads: name of the thread of every run.
        answers: the arrays that were handed out, as they were handed out.
        graphs: what every run was asked for.
        started_ns: `clock_ns` at the start of every run.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self.graphs: list[str] = []
        self.started_ns: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failures: deque[BaseException | None] = deque()
        self.batches: list[NDArray[Any]] = []
        self.failed_batches: list[NDArray[Any]] = []
        self.threads: list[str] = []
        self.answers: list[NDArray[Any]] = []

    def run(self, graph: str, outputs: Sequence[str], rows: Rows) -> Rows:
        """As `Engine.run`; every `graph` answers alike."""
        observation = rows["observation"]
        self.graphs.append(graph)
        self.started_ns.append(self._clock_ns())
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


class SteadyEngine:
    """Answers `action` = 2 x `observation` after a steady amount of work on one core, without the GIL, as a graph does.

    Attributes:
        runs: how many so far.
    """

    def __init__(self, *, run_ns: int, row_ns: int = 0) -> None:
        """A run takes about `run_ns`, and `row_ns` more for every row, on this machine as fast as it is now."""
        self.runs = 0
        self._run_ns = run_ns
        self._row_ns = row_ns
        self._ns_of_a_round = min(_burn_ns(_CALIBRATION_ROUNDS) for _ in range(20)) / _CALIBRATION_ROUNDS

    def cost_ns(self, rows: int) -> int:
        """What a run over `rows` should take."""
        return self._run_ns + rows * self._row_ns

    def run(self, graph: str, outputs: Sequence[str], rows: Rows) -> Rows:
        """As `Engine.run`; every `graph` answers alike."""
        observation = rows["observation"]
        self.runs += 1
        _burn_ns(max(1, round(self.cost_ns(len(observation)) / self._ns_of_a_round)))
        return {"action": observation * np.float32(2)}


def _burn_ns(rounds: int) -> int:
    start_ns = time.perf_counter_ns()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    return time.perf_counter_ns() - start_ns


def burn() -> None:
    """Some tens of microseconds of one core, most of them without the GIL."""
    _FUEL @ _FUEL
