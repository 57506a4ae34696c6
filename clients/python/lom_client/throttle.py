"""When not to ask a server that has too much to do."""

import math
import random
from collections.abc import Callable

_MEMORY_S = 1.0
_REQUESTS_PER_ACCEPTED = 2.0


class Throttle:
    """Asks no more than about twice as often as is answered, and not before the server wishes.

    With more refusals than answers of late, a request is left out with probability
    (requests - 2 * answers) / (requests + 1), where the past counts less by a factor e every second. What is still
    asked shows when the server has recovered.

    **Threads**: one.
    """

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        """`chance` draws from [0, 1)."""
        self._chance = chance
        self._requests = 0.0
        self._accepted = 0.0
        self._counted_at = 0.0
        self._not_before = -math.inf

    def lets_ask(self, now: float) -> bool:
        """Whether to ask at `now`, in monotonic seconds; counts the wish."""
        fading = math.exp(min(0.0, self._counted_at - now) / _MEMORY_S)
        self._requests *= fading
        self._accepted *= fading
        self._counted_at = now
        if now < self._not_before:
            return False
        left_out = (self._requests - _REQUESTS_PER_ACCEPTED * self._accepted) / (self._requests + 1)
        self._requests += 1
        return self._chance() >= left_out

    def was_answered(self) -> None:
        """The server did not refuse for want of capacity."""
        self._accepted += 1

    def was_refused(self, now: float, retry_after_s: float | None) -> None:
        """The server refused, and asks to be left alone for so long."""
        if retry_after_s is not None:
            self._not_before = now + retry_after_s
