"""The worker processes of one server: started, watched, replaced when they die or hang, drained at the end."""

import asyncio
import itertools
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lom_api.reasons import Reason
from lom_server.config import ServerConfig
from lom_server.control import HUNG, LINE_LIMIT_BYTES, ControlChannel, ControlError, Facts
from lom_server.errors import log_incident
from lom_server.metrics import Totals

_logger = logging.getLogger(__name__)

_ANSWER_LIMIT_S = 5.0
_LOOK_EVERY_S = 1.0
# A worker that lived for less is not replaced at once: what killed it may kill every one of them.
_SOUND_LIFE_S = 10.0
_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0


@dataclass(kw_only=True, eq=False)
class WorkerProcess:
    """One worker, as its supervisor sees it.

    Attributes:
        number: differs from that of every other worker of this server, earlier ones included.
        is_done_for: it has ended, or said that it hangs.
    """

    number: int
    process: asyncio.subprocess.Process
    is_done_for: asyncio.Event = field(default_factory=asyncio.Event)
    started_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self._channel = ControlChannel(self.process.stdout, self.process.stdin, self._on_event)
        self._following = asyncio.create_task(self._follow())

    async def ask(self, command: str, *, limit_s: float, **facts: Any) -> Facts:
        """The worker's answer.

        Raises:
            ControlError: it refused; WARMUP_TIMEOUT, where it did not answer within `limit_s`; WORKER_LOST, where it
                ended instead.
        """
        try:
            async with asyncio.timeout(limit_s):
                return await self._channel.ask(command, **facts)
        except TimeoutError:
            raise ControlError(
                Reason.WARMUP_TIMEOUT, f"expected a worker that answers within {limit_s:g} s, got none"
            ) from None

    async def end(self, *, limit_s: float) -> bool:
        """Lets it finish what it accepted, and ends it. Returns whether it finished within `limit_s`."""
        try:
            was_clean: bool = (await self.ask("drain", limit_s=limit_s))["was_clean"]
            self._channel.close()
            async with asyncio.timeout(_ANSWER_LIMIT_S):
                await self.process.wait()
        except (ControlError, TimeoutError):
            was_clean = False
        await self.kill()
        return was_clean

    async def kill(self) -> None:
        """Ends it at once."""
        if not self._channel.is_lost:  # then it ends already, and asyncio would lose its exit status
            self.process.kill()
        await asyncio.wait({self._following})

    async def _follow(self) -> None:
        try:
            await self._channel.listen()
        except (ValueError, LookupError, TypeError) as error:
            log_incident(f"worker {self.number} cannot be understood", error)
            self.process.kill()
        await self.process.wait()
        self.is_done_for.set()

    def _on_event(self, event: str) -> None:
        if event == HUNG:
            self.is_done_for.set()


