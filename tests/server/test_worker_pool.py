"""`lom_server.worker_pool` and `lom_server.worker`: real processes that serve nothing, but come, answer and go."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lom_api.reasons import Reason
from lom_server.config import ServerConfig
from lom_server.control import ControlChannel, ControlError, Facts
from lom_server.worker_pool import WorkerPool, WorkerProcess
from tests.support.bundles import Flaws, write_test_bundle

PATIENCE_S = 30.0
WORKERS = 2
AT_ONCE_S = 10.0


def config(tmp_path: Path, **choices: Any) -> ServerConfig:
    return ServerConfig(models=tmp_path, **{"workers": WORKERS, "grace_s": 1.0} | choices)


async def leave_empty(_: WorkerProcess) -> None:
    """Brings a worker up that holds nothing."""


@asynccontextmanager
async def running_pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(config(tmp_path), leave_empty)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.stop()


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        await asyncio.sleep(0.005)


async def replaced(pool: WorkerPool, victims: set[int]) -> None:
    """Returns when others are up in the place of these workers, by number."""
    await until(
        lambda: (
            not victims & {worker.number for worker in pool.workers}
            and not any(worker.is_done_for.is_set() for worker in pool.workers)
        ),
        "the workers are replaced",
    )


async def test_workers_come_and_go(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        workers = tuple(pool.workers)
        assert [worker.number for worker in workers] == [1, 2]
        assert pool.is_alive
        await until(lambda: pool.totals.total()["gauges"]["workers"] == WORKERS, "they are measured")
        assert await pool.stop()
        assert [worker.process.returncode for worker in workers] == [0, 0]


async def test_where_one_does_not_come_up_none_is_left(tmp_path: Path) -> None:
    seen: list[WorkerProcess] = []

    async def bring_up(worker: WorkerProcess) -> None:
        seen.append(worker)
        if worker.number == 1:
            raise ControlError(Reason.WORKER_LOST, "by way of trial")

    pool = WorkerPool(config(tmp_path), bring_up)
    with pytest.raises(ControlError, match="by way of trial"):
        await pool.start()
    await pool.stop()
    assert {worker.number for worker in seen} == {1, 2}
    assert all(worker.process.returncode is not None for worker in seen)


async def test_a_refusal_is_raised_and_one_that_is_lost_is_not(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        one, other = pool.workers
        facts = {"policy": "arm", "version": 1, "digest": "0" * 64, "costs": {}, "path": str(tmp_path / "nowhere")}
        with pytest.raises(ControlError, match=r"^BUNDLE_NOT_FOUND: "):
            await pool.ask_all("load", limit_s=PATIENCE_S, **facts)
        os.kill(one.process.pid, signal.SIGKILL)
        await one.is_done_for.wait()
        await pool.ask_all("measure", limit_s=PATIENCE_S)
        await replaced(pool, {one.number})
        victims = tuple(pool.workers)
        for worker in victims:
            os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(ControlError, match=r"^WORKER_LOST: "):
            await pool.ask_all("measure", limit_s=PATIENCE_S)
        await asyncio.wait_for(other.process.wait(), PATIENCE_S)


async def test_one_that_does_not_do_what_it_must_is_ended_and_replaced(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        numbers = {worker.number for worker in pool.workers}
        await pool.tell_all("publish", policy="arm", default_version=1, versions={1: "never loaded"})
        await replaced(pool, numbers)
        assert pool.totals.total()["counters"]["worker_restarts"] == WORKERS


async def test_one_that_cannot_be_understood_is_ended_and_replaced(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        victim, other = pool.workers
        say(victim.process.pid, b"no JSON\n")
        await replaced(pool, {victim.number})
        assert victim.process.returncode == -signal.SIGKILL
        assert other in pool.workers


def say(process: int, line: bytes) -> None:
    """Writes to the pipe between `process` and its supervisor: the only one but the standard streams' that it has."""
    ours = {
        os.stat(f"/proc/self/fd/{entry}").st_ino
        for entry in os.listdir("/proc/self/fd")
        if int(entry) > 2 and os.path.exists(f"/proc/self/fd/{entry}")
    }
    for entry in Path(f"/proc/{process}/fd").iterdir():
        if int(entry.name) > 2 and os.readlink(entry).startswith("pipe:") and entry.stat().st_ino in ours:
            with entry.open("wb") as pipe:
                pipe.write(line)
            return
    raise AssertionError("the worker has no pipe to its supervisor")


