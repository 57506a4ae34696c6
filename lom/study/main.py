"""`lom-study`: the experiments with known answers at full size, as a table and as pictures."""

import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lom.study.cells import cores, measured
from lom.study.reports import EXPERIMENTS

Name = Literal["mixture", "selection", "imitation", "random_mode", "sensitivity", "corrupted"]


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """Hold LOM against problems with known answers. One picture per experiment, a table at the end.

    What was measured is kept: a study that was stopped goes on, and one that is complete is only drawn again.
    """

    experiments: tyro.conf.Positional[tuple[Name, ...]] = (
        "mixture",
        "selection",
        "imitation",
        "random_mode",
        "sensitivity",
        "corrupted",
    )
    """Which ones. mixture: does it identify the modes of synthetic data? selection: does hyper-Q choose the modes that
    are optimal by exact values? imitation: does the actor improve on the mode, up to the closed form? random_mode:
    what is hyper-Q's choice worth beside random ones? sensitivity: what do M, β and C change? corrupted: what do errors
    of hyper-Q cost?"""
    seeds: int = 5
    """Seeds of each experiment: data, initialisation and batches."""
    out: Path = Path("docs")
    """Folder of the pictures, `study-EXPERIMENT.png`."""
    kept: Path = Path("build/study")
    """Folder of what was measured, one JSON file a cell."""
    again: bool = False
    """Measure what is kept, too: for another version of the code."""
    processes: int = cores()
    """Cells that are measured side by side, one thread each."""

    def __post_init__(self) -> None:
        for name in ("seeds", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected 1 or more, got {getattr(self, name)}")
        if not self.out.is_dir():
            raise ValueError(f"--out {self.out}: expected a folder, found none")
        if self.kept.exists() and not self.kept.is_dir():
            raise ValueError(f"--kept {self.kept}: expected a folder, found a file")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lom-study`; exits 0; 2 or 1 with one line that says what was wrong, 130 when interrupted."""
    console, errors = Console(highlight=False), Console(stderr=True)
    try:
        arguments = tyro.cli(StudyArguments, prog="lom-study", args=list(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        errors.print(f"lom-study: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    try:
        console.print(_table(arguments))
    except KeyboardInterrupt:
        errors.print(f"lom-study: stopped; the same command goes on, {arguments.kept} keeps what was measured")
        raise SystemExit(130) from None
    except (BrokenProcessPool, OSError) as error:
        errors.print(f"lom-study: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from None


def _table(arguments: StudyArguments) -> Table:
    table = Table(
        title=f"{arguments.seeds} seeds; mean (worst) or mean [95 % confidence interval]", title_justify="left"
    )
    for heading in ("experiment", "measured", "found", "known answer"):
        table.add_column(heading)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in arguments.experiments:
            experiment = EXPERIMENTS[name]
            cells = experiment.cells(arguments.seeds)
            results = []
            bar = progress.add_task(name, total=len(cells))
            for found in measured(cells, arguments.kept, processes=arguments.processes, again=arguments.again):
                results.append(found)
                progress.advance(bar)
            results.sort(key=lambda found: cells.index(found[0]))
            experiment.draw(results, arguments.out / f"study-{name}.png")
            for row in experiment.rows(results):
                table.add_row(name, *row)
    return table
