"""Joins rows of several callers into one run of the engine, and gives every caller its own rows back.

The rules, each proved by a test of the same number in `tests/server/test_batcher.py`:

1. A batch is whatever waits when the engine is free, as far as its members' deadlines allow. No timer. Where there is
   no time for everybody, the nearest deadlines are given up before batches become small.
2. A request's rows are never split; a batch never exceeds `max_batch_rows`.
3. An entry that is cancelled, past its deadline or certain to miss it leaves before rows are joined and is never run;
   its neighbours are untouched.
4. An engine failure fails exactly the entries of that batch, once each; the engine thread lives on.
5. Admission is bounded, in rows and in time: what finds no room, or cannot be answered before its deadline by the
   order in which it would be served, is refused at once and never run.
6. A batch that the engine answers in well under a millisecond runs inline on the event loop (a thread hand-over
   costs more than the run); a larger one runs in the one engine thread.
7. LIVE goes before BATCH: no batch has both, BATCH runs only while no LIVE entry waits, holds at most half of the
   queue and gives it up to LIVE.
8. Clients take turns. The client whose turn it is chooses the lane, by its oldest entry; the batch is filled with the
   rows of whoever has fewest in it. In a full queue everyone is entitled to an equal share, and whoever asks for no
   more gets it from the newest entries of the client that holds most.
9. No queue stands in anybody's way. Where it has not been empty for a tenth of a second, and has made somebody's
   deadline infeasible, more is asked than can be answered, and waiting makes no answer more, only older: until it is
   empty again, no more may wait than two runs of each lane.

Knows neither transport nor runtime: an `Engine` is anything that turns rows into rows.
"""

import asyncio
import functools
import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lom_api.reasons import Reason
from lom_server.costs import RunCost
from lom_server.errors import PolicyError, log_incident

Array: TypeAlias = NDArray[Any]
Rows: TypeAlias = Mapping[str, Array]

INLINE_LIMIT_NS = 500_000

_NEVER_NS = 2**63
_STANDING_NS = 100_000_000
_RUNS_THAT_MAY_WAIT = 2


class Priority(IntEnum):
    """Who goes first."""

    LIVE = 0
    """Somebody waits for the answer."""
    BATCH = 1
    """Shadow and bulk work, for which any time will do."""


@dataclass(kw_only=True, slots=True, eq=False)
class Ticket:
    """Tells a caller who may want to take a request back whether it is still worth while.

    Attributes:
        has_begun: it is in a run, or was.
    """

    has_begun: bool = False


