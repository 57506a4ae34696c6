"""One trial: trains seeds of one method on one task, evaluates them on the way and at the end."""

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lom.dataset import Transitions
from lom.evaluation import EVALUATION_SEED, evaluate, policy_act
from lom.learner import Learner
from tests.bench.learning.baselines import train_baseline
from tests.bench.learning.methods import D3RLPY_ALGORITHMS, Budget, d3rlpy_config, lom_config, variants_of
from tests.bench.learning.results import Record
from tests.bench.learning.tasks import TASKS, Task
from tests.bench.machine import processor

CHECKPOINTS = 10
CURVE_SEED = EVALUATION_SEED + 100_000
"""Episodes during training are other ones than those at the end."""

Array = NDArray[np.float32]
Act = Callable[[Array], Array]


class Tell(Protocol):
    """Is told the share of a job that is done, and each of its results."""

    def __call__(self, share: float, record: Record | None = None) -> None: ...


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


def run_job(job: Job, tell: Tell) -> None:
    """Trains, evaluates at every tenth of the policy's steps and at the end.

    Raises:
        MissingDataError, BaselineError, LearningDivergedError: see there.
    """
    task = TASKS[job.task]
    tell(0.0)
    datasets = [task.transitions(seed, job.budget.rows) for seed in job.seeds]
    (_run_d3rlpy if job.method in D3RLPY_ALGORITHMS else _run_lom)(job, task, datasets, tell)


def _run_d3rlpy(job: Job, task: Task, datasets: Sequence[Transitions], tell: Tell) -> None:
    for seed, transitions in zip(job.seeds, datasets, strict=True):
        config = d3rlpy_config(task, job.method, job.budget, seed)

        def on_steps(steps: int, total: int = config["steps"]) -> None:
            tell(0.9 * steps / total)

        trained = train_baseline(transitions, config, checkpoints=CHECKPOINTS, on_steps=on_steps)
        curve = [_curve_return(act, task) for act in trained.policies]
        variants = {"policy": {"curve": curve, **_final(trained.policies[-1], task)}}
        tell(1.0, _record(job, seed, transitions, trained.seconds, variants))


def _run_lom(job: Job, task: Task, datasets: Sequence[Transitions], tell: Tell) -> None:
    """All seeds as one; the seconds of each are its share."""
    config = lom_config(task, job.method, job.budget, job.seeds[0])
    low, high = torch.from_numpy(datasets[0].action_low), torch.from_numpy(datasets[0].action_high)
    clock = _Clock()
    learner = Learner(datasets, config, low, high, job.seeds)
    names = variants_of(job.method)
    curves: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in job.seeds]
    checkpoints = {config.steps * k // CHECKPOINTS for k in range(1, CHECKPOINTS + 1)}
    for stage, steps in learner.remaining():
        if stage == "policy" and steps in checkpoints:
            learner.metrics_of_runs()  # refuses what diverged
            clock.stop()
            for policy, curve in zip(learner.policies, curves, strict=True):
                for name in curve.keys() - {"bc"}:  # which stays what it was
                    curve[name].append(_curve_return(policy_act(policy, name), task))
            tell(0.99 * (config.mixture_steps + steps) / (config.mixture_steps + config.steps))
            clock.start()
    clock.stop()
    seconds = {name: value / len(job.seeds) for name, value in clock.seconds.items()}
    for seed, transitions, policy, curve in zip(job.seeds, datasets, learner.policies, curves, strict=True):
        variants = {name: {"curve": curve[name], **_final(policy_act(policy, name), task)} for name in names}
        tell(1.0, _record(job, seed, transitions, seconds, variants))


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
        "seeds_at_once": len(job.seeds),
        **{name: round(value, 1) for name, value in seconds.items()},
        "device": _device(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "variants": variants,
    }


def _device() -> str:
    """Architecture and processor model, one thread."""
    return f"{platform.machine()}, {processor()}, 1 thread"


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip()
