"""Work that may end a process, or hold it up, done by a process of its own that does nothing else."""

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple


class Finished(NamedTuple):
    """What a process left. `complaint` is its stderr, where that was asked for."""

    status: int
    output: bytes
    complaint: bytes


async def run_to_end(
    arguments: Sequence[str], *, limit_s: float, stderr: int | None = None, yields: bool = False
) -> Finished:
    """Runs a program, away from this event loop; no more of it is left when this returns, raises or is cancelled.

    Args:
        stderr: as of `asyncio.create_subprocess_exec`; None leaves it this process's own.
        yields: it has only the processor time that nobody else wants.

    Raises:
        TimeoutError: it took longer than `limit_s`.
        OSError: it could not be started.
    """
    child = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        process_group=0,  # a terminal interrupts whole groups; in a session of its own it would be scheduled apart
    )
    try:
        if yields:
            # Said from here, as a program's imports are a good part of its work; not by niceness, under which an answer
            # of somebody else's may still have to wait for the end of a slice.
            with suppress(ProcessLookupError):  # it is over already
                os.sched_setscheduler(child.pid, os.SCHED_IDLE, os.sched_param(0))
        async with asyncio.timeout(limit_s):
            output, complaint = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    return Finished(await child.wait(), output, complaint or b"")
