"""A user's fallback, kept from doing harm: tried before it is needed, watched when it is."""

import time
from collections.abc import Sequence

import numpy as np

from lom_client.level_rules import LevelRules, Vector
from lom_client.loop_config import Fallback

LONGEST_ANSWER_S = 200e-6
_TRIALS = 5


class GuardedFallback:
    """Calls the function; whatever it does wrong is None.

    **Threads**: one.
    """

    def __init__(self, function: Fallback, rules: LevelRules) -> None:
        """Tries the function with the safe action as the command before.

        Raises:
            ValueError: it raises, is slow in each of several trials, or answers what must not be put out.
        """
        self._function = function
        self._longest_s = rules.period_ns * 1e-9
        durations_s = []
        for _ in range(_TRIALS):
            began_at = time.perf_counter()
            answer = self(rules.safe_action, None)
            durations_s.append(time.perf_counter() - began_at)
            if answer is None:
                raise ValueError("fallback must answer the safe action with numbers, it failed")
            if len(answer) != len(rules.kinds):
                raise ValueError(f"fallback must answer {len(rules.kinds)} numbers, got {len(answer)}")
            for index, (value, low, high) in enumerate(zip(answer, rules.low, rules.high, strict=True)):
                if not low <= value <= high:
                    raise ValueError(f"fallback must answer between {low} and {high} in [{index}], got {value}")
        # The machine may have been busy; not every time.
        if min(durations_s) > LONGEST_ANSWER_S:
            raise ValueError(
                f"fallback must answer within {LONGEST_ANSWER_S * 1e6:.0f} µs, took {min(durations_s) * 1e6:.0f}"
            )

    def __call__(self, command: Vector, measured: Vector | None) -> Sequence[float] | None:
        """The function's answer; None where it raised, took longer than a period, or did not answer one vector."""
        began_at = time.perf_counter()
        try:
            answer = np.asarray(
                self._function(np.array(command), None if measured is None else np.array(measured)), dtype=np.float64
            )
        except Exception:
            return None
        if answer.ndim != 1 or time.perf_counter() - began_at > self._longest_s:
            return None
        values: list[float] = answer.tolist()
        return values
