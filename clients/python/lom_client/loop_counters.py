"""What became of a control loop's ticks, in numbers."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lom_client.levels import Command, Level, Rejected, Source

OTHER = "OTHER"
"""Stands for the reasons beyond the first hundred: a server can make up more than a robot has memory for."""
_MOST_REASONS = 100

Record: TypeAlias = Command | Rejected
"""A tick's command, or an answer or a wish that was turned down."""


@dataclass(frozen=True, kw_only=True)
class LoopCounters:
    """A snapshot that does not change. The numbers of `sources` add up to `ticks`, those of `misses` to the ticks whose
    source is not `FRESH`.

    Attributes:
        sources: ticks by where their command came from.
        misses: ticks without the policy's action, by reason.
        rejected: answers that were not used, and rearms that were refused, by reason.
        transitions: changes of level, by (from, to).
        ages_ms: fresh commands by the age of their observation: n is the number with an age of at most the key's
            milliseconds, and above half of it.
        longest_miss_run: most ticks in a row without the policy's action.
        unrecorded: ticks that the loop's recorder dropped; 0 without one.
    """

    sources: Mapping[Source, int] = field(default_factory=dict)
    misses: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    transitions: Mapping[tuple[Level, Level], int] = field(default_factory=dict)
    ages_ms: Mapping[float, int] = field(default_factory=dict)
    longest_miss_run: int = 0
    unrecorded: int = 0

    @property
    def ticks(self) -> int:
        """Ticks so far."""
        return sum(self.sources.values())

    @property
    def fresh(self) -> int:
        """Ticks that the policy's action was put out."""
        return self.sources.get(Source.FRESH, 0)

    @property
    def fresh_share(self) -> float:
        """Share of the ticks that the policy's action was put out; 0 before the first tick."""
        return self.fresh / self.ticks if self.ticks else 0.0


class LoopTally:
    """Counts. **Threads**: one counts, any may look."""

    def __init__(self, history: Iterable[Record] = ()) -> None:
        """What `history` adds up to."""
        # One dictionary, one change for each tick: a look from another thread sees whole ticks.
        self._ticks: Counter[tuple[Source, str]] = Counter()
        self._rejected: Counter[str] = Counter()
        self._transitions: Counter[tuple[Level, Level]] = Counter()
        self._ages_ms: Counter[float] = Counter()
        self._reasons: set[str] = set()
        self._level = Level.DEGRADED
        self._miss_run = 0
        self._longest_miss_run = 0
        for record in history:
            self.count(record)

    def count(self, record: Record) -> None:
        """One more."""
        reason = self._known(record.reason)
        if isinstance(record, Rejected):
            self._rejected[reason] += 1
            return
        if record.level is not self._level:
            self._transitions[self._level, record.level] += 1
            self._level = record.level
        if record.source is Source.FRESH:
            self._miss_run = 0
            self._ages_ms[_upper_edge_ms(record.age_ns or 0)] += 1
        else:
            self._miss_run += 1
            self._longest_miss_run = max(self._longest_miss_run, self._miss_run)
        self._ticks[record.source, reason] += 1

    def _known(self, reason: str) -> str:
        if reason not in self._reasons:
            if len(self._reasons) >= _MOST_REASONS:
                return OTHER
            self._reasons.add(reason)
        return reason

    def snapshot(self) -> LoopCounters:
        """The numbers so far."""
        ticks = self._ticks.copy()
        sources: Counter[Source] = Counter()
        misses: Counter[str] = Counter()
        for (source, reason), number in ticks.items():
            sources[source] += number
            if source is not Source.FRESH:
                misses[reason] += number
        return LoopCounters(
            sources=sources,
            misses=misses,
            rejected=self._rejected.copy(),
            transitions=self._transitions.copy(),
            ages_ms=self._ages_ms.copy(),
            longest_miss_run=self._longest_miss_run,
        )


def _upper_edge_ms(age_ns: int) -> float:
    """The power of two of 1/16 ms at or above the age."""
    sixteenths = -(-age_ns * 16 // 1_000_000)
    return float(1 << max(0, sixteenths - 1).bit_length()) / 16
