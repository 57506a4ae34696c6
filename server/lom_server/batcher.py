"""Joins rows of several callers into one run of the engine, and gives every caller its own rows back.

The rules, each proved by a test of the same number in `tests/server/test_batcher.py`:

1. A batch is whatever waits when the engine is free. No timer.
2. A request's rows are never split; a batch never exceeds `max_batch_rows`.
3. An entry that is cancelled or past its deadline leaves before rows are joined; its neighbours are untouched.
4. An engine failure fails exactly the entries of that batch, once each; the engine thread lives on.
5. Admission is bounded, in rows: what finds the queue full, or its deadline over, is refused at once.
6. A batch that the engine answers in well under a millisecond runs inline on the event loop (a thread hand-over
   costs more than the run); a larger one runs in the one engine thread.

Knows neither transport nor runtime: an `Engine` is anything that turns rows into rows.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lom_api.reasons import Reason
from lom_server.errors import PolicyError, log_incident

Array: TypeAlias = NDArray[Any]
Rows: TypeAlias = Mapping[str, Array]

INLINE_LIMIT_NS = 500_000


class Engine(Protocol):
    """What answers a batch."""

    def run(self, variant: str, outputs: Sequence[str], rows: Rows) -> Rows:
        """Answers rows by input name with rows by output name, in the same order, in memory of their own.

        Threads: called by one thread at a time, not always by the same one. Blocks.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Lane:
    """The entries that may share a batch: one variant of one engine.

    Attributes:
        outputs: what every entry of the lane is answered with.
        inline_rows: largest batch that runs on the event loop; 0 sends every batch to the engine thread.
    """

    engine: Engine
    variant: str
    outputs: tuple[str, ...]
    inline_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One entry's rows by output name, and what they cost.

    Attributes:
        queue_ns: admission until the batch was formed.
        inference_ns: the whole batch's run.
        batch_rows: rows of the whole batch.
    """

    rows: Rows
    queue_ns: int
    inference_ns: int
    batch_rows: int


@dataclass(kw_only=True, slots=True, eq=False)
class _Entry:
    rows: Rows
    count: int
    deadline_ns: int
    admitted_ns: int
    future: asyncio.Future[Answer]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    lane: Lane
    entries: Sequence[_Entry]
    count: int
    formed_ns: int


class MicroBatcher:
    """Answers every admitted entry exactly once, by the rules above.

    Threads: belongs to one event loop; nothing here may be called from another thread.
    """

    def __init__(
        self, *, max_batch_rows: int, max_queue_rows: int, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """`clock_ns` is monotonic; deadlines are instants of it."""
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._clock_ns = clock_ns
        # Dicts as ordered sets: entries leave from the middle when their callers go.
        self._waiting: dict[Lane, dict[_Entry, None]] = {}
        self._waiting_rows = 0
        self._engine_is_busy = False
        self._turn_is_scheduled = False
        self._is_closed = False
        self._last_inference_ns = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lom-engine")

    @property
    def waiting_rows(self) -> int:
        """Rows admitted and not yet in a batch."""
        return self._waiting_rows

    async def submit(self, lane: Lane, rows: Rows, deadline_ns: int) -> Answer:
        """Answers `rows`, in whatever company.

        Args:
            rows: by input name, all with the same first axis of 1 to `max_batch_rows`; not changed, not kept.

        Raises:
            PolicyError: BATCH_TOO_LARGE, QUEUE_FULL, DEADLINE_EXCEEDED or DRAINING; or what the engine raised.
        """
        if self._is_closed:
            raise _closed()
        now_ns = self._clock_ns()
        count = len(next(iter(rows.values())))
        if count > self._max_batch_rows:
            raise PolicyError(Reason.BATCH_TOO_LARGE, f"expected at most {self._max_batch_rows} rows, got {count}")
        if deadline_ns <= now_ns:
            raise PolicyError(Reason.DEADLINE_EXCEEDED, "the deadline was over on arrival")
        if self._waiting_rows + count > self._max_queue_rows:
            retry_after_ms = max(1, self._last_inference_ns // 1_000_000)
            raise PolicyError(
                Reason.QUEUE_FULL,
                f"expected at most {self._max_queue_rows} waiting rows, "
                f"got {count} more than {self._waiting_rows}; retry_after_ms {retry_after_ms}",
            )
        entry = _Entry(
            rows=rows,
            count=count,
            deadline_ns=deadline_ns,
            admitted_ns=now_ns,
            future=asyncio.get_running_loop().create_future(),
        )
        queue = self._waiting.setdefault(lane, {})
        queue[entry] = None
        self._waiting_rows += count
        self._schedule_turn()
        try:
            return await entry.future
        except asyncio.CancelledError:
            if entry in queue:
                self._leave(queue, entry)
            raise

    def close(self) -> None:
        """Refuses whatever waits or comes later with DRAINING, and lets the engine thread end after its run."""
        self._is_closed = True
        for queue in self._waiting.values():
            for entry in tuple(queue):
                self._leave(queue, entry)
                if not entry.future.done():
                    entry.future.set_exception(_closed())
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _schedule_turn(self) -> None:
        # One turn of the event loop later, so that everything the same poll of the sockets brought shares a batch.
        if not self._turn_is_scheduled and not self._engine_is_busy:
            self._turn_is_scheduled = True
            asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._turn_is_scheduled = False
        batch = self._form_batch()
        if batch is None:
            return
        if batch.count <= batch.lane.inline_rows:
            self._settle(batch, *self._run(batch))
        else:
            self._engine_is_busy = True
            run = asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)
            run.add_done_callback(functools.partial(self._end_thread_run, batch))

    def _end_thread_run(self, batch: _Batch, run: "asyncio.Future[tuple[Rows | PolicyError, int]]") -> None:
        self._engine_is_busy = False
        if run.cancelled():
            self._settle(batch, _closed(), 0)
        else:
            self._settle(batch, *run.result())

    def _run(self, batch: _Batch) -> tuple[Rows | PolicyError, int]:
        """Runs the engine once; returns what went wrong instead of raising it. Threads: any."""
        start_ns = self._clock_ns()
        result: Rows | PolicyError
        try:
            result = batch.lane.engine.run(batch.lane.variant, batch.lane.outputs, _joined(batch.entries))
            if any(len(result[name]) != batch.count for name in batch.lane.outputs):
                raise PolicyError(Reason.BAD_MODEL_OUTPUT, f"expected {batch.count} rows of every output")
        except PolicyError as error:
            result = error
        except BaseException as error:  # the engine thread must outlive whatever a run raises
            incident = log_incident("engine failed", error)
            result = PolicyError(Reason.INFERENCE_FAILED, f"the policy could not be run, id {incident}")
        return result, self._clock_ns() - start_ns

    def _form_batch(self) -> _Batch | None:
        """Takes the lane whose first entry has waited longest, as many of its entries as fit, in order."""
        now_ns = self._clock_ns()
        for queue in self._waiting.values():
            for entry in tuple(queue):
                if entry.future.done():  # cancelled, and its caller has not run since
                    self._leave(queue, entry)
                elif entry.deadline_ns <= now_ns:
                    self._leave(queue, entry)
                    entry.future.set_exception(
                        PolicyError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the engine was free")
                    )
        lanes = [lane for lane, queue in self._waiting.items() if queue]
        if not lanes:
            return None
        lane = min(lanes, key=lambda lane: next(iter(self._waiting[lane])).admitted_ns)
        queue = self._waiting[lane]
        entries: list[_Entry] = []
        count = 0
        for entry in queue:
            if count + entry.count > self._max_batch_rows:
                break
            entries.append(entry)
            count += entry.count
        for entry in entries:
            self._leave(queue, entry)
        return _Batch(lane=lane, entries=entries, count=count, formed_ns=now_ns)

    def _leave(self, queue: dict[_Entry, None], entry: _Entry) -> None:
        del queue[entry]
        self._waiting_rows -= entry.count

    def _settle(self, batch: _Batch, result: Rows | PolicyError, inference_ns: int) -> None:
        self._last_inference_ns = inference_ns
        first = 0
        for entry in batch.entries:
            rows = slice(first, first + entry.count)
            first += entry.count
            if entry.future.done():  # its caller went while the engine ran
                continue
            if isinstance(result, PolicyError):
                entry.future.set_exception(PolicyError(result.reason, result.detail))
                continue
            entry.future.set_result(
                Answer(
                    # Copies: a slice would hand every caller a view of its neighbours' rows.
                    rows=result if len(batch.entries) == 1 else {name: result[name][rows].copy() for name in result},
                    queue_ns=batch.formed_ns - entry.admitted_ns,
                    inference_ns=inference_ns,
                    batch_rows=batch.count,
                )
            )
        if self._waiting_rows:
            self._schedule_turn()


def rows_worth_inlining(run_ns: Callable[[int], int], max_batch_rows: int) -> int:
    """The largest power of two of rows that `run_ns` (rows -> nanoseconds) still answers within `INLINE_LIMIT_NS`.

    0 where even one row takes longer. Asks for sizes in rising order and stops at the first that is too slow.
    """
    inline_rows = 0
    rows = 1
    while rows <= max_batch_rows and run_ns(rows) <= INLINE_LIMIT_NS:
        inline_rows = rows
        rows *= 2
    return max_batch_rows if rows > max_batch_rows else inline_rows


def _joined(entries: Sequence[_Entry]) -> Rows:
    if len(entries) == 1:
        return entries[0].rows
    return {name: np.concatenate([entry.rows[name] for entry in entries]) for name in entries[0].rows}


def _closed() -> PolicyError:
    return PolicyError(Reason.DRAINING, "the server is stopping")
