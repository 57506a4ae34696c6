"""`lom-study`: the experiments with known answers at full size, as a table and as pictures."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lom.study import plots
from lom.study.experiments import (
    MixtureFit,
    fit_synthetic_mixture,
    improve_on_mode,
    learn_double_circle,
    select_in_linear_quadratic,
)

Experiment = Literal["mixture", "selection", "imitation"]
Row = tuple[str, str, str]
"""What was measured, mean and worst over seeds, and what is known of the answer."""

MODES = (1, 2, 3, 5, 8)
SEPARATIONS = (2.0, 4.0, 6.0)


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Hold LOM against problems with known answers. One picture per experiment, a table at the end."""

    experiments: tyro.conf.Positional[tuple[Experiment, ...]] = ("mixture", "selection", "imitation")
    """Which ones. mixture: does it identify the modes of synthetic data? selection: does hyper-Q choose the modes that
    are optimal by exact values? imitation: does the actor improve on the mode, up to the closed form?"""
    seeds: int = 5
    """Seeds of each experiment: data, initialisation and batches."""
    out: Path = Path("docs")
    """Folder of the pictures, `study-EXPERIMENT.png`."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"--seeds: expected 1 or more, got {self.seeds}")
        if not self.out.is_dir():
            raise ValueError(f"--out {self.out}: expected a folder, found none")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lom-study`; exits 0, or 2 with one line that says what was wrong."""
    console = Console(highlight=False)
    try:
        arguments = tyro.cli(StudyArguments, prog="lom-study", args=list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        Console(stderr=True).print(f"lom-study: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    torch.set_num_threads(1)  # a second one costs more than it brings on nets of 64 units
    study: dict[Experiment, Callable[[int, Path], Iterator[Row | None]]] = {
        "mixture": _mixture,
        "selection": _selection,
        "imitation": _imitation,
    }
    steps: dict[Experiment, int] = {
        "mixture": arguments.seeds * len(MODES) * len(SEPARATIONS),
        "selection": arguments.seeds,
        "imitation": 2 * arguments.seeds,
    }
    table = Table(title=f"{arguments.seeds} seeds", title_justify="left")
    for heading in ("experiment", "measured", "mean (worst)", "known answer"):
        table.add_column(heading)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in arguments.experiments:
            bar = progress.add_task(name, total=steps[name])
            for row in study[name](arguments.seeds, arguments.out / f"study-{name}.png"):
                if row is None:
                    progress.advance(bar)
                else:
                    table.add_row(name, *row)
    console.print(table)


def _mixture(seeds: int, picture: Path) -> Iterator[Row | None]:
    fits: dict[tuple[int, float], list[MixtureFit]] = {}
    for modes in MODES:
        for separation in SEPARATIONS:
            for seed in range(seeds):
                fit = fit_synthetic_mixture(
                    modes=modes, separation=separation, num_components=2 * modes, seed=seed, steps=3000
                )
                fits.setdefault((modes, separation), []).append(fit)
                yield None
    plots.mixture(fits, picture)
    for (modes, separation), of_seeds in fits.items():
        gaps = [fit.nll_gap for fit in of_seeds]
        distances = [fit.worst_mean_distance for fit in of_seeds]
        yield (
            f"{modes} modes {separation:g} sd apart: NLL above the truth, nat",
            f"{np.mean(gaps):.3f} ({max(gaps):.3f})",
            "0, below 0.05",
        )
        yield "worst true mean to a component, sd", f"{np.mean(distances):.2f} ({max(distances):.2f})", "below 0.5"


def _selection(seeds: int, picture: Path) -> Iterator[Row | None]:
    results = []
    for seed in range(seeds):
        results.append(select_in_linear_quadratic(seed=seed))
        yield None
    plots.selection(results, picture)
    agreement = [result.agreement for result in results]
    behaviour = [result.behaviour_value for result in results]
    greedy = [result.greedy_value for result in results]
    exact = results[0].exact_behaviour_value
    yield "selected mode is the optimal one", f"{np.mean(agreement):.3f} ({min(agreement):.3f})", "1, above 0.95"
    yield "value of the behaviour, roll-outs", f"{np.mean(behaviour):.3f}", f"{exact:.3f} exactly"
    yield "value of greedy_mode, roll-outs", f"{np.mean(greedy):.3f} ({min(greedy):.3f})", f"above {exact:.3f}"


def _imitation(seeds: int, picture: Path) -> Iterator[Row | None]:
    improvements, circles = [], []
    for seed in range(seeds):
        improvements.append(improve_on_mode(seed=seed))
        yield None
        circles.append(learn_double_circle(seed=seed))
        yield None
    plots.imitation(improvements, circles, picture)
    first = improvements[0]
    rewards = [each.actor_reward for each in improvements]
    greedy = [each.greedy_reward for each in improvements]
    yield "reward of greedy_mode", f"{np.mean(greedy):.3f} ({min(greedy):.3f})", "1 at the mode's mean"
    yield (
        "reward of the actor",
        f"{np.mean(rewards):.3f} ({min(rewards):.3f})",
        f"{first.tilted_reward:.3f} in closed form, {first.best_reward:.3f} outside the mode",
    )
    actions = [abs(each.actor_action - each.tilted_mean) for each in improvements]
    yield "actor's distance from the closed form", f"{np.mean(actions):.3f} ({max(actions):.3f})", "0; mode sd 0.1"
    for variant in ("actor", "greedy_mode", "bc"):
        scores = [circle.rewards[variant] for circle in circles]
        yield f"double circle, reward of {variant}", f"{np.mean(scores):.3f} ({min(scores):.3f})", "1; behaviour 0.5"
