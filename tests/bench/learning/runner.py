"""Runs what has no result yet; a stopped run goes on at the next missing one."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import SimpleQueue
from threading import Thread
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tests.bench.learning.methods import D3RLPY_ALGORITHMS, Budget, settings_of
from tests.bench.learning.results import Key, Record, Results
from tests.bench.learning.tasks import TASKS
from tests.bench.learning.trial import Job, run_job


class _Told(NamedTuple):
    """What a worker tells: the share of a job that is done, or one of its results."""

    job: Job
    share: float
    record: Record | None = None


def missing_jobs(
    results: Results,
    tasks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 0,
    mixture_steps: int = 0,
    rows: int = 0,
    seeds_at_once: int = 1,
) -> list[Job]:
    """What was asked for and has no result by the same settings, task by task; d3rlpy trains one seed at a time."""
    jobs = []
    for name in tasks:
        task = TASKS[name]
        budget = Budget.of(task, steps=steps, mixture_steps=mixture_steps, rows=rows)
        for method in methods:
            digest = results.digest_of(settings_of(task, method, budget))
            missing = [seed for seed in seeds if Key(name, method, seed, digest) not in results]
            together = 1 if method in D3RLPY_ALGORITHMS else seeds_at_once
            jobs += [
                Job(task=name, method=method, seeds=tuple(missing[i : i + together]), budget=budget, settings=digest)
                for i in range(0, len(missing), together)
            ]
    return jobs


def run_jobs(jobs: Sequence[Job], results: Results, console: Console, *, processes: int = 1) -> list[str]:
    """Runs all of them, each on one thread, and keeps every result as soon as it is there.

    Returns:
        What failed, one message each; the others were run nevertheless.
    """
    context = multiprocessing.get_context("spawn")
    told: SimpleQueue[_Told | None] = context.SimpleQueue()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failures: list[str] = []
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("results", total=sum(len(job.seeds) for job in jobs))

        def listen() -> None:
            bars: dict[str, TaskID] = {}
            while (message := told.get()) is not None:
                name = str(message.job)
                if name not in bars:
                    bars[name] = progress.add_task(name, total=100)
                progress.update(bars[name], completed=round(100 * message.share), visible=message.share < 1)
                if message.record is not None:
                    results.append(message.record)
                    progress.advance(whole)
                    console.print(_summary(message.record))

        listener = Thread(target=listen)
        listener.start()
        try:
            with ProcessPoolExecutor(processes, context, _start_worker, (told,)) as pool:
                futures = {pool.submit(_run, job): job for job in jobs}
                try:
                    for future in as_completed(futures):
                        if error := future.exception():
                            failures.append(f"{futures[future]}: {type(error).__name__}: {error}")
                            console.print(failures[-1])
                except BaseException:  # stopped: what is half done is worth nothing
                    pool.shutdown(wait=False, cancel_futures=True)
                    for worker in multiprocessing.active_children():
                        worker.terminate()
                    raise
        finally:
            told.put(None)
            listener.join()
    return failures


_told: "SimpleQueue[_Told | None]"


def _start_worker(told: "SimpleQueue[_Told | None]") -> None:
    global _told
    _told = told
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    torch.set_num_threads(1)


def _run(job: Job) -> None:
    try:
        run_job(job, lambda share, record=None: _told.put(_Told(job, share, record)))
    except SystemExit:  # stopped; everything is cleaned up, and the pool would go on with the next job
        os._exit(1)


def _summary(record: Record) -> str:
    scale = TASKS[record["task"]].scale
    scores = ", ".join(
        f"{name} {variant['return_mean']:.4g} ({scale(variant['return_mean']):.1f})"
        for name, variant in record["variants"].items()
    )
    return f"{record['task']} {record['method']} seed {record['seed']}: {scores}; {record['train_s']:.0f} s"
