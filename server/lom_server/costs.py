"""What a batch will cost: measured once, corrected by every run since."""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from itertools import accumulate

# More than half of these must have been slow before the machine is taken to be slow: 0.1 s of ten-millisecond runs.
_RUNS_REMEMBERED = 15
# Belief fades, and memory with it, where nothing runs: within a second, or as long as so many runs take ...
_BELIEF_NS = 1_000_000_000
_BELIEF_RUNS = 10
# ... down to this share of the measured cost: an estimate may be as wrong as that and still not refuse for good.
_UNBELIEVED = 0.25


class RunCost:
    """Nanoseconds that one run of a graph takes, by rows.

    The measured table, times how much slower the machine is now: the median over the last runs, so that neither slow
    first runs nor a hiccup make it cautious. A run quicker than the table proves that the table was measured on a busy
    machine, and lowers it. Where everybody is refused nothing runs and nothing is learnt; so belief in the estimate
    fades until somebody gets through and finds out.

    Threads: belongs to one event loop.
    """

    def __init__(self, measured: Mapping[int, int]) -> None:
        """`measured` is nanoseconds by rows. Where it is empty every estimate is 0, and stays so."""
        self._sizes = [0, *sorted(measured)]
        # A larger batch is never cheaper: where it was, noise was measured.
        self._costs_ns = list(accumulate((measured[size] for size in self._sizes[1:]), max, initial=0))
        self._table_factor = 1.0
        self._ratios = deque([1.0] * _RUNS_REMEMBERED, maxlen=_RUNS_REMEMBERED)
        self._slowdown = 1.0
        self._believed_at_ns: int | None = None
        self._belief_ns = _BELIEF_NS

    def estimate_ns(self, rows: int, now_ns: int) -> int:
        """What a run over `rows` would take now: interpolated between sizes, extrapolated above the largest."""
        return int(self._quiet_ns(rows) * (self._slowdown + (_UNBELIEVED - self._slowdown) * self._faded(now_ns)))

    def observe(self, rows: int, run_ns: int, now_ns: int) -> None:
        """Learns from a run over `rows` that took `run_ns` and ended now."""
        expected_ns = self._quiet_ns(rows)
        if not expected_ns:
            return
        ratio = max(run_ns, 1) / expected_ns
        self._table_factor *= min(ratio, 1.0)
        for _ in range(round(len(self._ratios) * self._faded(now_ns))):
            self._ratios.popleft()
        self._ratios.append(max(ratio, 1.0))
        self._slowdown = sorted(self._ratios)[(len(self._ratios) - 1) // 2]
        self._believed_at_ns = now_ns
        self._belief_ns = max(_BELIEF_NS, _BELIEF_RUNS * run_ns)

    def _faded(self, now_ns: int) -> float:
        """How much of the belief in what was learnt is gone, 0 to 1."""
        if self._believed_at_ns is None:
            self._believed_at_ns = now_ns  # nobody asked before: the table is fresh
        return min(1.0, (now_ns - self._believed_at_ns) / self._belief_ns)

    def _quiet_ns(self, rows: int) -> float:
        """What a run over `rows` takes on a machine that has nothing else to do."""
        if len(self._sizes) == 1:
            return 0.0
        right = min(bisect_left(self._sizes, rows), len(self._sizes) - 1)
        size, cost_ns = self._sizes[right - 1], self._costs_ns[right - 1]
        slope = (self._costs_ns[right] - cost_ns) / (self._sizes[right] - size)
        return (cost_ns + slope * (rows - size)) * self._table_factor
