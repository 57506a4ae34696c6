"""Control loops that run by themselves while a test does harm, and the judge of what they did."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_client import ControlLoop, Level, LoopAction, LoopConfig, PolicyClient, PolicyProcess, Source
from lom_client.level_rules import LevelRules
from lom_client.levels import Command
from lom_client.loop_counters import LoopTally
from tests.support.servers import wait_until

BOUNDS = ([-1.0, -1.0], [1.0, 1.0])


def hundred_hertz(**changes: Any) -> LoopConfig:
    """Two positions that may cross their range in half a second; everything else as a user's default."""
    values: dict[str, Any] = {
        "period_s": 0.01,
        "kinds": "position",
        "safe_action": [0.0, 0.0],
        "action_bounds": BOUNDS,
        "slew_per_s": 4.0,
        "max_age_s": 0.02,
        "history_length": 1_000_000,
    }
    return LoopConfig(**(values | changes))


@dataclass
class RunningLoop:
    """A loop at its own rate in a thread of its own. `actions` so far, and how long each step took."""

    loop: ControlLoop
    config: LoopConfig
    actions: list[LoopAction] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    failure: BaseException | None = None

    @property
    def last(self) -> LoopAction | None:
        """The newest action."""
        return self.actions[-1] if self.actions else None

    def rearm(self) -> None:
        """As an operator would, as soon as it is allowed; returns when the policy acts again."""

        def is_acting() -> bool:
            self.loop.rearm()
            return self.last is not None and self.last.source is Source.FRESH

        wait_until(is_acting, "the policy to act again")

    def run(self, observe: Callable[[int], NDArray[np.float64]]) -> None:
        """Until the loop is closed."""
        try:
            for tick in self.loop.ticks():
                began_at = time.perf_counter()
                action = self.loop.step(observe(tick.index))
                self.took_s.append(time.perf_counter() - began_at)
                self.actions.append(action)
        except BaseException as error:
            self.failure = error
            raise


def circling(index: int) -> NDArray[np.float64]:
    """An observation that never repeats, whose answer goes round."""
    return np.array([0.9 * np.sin(index / 7), 0.9 * np.cos(index / 11), 1e-6 * index])


@contextmanager
def running_loop(
    policy: PolicyClient | PolicyProcess,
    config: LoopConfig,
    observe: Callable[[int], NDArray[np.float64]] = circling,
) -> Iterator[RunningLoop]:
    """A loop that has got its first fresh action; judged when it ends."""
    with ControlLoop(policy, config) as loop:
        running = RunningLoop(loop, config)
        thread = threading.Thread(target=running.run, args=(observe,))
        thread.start()
        try:
            wait_until(lambda: bool(running.last and running.last.source is Source.FRESH), "a first fresh action")
            yield running
        finally:
            loop.close()
            thread.join()
    assert running.failure is None
    assert LoopTally(loop.history).snapshot() == loop.counters
    judge([record for record in loop.history if isinstance(record, Command)], config.rules(*BOUNDS))


def judge(commands: list[Command], rules: LevelRules) -> None:
    """One command a tick; each of them sound; none of an answer that is stale, late, reordered or used before."""
    assert [command.sequence for command in commands] == list(range(1, len(commands) + 1))
    last_used = 0
    for before, command in zip([None, *commands], commands, strict=False):
        values = np.array(command.values)
        assert np.isfinite(values).all()
        assert (values >= rules.low).all()
        assert (values <= rules.high).all()
        if before is not None:
            assert (np.abs(values - before.values) <= np.array(rules.max_step) * (1 + 1e-9)).all()
        assert (command.source is Source.FRESH) == (command.reply is not None) == (command.level is Level.NOMINAL)
        if command.reply is not None:
            assert command.age_ns is not None
            assert 0 <= command.age_ns <= rules.max_age_ns
            assert command.reply.sequence > last_used
            assert command.reply.sequence == command.sequence or not rules.waits
            last_used = command.reply.sequence