class Engine(Protocol):
    """What answers a batch."""

    def run(self, graph: str, outputs: Sequence[str], rows: Rows) -> Rows:
        """Answers rows by input name with rows by output name, in the same order, in memory of their own.

        Threads: called by one thread at a time, not always by the same one. Blocks.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Lane:
    """The entries that may share a batch: one graph of one engine.

    Attributes:
        outputs: what every entry of the lane is answered with.
        inline_rows: largest batch that runs on the event loop; 0 sends every batch to the engine thread.
        cost: what a run takes; without measurements no deadline counts as infeasible.
    """

    engine: Engine
    graph: str
    outputs: tuple[str, ...]
    inline_rows: int
    cost: RunCost = field(default_factory=lambda: RunCost({}))


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
    lane: Lane
    rows: Rows
    count: int
    deadline_ns: int
    client: str
    priority: Priority
    admitted_ns: int
    future: asyncio.Future[Answer]
    ticket: Ticket | None
    is_waiting: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    lane: Lane
    entries: Sequence[_Entry]
    count: int
    formed_ns: int


@dataclass(slots=True, eq=False)
class _Queue:
    """The entries of one client for one lane, oldest first."""

    # A dict as an ordered set: entries leave from the middle when their callers go.
    entries: dict[_Entry, None] = field(default_factory=dict)
    rows: int = 0


@dataclass(slots=True, eq=False)
class _Client:
    queues: dict[Lane, _Queue] = field(default_factory=dict)
    rows: int = 0

    @property
    def lane(self) -> Lane:
        """Where its oldest entry waits."""
        if len(self.queues) == 1:
            return next(iter(self.queues))
        return min(self.queues, key=lambda lane: next(iter(self.queues[lane].entries)).admitted_ns)


class _Waiting:
    """What waits at one priority.

    Attributes:
        rows: all of them.
        clients: who waits, whose turn is next first.
        lanes: rows by lane.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.clients: dict[str, _Client] = {}
        self.lanes: dict[Lane, int] = {}
        self._rows_before: dict[int, dict[Lane, int]] = {}

    def add(self, entry: _Entry) -> None:
        """Puts `entry` behind the others of its client; a new client behind the other clients."""
        client = self.clients.get(entry.client)
        if client is None:
            client = self.clients[entry.client] = _Client()
        queue = client.queues.get(entry.lane)
        if queue is None:
            queue = client.queues[entry.lane] = _Queue()
        queue.entries[entry] = None
        queue.rows += entry.count
        client.rows += entry.count
        self.rows += entry.count
        self.lanes[entry.lane] = self.lanes.get(entry.lane, 0) + entry.count
        entry.is_waiting = True
        self._rows_before.clear()

    def remove(self, entry: _Entry) -> None:
        """Forgets `entry`, and its client with its last entry."""
        client = self.clients[entry.client]
        queue = client.queues[entry.lane]
        del queue.entries[entry]
        queue.rows -= entry.count
        client.rows -= entry.count
        self.rows -= entry.count
        self.lanes[entry.lane] -= entry.count
        if not queue.rows:
            del client.queues[entry.lane]
        if not client.rows:
            del self.clients[entry.client]
        if not self.lanes[entry.lane]:
            del self.lanes[entry.lane]
        entry.is_waiting = False
        self._rows_before.clear()

    def take(self, entries: Sequence[_Entry]) -> None:
        """Removes `entries`, and puts those clients behind the others whose oldest entry is among them."""
        turns_over = {entry.client: None for entry in entries if self.clients[entry.client].lane is entry.lane}
        for entry in entries:
            self.remove(entry)
        for name in turns_over:
            if name in self.clients:
                self.clients[name] = self.clients.pop(name)

    @property
    def next_lane(self) -> Lane:
        """The lane of the oldest entry of the client whose turn it is."""
        return next(iter(self.clients.values())).lane

    def in_lane(self, lane: Lane) -> list[_Entry]:
        """All entries of `lane`."""
        queues = [client.queues[lane] for client in self.clients.values() if lane in client.queues]
        return [entry for queue in queues for entry in queue.entries]

    def held_by(self, name: str) -> int:
        """Rows of one client."""
        client = self.clients.get(name)
        return 0 if client is None else client.rows

    def entries(self) -> list[_Entry]:
        """All of them."""
        return [entry for lane in self.lanes for entry in self.in_lane(lane)]

    def newest_of_largest(self) -> _Entry:
        """The newest entry of the client that holds most rows."""
        largest = max(self.clients.values(), key=lambda client: client.rows)
        newest = (next(reversed(queue.entries)) for queue in largest.queues.values())
        return max(newest, key=lambda entry: entry.admitted_ns)

    def rows_before(self, name: str, count: int) -> dict[Lane, int]:
        """Rows by lane that have their turn before `count` new ones of a client: of every client as many as of it."""
        depth = self.held_by(name) + count
        before = self._rows_before.get(depth)
        if before is not None:  # refused again and again, with nothing changed: what an overloaded server does most
            return before
        before = self._rows_before[depth] = {}
        for client in self.clients.values():
            left = depth
            for lane, queue in client.queues.items():
                before[lane] = before.get(lane, 0) + min(queue.rows, left)
                left -= queue.rows
                if left <= 0:
                    break
        return before


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
        self._waiting = {priority: _Waiting() for priority in Priority}
        # No entry that waits has an earlier deadline: until then nobody need look for those that have expired.
        self._earliest_deadline_ns = _NEVER_NS
        self._last_empty_ns = clock_ns()
        self._is_in_the_way = False
        self._engine_is_busy = False
        self._engine_free_ns = 0
        self._turn_is_scheduled = False
        self._is_closed = False
        self._last_inference_ns = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lom-engine")

    @property
    def waiting_rows(self) -> int:
        """Rows admitted and not yet in a batch."""
        return self._waiting[Priority.LIVE].rows + self._waiting[Priority.BATCH].rows

    async def submit(
        self,
        lane: Lane,
        rows: Rows,
        deadline_ns: int,
        *,
        client: str = "",
        priority: Priority = Priority.LIVE,
        ticket: Ticket | None = None,
    ) -> Answer:
        """Answers `rows`, in whatever company.

        Args:
            rows: by input name, all with the same first axis of 1 to `max_batch_rows`; not changed, not kept.
            client: who takes turns with the others.
            ticket: kept up to date.

        Raises:
            PolicyError: BATCH_TOO_LARGE, QUEUE_FULL, DEADLINE_INFEASIBLE, DEADLINE_EXCEEDED or DRAINING; or what the
                engine raised.
        """
        if self._is_closed:
            raise _closed()
        now_ns = self._clock_ns()
        count = len(next(iter(rows.values())))
        if count > self._max_batch_rows:
            raise PolicyError(Reason.BATCH_TOO_LARGE, f"expected at most {self._max_batch_rows} rows, got {count}")
        if deadline_ns <= now_ns:
            raise PolicyError(Reason.DEADLINE_EXCEEDED, "the deadline was over on arrival")
        self._note_whether_empty(now_ns)
        self._check_room(client, priority, count)
        self._check_time(lane, client, priority, count, deadline_ns, now_ns)
        self._make_room(priority, count)
        entry = _Entry(
            lane=lane,
            rows=rows,
            count=count,
            deadline_ns=deadline_ns,
            client=client,
            priority=priority,
            admitted_ns=now_ns,
            future=asyncio.get_running_loop().create_future(),
            ticket=ticket,
        )
        self._waiting[priority].add(entry)
        self._earliest_deadline_ns = min(self._earliest_deadline_ns, deadline_ns)
        self._schedule_turn()
        try:
            return await entry.future
        except asyncio.CancelledError:
            if entry.is_waiting:
                self._waiting[priority].remove(entry)
            raise

    def close(self) -> None:
        """Refuses whatever waits or comes later with DRAINING, and lets the engine thread end after its run."""
        self._is_closed = True
        for waiting in self._waiting.values():
            for entry in waiting.entries():
                self._dismiss(entry, _closed())
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _note_whether_empty(self, now_ns: int) -> None:
        if not self._waiting[Priority.LIVE].rows:
            self._last_empty_ns = now_ns
            self._is_in_the_way = False

    def _room(self, priority: Priority) -> int:
        """Rows that may wait at `priority`."""
        live = self._waiting[Priority.LIVE]
        if priority is Priority.LIVE:
            if not self._is_in_the_way:
                return self._max_queue_rows
            return min(self._max_queue_rows, _RUNS_THAT_MAY_WAIT * self._max_batch_rows * len(live.lanes))
        return min(self._max_queue_rows // 2, self._max_queue_rows - live.rows)

    def _check_room(self, client: str, priority: Priority, count: int) -> None:
        waiting, room = self._waiting[priority], self._room(priority)
        if waiting.rows + count <= room:
            return
        clients = len(waiting.clients) + (client not in waiting.clients)
        if waiting.held_by(client) + count > room // clients:
            raise self._queue_full(f"expected at most {room} waiting rows, got {count} more than {waiting.rows}")

    def _make_room(self, priority: Priority, count: int) -> None:
        """Dismisses what is in the way of an entry that `_check_room` let pass."""
        waiting, shadow = self._waiting[priority], self._waiting[Priority.BATCH]
        while waiting.rows + count > self._room(priority) or self.waiting_rows + count > self._max_queue_rows:
            newest = (shadow if shadow.rows else waiting).newest_of_largest()
            self._dismiss(newest, self._queue_full("its place in the queue went to a caller with a better claim"))

    def _queue_full(self, detail: str) -> PolicyError:
        return PolicyError(Reason.QUEUE_FULL, detail, retry_after_ms=max(1, self._last_inference_ns // 1_000_000))

    def _check_time(
        self, lane: Lane, client: str, priority: Priority, count: int, deadline_ns: int, now_ns: int
    ) -> None:
        waiting = self._waiting[priority]
        end_ns = self._end_ns(lane, priority, count, waiting.lanes, now_ns)
        if end_ns > deadline_ns and waiting.rows:  # behind all that waits it would be late: behind whom will it be?
            end_ns = self._end_ns(lane, priority, count, waiting.rows_before(client, count), now_ns)
        if end_ns > deadline_ns:
            if priority is Priority.LIVE and now_ns - self._last_empty_ns > _STANDING_NS:
                self._is_in_the_way |= self._end_ns(lane, priority, count, {}, now_ns) <= deadline_ns
            raise PolicyError(
                Reason.DEADLINE_INFEASIBLE,
                f"expected {(end_ns - now_ns) / 1e6:.1f} ms or more until the deadline, "
                f"got {(deadline_ns - now_ns) / 1e6:.1f}",
                retry_after_ms=max(1, (end_ns - deadline_ns) // 1_000_000),
            )

    def _end_ns(self, lane: Lane, priority: Priority, count: int, before: Mapping[Lane, int], now_ns: int) -> int:
        """When the last of `count` rows would be answered, with the rows `before` them, by lane, at their priority."""
        end_ns = max(now_ns, self._engine_free_ns)
        if priority is Priority.BATCH:
            for other, rows in self._waiting[Priority.LIVE].lanes.items():
                end_ns += self._runs_ns(other, rows, now_ns)
        for other, rows in before.items():
            if other is not lane:
                # A run that goes first takes along whatever else waits in its lane.
                filled = -(-rows // self._max_batch_rows) * self._max_batch_rows
                end_ns += self._runs_ns(other, min(filled, self._waiting[priority].lanes[other]), now_ns)
        joined = before.get(lane, 0) + count
        if joined - count >= self._max_batch_rows:  # by its turn others will have come, who fill its batch
            joined = -(-joined // self._max_batch_rows) * self._max_batch_rows
        return end_ns + self._runs_ns(lane, joined, now_ns)

    def _runs_ns(self, lane: Lane, rows: int, now_ns: int) -> int:
        """What it takes to run `rows`, in as few runs as possible."""
        full_runs, rest = divmod(rows, self._max_batch_rows)
        run_ns = lane.cost.estimate_ns(rest, now_ns) if rest else 0
        if full_runs:
            run_ns += full_runs * lane.cost.estimate_ns(self._max_batch_rows, now_ns)
        return run_ns

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
        for entry in batch.entries:
            if entry.ticket is not None:
                entry.ticket.has_begun = True
        if batch.count <= batch.lane.inline_rows:
            self._settle(batch, *self._run(batch))
        else:
            self._engine_is_busy = True
            self._engine_free_ns = batch.formed_ns + batch.lane.cost.estimate_ns(batch.count, batch.formed_ns)
            run = asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch)
            run.add_done_callback(functools.partial(self._end_thread_run, batch))

    def _end_thread_run(self, batch: _Batch, run: "asyncio.Future[tuple[Rows | PolicyError, int]]") -> None:
        self._engine_is_busy = False
        self._engine_free_ns = 0
        if run.cancelled():
            self._settle(batch, _closed(), 0)
        else:
            self._settle(batch, *run.result())

    def _run(self, batch: _Batch) -> tuple[Rows | PolicyError, int]:
        """Runs the engine once; returns what went wrong instead of raising it. Threads: any."""
        start_ns = self._clock_ns()
        result: Rows | PolicyError
        try:
            result = batch.lane.engine.run(batch.lane.graph, batch.lane.outputs, _joined(batch.entries))
            if any(len(result[name]) != batch.count for name in batch.lane.outputs):
                raise PolicyError(Reason.BAD_MODEL_OUTPUT, f"expected {batch.count} rows of every output")
        except PolicyError as error:
            result = error
        except BaseException as error:  # the engine thread must outlive whatever a run raises
            incident = log_incident("engine failed", error)
            result = PolicyError(Reason.INFERENCE_FAILED, f"the policy could not be run, id {incident}")
        return result, self._clock_ns() - start_ns

    def _form_batch(self) -> _Batch | None:
        """Takes what is to run next from what waits; None where nothing does."""
        now_ns = self._clock_ns()
        if now_ns >= self._earliest_deadline_ns:
            self._dismiss_expired(now_ns)
        for waiting in self._waiting.values():
            while waiting.rows:
                lane = waiting.next_lane
                entries = self._chosen(waiting, lane, now_ns)
                if entries:
                    waiting.take(entries)
                    self._note_whether_empty(now_ns)
                    return _Batch(lane=lane, entries=entries, count=_rows_of(entries), formed_ns=now_ns)
        return None

    def _chosen(self, waiting: _Waiting, lane: Lane, now_ns: int) -> list[_Entry]:
        """The entries of `lane` to run next; dismisses those whom it is too late for."""
        entries, is_cut_short = self._filled(waiting, lane, now_ns)
        if not is_cut_short or self._can_wait(waiting, lane, entries, now_ns):
            return entries
        # There is no time for everybody. Batches kept small for the nearest deadlines leave others behind whose
        # deadlines are the nearest then: they would become ever smaller. So the nearest are given up, as many as it
        # takes for a batch of all others to be on time, unless that would be the smaller batch.
        rows = waiting.lanes[lane]
        least_deadline_ns = self._run_end_ns(lane, rows, now_ns)
        near = [entry for entry in waiting.in_lane(lane) if entry.deadline_ns < least_deadline_ns]
        for entry in sorted(near, key=lambda entry: entry.deadline_ns):
            if self._run_end_ns(lane, rows, now_ns) <= entry.deadline_ns:
                least_deadline_ns = entry.deadline_ns
                break
            rows -= entry.count
        fuller, _ = self._filled(waiting, lane, now_ns, least_deadline_ns)
        if _rows_of(fuller) <= _rows_of(entries):
            return entries
        for entry in near:
            if entry.deadline_ns < least_deadline_ns:
                self._dismiss(entry, _no_time_left())
        return fuller

    def _filled(
        self, waiting: _Waiting, lane: Lane, now_ns: int, least_deadline_ns: int = 0
    ) -> tuple[list[_Entry], bool]:
        """A batch in which everybody is on time; and whether there was room for more, but not the time."""
        # Hardly a deadline is so near that it matters how large the batch is.
        full_end_ns = self._run_end_ns(lane, waiting.lanes[lane], now_ns)
        is_cut_short = False
        entries: list[_Entry] = []
        gone: list[_Entry] = []
        count, deadline_ns = 0, _NEVER_NS
        # (rows in the batch, place, queue) of every client of the lane: in order of place, hence a heap already.
        turns = [
            (0, place, iter(client.queues[lane].entries))
            for place, client in enumerate(waiting.clients.values())
            if lane in client.queues
        ]
        while turns and count < self._max_batch_rows:
            taken, place, queue = turns[0]
            entry = next(queue, None)
            if entry is None:
                heapq.heappop(turns)
                continue
            if entry.deadline_ns < least_deadline_ns:
                continue
            is_near = entry.deadline_ns < full_end_ns
            if entry.future.done() or (is_near and entry.deadline_ns < self._run_end_ns(lane, entry.count, now_ns)):
                gone.append(entry)
                continue
            joint_count, joint_deadline_ns = count + entry.count, min(deadline_ns, entry.deadline_ns)
            is_late = joint_deadline_ns < full_end_ns and (
                joint_deadline_ns < self._run_end_ns(lane, joint_count, now_ns)
            )
            if is_late or joint_count > self._max_batch_rows:
                is_cut_short |= is_late
                heapq.heappop(turns)
                continue
            entries.append(entry)
            count, deadline_ns = joint_count, joint_deadline_ns
            heapq.heapreplace(turns, (taken + entry.count, place, queue))
        for entry in gone:
            self._dismiss(entry, _no_time_left())
        return entries, is_cut_short

    def _can_wait(self, waiting: _Waiting, lane: Lane, entries: Sequence[_Entry], now_ns: int) -> bool:
        """Whether all others of the lane are on time with the run after that of `entries`."""
        others = set(waiting.in_lane(lane)).difference(entries)
        rows = _rows_of(others)
        end_ns = self._run_end_ns(lane, _rows_of(entries), now_ns) + lane.cost.estimate_ns(rows, now_ns)
        return rows <= self._max_batch_rows and all(end_ns <= entry.deadline_ns for entry in others)

    def _run_end_ns(self, lane: Lane, rows: int, now_ns: int) -> int:
        """When a run over `rows`, or as many of them as a batch may have, would end if it started now."""
        return now_ns + lane.cost.estimate_ns(min(rows, self._max_batch_rows), now_ns)

    def _dismiss_expired(self, now_ns: int) -> None:
        self._earliest_deadline_ns = _NEVER_NS
        for waiting in self._waiting.values():
            for entry in waiting.entries():
                if entry.deadline_ns <= now_ns:
                    self._dismiss(entry, PolicyError(Reason.DEADLINE_EXCEEDED, "the deadline passed before its turn"))
                else:
                    self._earliest_deadline_ns = min(self._earliest_deadline_ns, entry.deadline_ns)

    def _dismiss(self, entry: _Entry, error: PolicyError) -> None:
        """Answers an entry that waits with `error`."""
        self._waiting[entry.priority].remove(entry)
        if not entry.future.done():
            entry.future.set_exception(error)

    def _settle(self, batch: _Batch, result: Rows | PolicyError, inference_ns: int) -> None:
        self._last_inference_ns = inference_ns
        if not isinstance(result, PolicyError):
            now_ns = self._clock_ns()
            # All of it, not the engine's part alone: hand-overs and a busy event loop keep callers waiting too.
            batch.lane.cost.observe(batch.count, now_ns - batch.formed_ns, now_ns)
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
        if self.waiting_rows:
            self._schedule_turn()


def rows_worth_inlining(measured_ns: Mapping[int, int], max_batch_rows: int) -> int:
    """The largest measured size that, like every smaller one, is answered within `INLINE_LIMIT_NS`; 0 without one.

    Args:
        measured_ns: nanoseconds of a run by rows; where all of them are short, so is one of `max_batch_rows`.
    """
    inline_rows = 0
    for rows, run_ns in sorted(measured_ns.items()):
        if run_ns > INLINE_LIMIT_NS:
            return inline_rows
        inline_rows = rows
    return max_batch_rows if measured_ns else 0


def _joined(entries: Sequence[_Entry]) -> Rows:
    if len(entries) == 1:
        return entries[0].rows
    return {name: np.concatenate([entry.rows[name] for entry in entries]) for name in entries[0].rows}


def _rows_of(entries: Iterable[_Entry]) -> int:
    return sum(entry.count for entry in entries)


def _no_time_left() -> PolicyError:
    return PolicyError(Reason.DEADLINE_EXCEEDED, "no time was left for a run")


def _closed() -> PolicyError:
    return PolicyError(Reason.DRAINING, "the server is stopping")
