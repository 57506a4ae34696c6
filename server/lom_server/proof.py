"""Has a bundle proved in a process of its own (`lom_server.verifier`), and says what came of it."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lom_api.reasons import Reason
from lom_server.child_process import run_to_end
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
    command = (sys.executable, "-m", "lom_server.verifier", str(bundle), config.to_json())
    try:
        output = (await run_to_end(command, limit_s=config.load_limit_s, yields=yields)).output
    except TimeoutError:
        raise ControlError(
            Reason.WARMUP_TIMEOUT, f"expected a bundle that is checked within {config.load_limit_s:g} s"
        ) from None
    except OSError:
        raise ControlError(Reason.VERIFIER_LOST, "no process to check the bundle in could be started") from None
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
