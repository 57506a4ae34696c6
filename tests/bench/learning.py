"""What LOM learns, task by task and seed by seed, against its bars.

    python -m tests.bench.learning --tasks fork bandit4 --seeds 10

One result per (task, seed) goes into build/bench/learning.json as soon as it is there; what is there already, by the
same configuration, is not run again, so a stopped bench goes on where it was. The table at the end is the one in
docs/results.md.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lom.config import PRESETS, TrainConfig
from lom.dataset import load_transitions
from lom.envs.bandit import bandit_demonstrations
from lom.envs.fork import fork_demonstrations
from lom.evaluation import EVALUATION_SEED, env_spaces, evaluate, policy_act
from lom.learner import Learner
from lom.policy import VARIANTS

RESULTS = Path("build/bench/learning.json")
REAL_DATA = "LOM_BENCH_DATA"
HOPPER_FILES = ("opolo_Hopper_scores_3500_episodes_10.npz", "cs285_fall2023_Hopper.npz")

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset, an environment and a budget.

    Attributes:
        generate: seed -> arrays to train on; None for files under $LOM_BENCH_DATA.
        files: names of such files.
        min_mixing_weight: the support mask, where the task wants another one than the default.
    """

    env: str
    preset: str
    episodes: int
    generate: Callable[[int], Arrays] | None = None
    files: tuple[str, ...] = ()
    min_mixing_weight: float | None = None


def _scaled_fork(seed: int) -> Arrays:
    arrays = fork_demonstrations(seed=seed)
    return {**arrays, "rewards": 0.1 * arrays["rewards"]}


TASKS: dict[str, Task] = {
    "fork": Task(env="lom/Fork-v0", preset="small", episodes=100, generate=lambda seed: fork_demonstrations(seed=seed)),
    "fork_rewards_x0.1": Task(env="lom/Fork-v0", preset="small", episodes=100, generate=_scaled_fork),
    "fork_80_20": Task(
        env="lom/Fork-v0",
        preset="small",
        episodes=100,
        generate=lambda seed: fork_demonstrations(seed=seed, below_probability=0.2),
    ),
    "fork_no_mask": Task(
        env="lom/Fork-v0",
        preset="small",
        episodes=100,
        generate=lambda seed: fork_demonstrations(seed=seed),
        min_mixing_weight=0.0,
    ),
    "bandit4": Task(
        env="lom/Bandit4-v0", preset="small", episodes=1, generate=lambda seed: bandit_demonstrations(seed=seed)
    ),
    "hopper_real_mix": Task(env="Hopper-v4", preset="locomotion_cpu", episodes=10, files=HOPPER_FILES),
}


def config_of(task_name: str, seed: int) -> TrainConfig:
    """What one seed of one task is trained by."""
    task = TASKS[task_name]
    config = replace(PRESETS[task.preset], seed=seed, threads=1)
    return config if task.min_mixing_weight is None else replace(config, min_mixing_weight=task.min_mixing_weight)


def is_current(result: Mapping[str, Any]) -> bool:
    """Whether this code would train the same."""
    return bool(result["config_digest"] == config_of(result["task"], result["seed"]).digest)


def run_one(task_name: str, seed: int) -> dict[str, Any]:
    """Trains one seed of one task on one thread and plays every variant; a seed is data, weights and batches."""
    task = TASKS[task_name]
    torch.set_num_threads(1)
    spaces = env_spaces(task.env)
    with tempfile.TemporaryDirectory() as folder:
        if task.generate is not None:
            paths = [Path(folder) / "data.npz"]
            np.savez(paths[0], **task.generate(seed))  # type: ignore[arg-type]
        else:
            paths = [Path(os.environ[REAL_DATA]) / name for name in task.files]
        transitions = load_transitions(paths, action_bounds=(spaces.action_low, spaces.action_high))
    config = config_of(task_name, seed)
    started = time.monotonic()
    trained_on, _ = transitions.hold_out(config.held_out_share, config.seed)  # as lom-train does
    learner = Learner(trained_on, config, torch.tensor(spaces.action_low), torch.tensor(spaces.action_high))
    for _ in learner.remaining():
        pass
    training_s = time.monotonic() - started
    variants = {
        variant: evaluate(
            policy_act(learner.policy, variant), task.env, episodes=task.episodes, seed=EVALUATION_SEED
        ).to_json()
        for variant in VARIANTS
    }
    return {
        "task": task_name,
        "seed": seed,
        "training_s": round(training_s, 1),
        "config_digest": config.digest,
        "rows": len(transitions),
        "variants": variants,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds, and the worst seed."""
    lines = [
        "| task | seeds | variant | return, mean ± sd over seeds | worst seed | success, mean (worst) | train s/seed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task_name in TASKS:
        rows = [result for result in results if result["task"] == task_name]
        for variant in ("actor", "greedy_mode", "bc") if rows else ():
            returns = np.array([row["variants"][variant]["return_mean"] for row in rows])
            successes = [row["variants"][variant]["success_rate"] for row in rows]
            success = "" if successes[0] is None else f"{np.mean(successes):.3f} ({min(successes):.2f})"
            seconds = np.median([row["training_s"] for row in rows])
            lines.append(
                f"| {task_name} | {len(rows)} | `{variant}` | {returns.mean():.3f} ± {returns.std():.3f} "
                f"| {returns.min():.3f} | {success} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=["fork", "fork_rewards_x0.1", "bandit4"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    for task_name in arguments.tasks:
        if TASKS[task_name].files and not os.environ.get(REAL_DATA):
            sys.exit(f"{task_name}: expected {REAL_DATA} to name the folder with {', '.join(TASKS[task_name].files)}")
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    results = [result for result in results if is_current(result)]
    done = {(result["task"], result["seed"]) for result in results}
    missing = [(name, seed) for name in arguments.tasks for seed in range(arguments.seeds) if (name, seed) not in done]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns) as progress,
        ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool,
    ):
        bar = progress.add_task("learning", total=len(missing))
        for future in as_completed([pool.submit(run_one, name, seed) for name, seed in missing]):
            results.append(future.result())
            partial = RESULTS.with_suffix(".partial")
            partial.write_text(json.dumps(sorted(results, key=lambda r: (r["task"], r["seed"])), indent=1))
            partial.replace(RESULTS)
            progress.advance(bar)
    print(table(results))


if __name__ == "__main__":
    main()
