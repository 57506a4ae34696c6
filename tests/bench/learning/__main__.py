"""Runs what is missing, or renders what is there."""

import argparse
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from tests.bench.learning import report
from tests.bench.learning.methods import METHODS
from tests.bench.learning.results import Results
from tests.bench.learning.runner import missing_jobs, run_jobs
from tests.bench.learning.tasks import TASKS

_DEFAULT_METHODS = ("lom", "onestep", "awr", "td3_bc", "iql", "cql")


def _task_names(asked: Sequence[str]) -> list[str]:
    """Names, and groups of them."""
    names: list[str] = []
    for name in asked:
        members = [task.name for task in TASKS.values() if name in (task.group, "all")]
        if not members and name not in TASKS:
            groups = sorted({task.group for task in TASKS.values()})
            raise argparse.ArgumentTypeError(f"--tasks: expected some of {groups}, all, {sorted(TASKS)}, got {name!r}")
        names += members or [name]
    return list(dict.fromkeys(names))


def _seeds(text: str) -> range:
    first, last = text.split(":") if ":" in text else ("0", text)
    return range(int(first), int(last))


def main() -> None:
    """`report`, or a benchmark."""
    if sys.argv[1:2] == ["report"]:
        report.write(Results())
        return
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learning", description="; ".join(TASKS))
    parser.add_argument("--tasks", nargs="+", default=["generated"], help="names, or generated, like, mix, all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=_DEFAULT_METHODS)
    parser.add_argument("--seeds", type=_seeds, default=range(5), help="how many, or FIRST:END")
    parser.add_argument("--steps", type=int, default=0, help="policy steps; 0 takes the task's")
    parser.add_argument("--mixture-steps", type=int, default=0, help="mixture steps; 0 takes the task's")
    parser.add_argument("--rows", type=int, default=0, help="length of a roll-out; 0 takes the task's")
    parser.add_argument("--processes", type=int, default=1, help="results worked on at a time, one thread each")
    parser.add_argument("--seeds-at-once", type=int, default=8, help="seeds of ours that are trained together")
    arguments = parser.parse_args()
    try:
        tasks = _task_names(arguments.tasks)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    results, console = Results(), Console()
    jobs = missing_jobs(
        results,
        tasks,
        arguments.methods,
        arguments.seeds,
        steps=arguments.steps,
        mixture_steps=arguments.mixture_steps,
        rows=arguments.rows,
        seeds_at_once=arguments.seeds_at_once,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    try:
        failures = run_jobs(jobs, results, console, processes=arguments.processes) if jobs else []
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    done = sum(len(job.seeds) for job in jobs) - len(failures)
    console.print(f"{done} new results, {len(failures)} failed; `report` renders docs/results.md")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