async def test_one_that_does_not_answer_in_time_is_not_waited_for(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        worker, _ = pool.workers
        os.kill(worker.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ControlError, match=r"^WARMUP_TIMEOUT: expected a worker that answers within 0.1 s"):
                await worker.ask("measure", limit_s=0.1)
        finally:
            os.kill(worker.process.pid, signal.SIGCONT)


async def test_who_is_cancelled_as_the_answer_comes_stops_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = asyncio.Event()

    async def answer_when_told(*_: Any, **__: Any) -> Facts:
        await answer.wait()
        return {}

    async with running_pool(tmp_path) as pool:
        worker, _ = pool.workers
        with monkeypatch.context() as patched:
            patched.setattr(ControlChannel, "ask", answer_when_told)
            asking = asyncio.create_task(worker.ask("measure", limit_s=PATIENCE_S))
            await asyncio.sleep(0.01)
            answer.set()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking


async def test_stopping_while_a_successor_starts_leaves_no_process(tmp_path: Path) -> None:
    started: list[WorkerProcess] = []
    forever = asyncio.Event()

    async def bring_up(worker: WorkerProcess) -> None:
        started.append(worker)
        if worker.number > 1:
            await forever.wait()

    pool = WorkerPool(config(tmp_path, workers=1), bring_up)
    await pool.start()
    started[0].process.kill()
    await until(lambda: len(started) == 2, "a successor is brought up")
    await pool.stop()
    assert all(worker.process.returncode is not None for worker in started)


async def test_a_terminal_interrupts_the_supervisor_alone(tmp_path: Path) -> None:
    async with running_pool(tmp_path) as pool:
        for worker in pool.workers:
            assert os.getpgid(worker.process.pid) != os.getpgid(0)
            os.kill(worker.process.pid, signal.SIGINT)
            os.kill(worker.process.pid, signal.SIGTERM)
        await pool.ask_all("measure", limit_s=PATIENCE_S)


async def test_a_worker_without_its_files_says_so_and_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pool = WorkerPool(config(tmp_path, workers=1, tokens=tmp_path / "nowhere"), leave_empty)
    with pytest.raises(ControlError, match=r"^WORKER_LOST: "):
        await pool.start()
    assert await pool.stop()
    (line,) = capfd.readouterr().err.splitlines()
    assert "not started: BAD_TOKENS: " in line


@pytest.mark.parametrize("is_loading", [False, True])
async def test_a_worker_that_lost_its_supervisor_ends_at_once(tmp_path: Path, is_loading: bool) -> None:
    worker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lom_server.worker", config(tmp_path).to_json()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    write_test_bundle(tmp_path / "slow", flaws=Flaws(burn_layers=9000))  # takes far longer to load than `AT_ONCE_S`
    if is_loading:
        facts = {"policy": "arm", "version": 1, "digest": "", "costs": {}, "path": str(tmp_path / "slow")}
        worker.stdin.write(json.dumps({"number": 1, "command": "load", **facts}).encode() + b"\n")
    worker.stdin.write(json.dumps({"number": 2, "command": "measure"}).encode() + b"\n")
    assert json.loads(await worker.stdout.readline())["number"] == 2
    start = time.monotonic()
    worker.stdin.close()
    await worker.wait()
    ended_s = time.monotonic() - start
    assert ended_s < AT_ONCE_S
