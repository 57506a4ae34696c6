"""Ticks at a fixed rate."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """One tick of a schedule.

    Attributes:
        index: 0, 1, 2, ... counting every period of the schedule, the skipped ones included.
        late_s: seconds between the instant this tick was due and the instant it began.
        skipped: periods left out before this tick because the tick before it took too long.
    """

    index: int
    late_s: float
    skipped: int


def paced_ticks(
    period_s: float, *, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Tick]:
    """Ticks without end, each due at a whole number of periods after the first: lateness never adds up.

    A loop body that overruns loses the ticks that are over; they are not caught up in a burst, which would command
    the robot faster than its rate.

    **Threads**: blocks its caller until each tick is due.

    Raises:
        ValueError: at the first tick, a period that is not above 0.
    """
    if not period_s > 0:
        raise ValueError(f"period_s must be above 0, got {period_s}")
    start = clock()
    index = 0
    skipped = 0
    while True:
        due = start + index * period_s
        while (remaining_s := due - clock()) > 0:
            sleep(remaining_s)
        yield Tick(index, clock() - due, skipped)
        periods_over = int((clock() - start) / period_s)
        skipped = max(0, periods_over - index - 1)
        index += 1 + skipped
