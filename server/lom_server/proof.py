"""Has a bundle proved in a process of its own (`lom_server.verifier`), and says what came of it."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lom_api.reasons import Reason
from lom_server.config import ServerConfig
from lom_server.control import ControlError


@dataclass(frozen=True, kw_only=True)
class Proof:
    """A bundle that reproduced its golden rows on the provider that will serve.

    Attributes:
        costs: nanoseconds of a run, by graph and number of rows.
    """

    digest: str
    provider: str
    costs: Mapping[str, Mapping[int, int]]


async def prove(bundle: Path, config: ServerConfig, *, yields: bool = False) -> Proof:
    """Proves `bundle` in a process of its own, away from this event loop, within the configured time and memory.

    Args:
        yields: it has only the processor time that nobody else wants, as robots are being answered meanwhile.

    Raises:
        ControlError: why it must not be served; WARMUP_TIMEOUT, VERIFIER_LOST (the process died: of a crash, or of
            too much memory; or there could be none).
    """
    try:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lom_server.verifier", str(bundle), config.to_json()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,  # a terminal interrupts whole groups; in a session of its own it would be scheduled apart
        )
    except OSError:
        raise ControlError(Reason.VERIFIER_LOST, "no process to check the bundle in could be started") from None
    if yields:
        # Said from here, as importing the runtime is a good part of the work; not by niceness, under which an answer
        # may still have to wait for the end of a slice.
        with suppress(ProcessLookupError):  # it is over already
            os.sched_setscheduler(child.pid, os.SCHED_IDLE, os.sched_param(0))
    try:
        output, _ = await asyncio.wait_for(child.communicate(), config.load_limit_s)
    except TimeoutError:
        raise ControlError(
            Reason.WARMUP_TIMEOUT, f"expected a bundle that is checked within {config.load_limit_s:g} s"
        ) from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    try:
        answer = json.loads(output)
    except ValueError:
        raise ControlError(
            Reason.VERIFIER_LOST, "the process that checked the bundle died: of a crash, or of too much memory"
        ) from None
    if "reason" in answer:
        raise ControlError(answer["reason"], answer["detail"])
    costs = {
        graph: {int(rows): run_ns for rows, run_ns in sizes.items()} for graph, sizes in answer.pop("costs").items()
    }
    return Proof(**answer, costs=costs)