class WorkerPool:
    """As many workers as the configuration says, each replaced when it is done for.

    Threads: belongs to one event loop.
    """

    def __init__(self, config: ServerConfig, bring_up: Callable[[WorkerProcess], Awaitable[None]]) -> None:
        """`bring_up` makes a new worker hold and serve what the others do."""
        self._config = config
        self._bring_up = bring_up
        self._workers: dict[int, WorkerProcess] = {}
        self._keepers: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[bool]] = set()
        self._numbers = itertools.count(1)
        # A run may hold a worker's event loop until the worker itself stops it, or ends.
        self._answer_limit_s = max(_ANSWER_LIMIT_S, 2 * config.run_limit_s)
        self.totals = Totals()

    @property
    def workers(self) -> Iterable[WorkerProcess]:
        """Those that are up, and those that died and have no successor yet."""
        return tuple(self._workers.values())

    @property
    def is_alive(self) -> bool:
        """Whether any of them is fit to serve."""
        return any(not worker.is_done_for.is_set() for worker in self.workers)

    async def start(self) -> None:
        """Returns when every worker is up.

        Raises:
            ControlError: one of them is not to be had.
        """
        slots = range(self._config.workers)
        starts = await asyncio.gather(*(self._start_worker() for _ in slots), return_exceptions=True)
        for slot, worker in enumerate(starts):
            if isinstance(worker, WorkerProcess):
                self._workers[slot] = worker
        for failure in starts:
            if isinstance(failure, BaseException):
                raise failure
        for slot in slots:
            self._keepers |= {asyncio.create_task(self._keep(slot)), asyncio.create_task(self._look_after(slot))}

    async def ask_all(self, command: str, *, limit_s: float, **facts: Any) -> None:
        """Asks all workers for something that they may refuse.

        A worker that is lost meanwhile is replaced by one that is brought up to date, so its answer is not missed.

        Raises:
            ControlError: a living worker refused, or none lived to answer.
        """
        asked = [worker.ask(command, limit_s=limit_s, **facts) for worker in self.workers]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refusals = [answer for answer in answers if isinstance(answer, BaseException)]
        for refusal in refusals:
            if not isinstance(refusal, ControlError) or refusal.reason != Reason.WORKER_LOST:
                raise refusal
        if len(refusals) == len(answers):
            raise refusals[0]

    async def tell_all(self, command: str, **facts: Any) -> None:
        """Has all workers do what none may refuse. One that fails is ended, and its successor knows better."""
        await asyncio.gather(*(self._tell(worker, command, **facts) for worker in self.workers))

    async def stop(self) -> bool:
        """Drains every worker. Returns whether all finished what they had accepted within the grace time."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        ends = [worker.end(limit_s=self._drain_limit_s) for worker in self.workers]
        return all(await asyncio.gather(*ends, *self._retiring))

    @property
    def _drain_limit_s(self) -> float:
        return self._config.grace_s + self._answer_limit_s

    async def _start_worker(self) -> WorkerProcess:
        number = next(self._numbers)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "lom_server.worker", self._config.to_json()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_LIMIT_BYTES,
                process_group=0,  # a terminal interrupts whole groups
            )
        except OSError:
            raise ControlError(Reason.WORKER_LOST, "no process to serve in could be started") from None
        worker = WorkerProcess(number=number, process=process)
        try:
            await worker.ask("measure", limit_s=self._config.load_limit_s)  # it is up when it answers
            await self._bring_up(worker)
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def _keep(self, slot: int) -> None:
        pause_s = 0.0
        while True:
            worker = self._workers[slot]
            await worker.is_done_for.wait()
            has_ended = worker.process.returncode is not None
            if has_ended:
                self.totals.retire(worker.number)
                _logger.error("worker %d ended with status %d", worker.number, worker.process.returncode)
            else:
                _logger.error("worker %d hung and is replaced", worker.number)
            lived_s = time.monotonic() - worker.started_at
            pause_s = 0.0 if lived_s > _SOUND_LIFE_S else min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, 2 * pause_s))
            self.totals.restarted()
            self._workers[slot] = await self._start_successor(pause_s)
            if not has_ended:
                retiring = asyncio.create_task(self._retire(worker))
                self._retiring.add(retiring)
                retiring.add_done_callback(self._retiring.discard)

    async def _start_successor(self, pause_s: float) -> WorkerProcess:
        while True:
            await asyncio.sleep(pause_s)
            try:
                return await self._start_worker()
            except ControlError as error:
                pause_s = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, 2 * pause_s))
                _logger.error("a worker could not be started: %s; once more in %g s", error, pause_s)

    async def _retire(self, worker: WorkerProcess) -> bool:
        was_clean = await worker.end(limit_s=self._drain_limit_s)
        self.totals.retire(worker.number)
        return was_clean

    async def _look_after(self, slot: int) -> None:
        """Keeps the totals fresh, and ends a worker that no longer answers: its loop is stuck, or it is stopped."""
        while True:
            worker = self._workers[slot]
            try:
                answer = await worker.ask("measure", limit_s=self._answer_limit_s)
                self.totals.update(worker.number, answer["metrics"])
            except ControlError as error:
                if error.reason == Reason.WARMUP_TIMEOUT:
                    await self._end(worker, error)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _tell(self, worker: WorkerProcess, command: str, **facts: Any) -> None:
        try:
            await worker.ask(command, limit_s=self._answer_limit_s, **facts)
        except ControlError as error:
            await self._end(worker, error)

    async def _end(self, worker: WorkerProcess, error: ControlError) -> None:
        if error.reason != Reason.WORKER_LOST:
            _logger.error("worker %d is ended: %s", worker.number, error)
        await worker.kill()
