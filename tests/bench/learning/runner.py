"""Trains and evaluates what has no result yet; a stopped run goes on at the next missing one."""

import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lom.config import TrainConfig
from lom.dataset import Transitions
from lom.evaluation import EVALUATION_SEED, evaluate, policy_act
from lom.learner import Learner
from lom.policy import LomPolicy
from tests.bench.learning.baselines import train_baseline
from tests.bench.learning.methods import (
    D3RLPY_ALGORITHMS,
    Budget,
    d3rlpy_config,
    lom_config,
    settings_of,
    variants_of,
)
from tests.bench.learning.results import Key, Record, Results
from tests.bench.learning.tasks import TASKS, Task

CHECKPOINTS = 10
CURVE_SEED = EVALUATION_SEED + 100_000
"""Episodes during training are other ones than those at the end."""

Array = NDArray[np.float32]
Act = Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Seeds of one method on one task that are trained together; `settings` is the digest of their settings."""

    task: str
    method: str
    seeds: tuple[int, ...]
    budget: Budget
    settings: str

    def __str__(self) -> str:
        return f"{self.task} {self.method} {','.join(map(str, self.seeds))}"


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
            with context.Pool(processes, initializer=_start_worker, initargs=(told,)) as pool:
                for failure in pool.imap_unordered(_run, jobs):
                    if failure:
                        console.print(failure)
                        failures.append(failure)
        finally:
            told.put(None)
            listener.join()
    return failures


_told: "SimpleQueue[_Told | None]"


def _start_worker(told: "SimpleQueue[_Told | None]") -> None:
    global _told
    _told = told
    torch.set_num_threads(1)


def _run(job: Job) -> str | None:
    try:
        run_job(job, lambda share, record=None: _told.put(_Told(job, share, record)))
    except Exception as error:  # one failure must not cost the other results
        return f"{job}: {type(error).__name__}: {error}"
    return None


Tell = Callable[..., None]


def run_job(job: Job, tell: Tell) -> None:
    """Trains, evaluates at every tenth of the steps and at the end, and tells share by share, record by record."""
    task = TASKS[job.task]
    tell(0.0)
    datasets = [task.transitions(seed, job.budget.rows) for seed in job.seeds]
    if job.method in D3RLPY_ALGORITHMS:
        (seed,), (transitions,) = job.seeds, datasets
        config = d3rlpy_config(task, job.method, job.budget, seed)
        trained = train_baseline(
            transitions,
            config,
            checkpoints=CHECKPOINTS,
            on_steps=lambda steps: tell(0.9 * steps / config["steps"]),
        )
        curve = [_curve_return(act, task) for act in trained.policies]
        variants = {"policy": {"curve": curve, **_final(trained.policies[-1], task)}}
        tell(1.0, _record(job, seed, transitions, trained.seconds, variants))
        return
    configs = [lom_config(task, job.method, job.budget, seed) for seed in job.seeds]
    names = variants_of(job.method)
    curves: list[dict[str, list[float]]] = [{name: [] for name in names if name != "bc"} for _ in job.seeds]

    def at_checkpoint(index: int, policy: LomPolicy) -> None:
        for name, curve in curves[index].items():
            curve.append(_curve_return(policy_act(policy, name), task))

    for trained_seed in train_lom(datasets, configs, at_checkpoint, tell):
        index, policy = trained_seed.index, trained_seed.policy
        variants = {
            name: {"curve": curves[index].get(name, []), **_final(policy_act(policy, name), task)} for name in names
        }
        record = _record(job, job.seeds[index], datasets[index], trained_seed.seconds, variants)
        tell((index + 1) / len(job.seeds), record)


@dataclass(frozen=True, kw_only=True)
class TrainedSeed:
    """The policy of `datasets[index]`, and the seconds that its steps took."""

    index: int
    policy: LomPolicy
    seconds: dict[str, float]


def train_lom(
    datasets: Sequence[Transitions],
    configs: Sequence[TrainConfig],
    at_checkpoint: Callable[[int, LomPolicy], None],
    tell: Tell,
) -> Iterator[TrainedSeed]:
    """Trains one seed after another; yields each when it is done."""
    for index, (transitions, config) in enumerate(zip(datasets, configs, strict=True)):
        low, high = torch.from_numpy(transitions.action_low), torch.from_numpy(transitions.action_high)
        learner = Learner(transitions, config, low, high)
        checkpoints = {config.steps * k // CHECKPOINTS for k in range(1, CHECKPOINTS + 1)}
        total = config.mixture_steps + config.steps
        clock = _Clock()
        for stage, steps in learner.remaining():
            if stage == "policy" and steps in checkpoints:
                learner.metrics()  # refuses what diverged
                clock.stop()
                at_checkpoint(index, learner.policy)
                tell((index + 0.99 * (config.mixture_steps + steps) / total) / len(configs))
                clock.start()
        clock.stop()
        yield TrainedSeed(index=index, policy=learner.policy, seconds=clock.seconds)


class _Clock:
    """Seconds of training without those of evaluation: on the wall, and of the processor."""

    def __init__(self) -> None:
        self.seconds = {"train_s": 0.0, "train_cpu_s": 0.0}
        self.start()

    def start(self) -> None:
        self._started = time.monotonic(), time.process_time()

    def stop(self) -> None:
        self.seconds["train_s"] += time.monotonic() - self._started[0]
        self.seconds["train_cpu_s"] += time.process_time() - self._started[1]


def _curve_return(act: Act, task: Task) -> float:
    played = evaluate(act, task.env, episodes=task.curve_episodes, seed=CURVE_SEED)
    return round(float(played.returns.mean()), 4)


def _final(act: Act, task: Task) -> dict[str, Any]:
    played = evaluate(act, task.env, episodes=task.final_episodes, seed=EVALUATION_SEED)
    return {
        "episodes": task.final_episodes,
        "return_mean": round(float(played.returns.mean()), 4),
        "return_std": round(float(played.returns.std()), 4),
        "success_rate": played.success_rate,
    }


def _record(
    job: Job, seed: int, transitions: Transitions, seconds: dict[str, float], variants: dict[str, dict[str, Any]]
) -> Record:
    return {
        "task": job.task,
        "method": job.method,
        "seed": seed,
        "settings": job.settings,
        "mixture_steps": job.budget.mixture_steps,
        "steps": job.budget.steps,
        "rows": len(transitions),
        "data": transitions.fingerprint[:12],
        **{name: round(value, 1) for name, value in seconds.items()},
        "device": _device(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "variants": variants,
    }


def _summary(record: Record) -> str:
    scale = TASKS[record["task"]].scale
    scores = ", ".join(
        f"{name} {variant['return_mean']:.4g} ({scale(variant['return_mean']):.1f})"
        for name, variant in record["variants"].items()
    )
    return f"{record['task']} {record['method']} seed {record['seed']}: {scores}; {record['train_s']:.0f} s"


def _device() -> str:
    """Architecture and processor model, one thread."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    model = models[0].split(":", 1)[1].strip() if models else platform.processor()
    return f"{platform.machine()}, {model}, 1 thread"


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip()
