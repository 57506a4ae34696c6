"""Pictures of the results: every task with all methods, and the interquartile mean over a group's tasks."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tests.bench.learning.intervals import Estimate, estimate, interquartile_mean
from tests.bench.learning.report import Cells, columns_of
from tests.bench.learning.tasks import TASKS

_COLOURS = {
    "bc": "#9a9a9a",
    "td3_bc": "#c7a76c",
    "iql": "#b5838d",
    "cql": "#7d8597",
    "awr": "#8fb339",
    "onestep": "#e09f3e",
    "lom greedy": "#5fa8d3",
    "lom": "#1b4965",
}
_COLUMNS = 4


def draw(cells: Cells, folder: Path) -> list[tuple[Path, str]]:
    """One picture for each group of tasks: (path, caption)."""
    pictures = []
    for group in dict.fromkeys(TASKS[task].group for task in cells):
        chosen = {task: row for task, row in cells.items() if TASKS[task].group == group}
        path = folder / f"results-{group}.png"
        _draw_group(chosen, path)
        pictures.append((path, f"Normalised scores with 95 % intervals over seeds, {len(chosen)} tasks."))
    return pictures


def _draw_group(cells: Cells, path: Path) -> None:
    names = columns_of(cells)
    shared = [name for name in names if all(name in row for row in cells.values())]
    panels = len(cells) + (len(cells) > 1)
    columns = min(panels, _COLUMNS)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.1 * columns, 0.9 + 0.22 * len(names) * rows + 0.5 * rows), squeeze=False, sharey=True
    )
    flat = list(axes.flat)
    for axis, (task, row) in zip(flat, cells.items(), strict=False):
        _draw_panel(axis, task, {name: row[name].last_score for name in names if name in row}, names)
    if len(cells) > 1:
        iqm = {name: estimate([row[name].last for row in cells.values()], interquartile_mean) for name in shared}
        _draw_panel(flat[len(cells)], "IQM of all", iqm, names)
    for axis in flat[panels:]:
        axis.set_visible(False)
    figure.supxlabel("normalised score: 0 random, 100 expert", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axis: Axes, title: str, scores: dict[str, Estimate], names: list[str]) -> None:
    for height, name in enumerate(reversed(names)):
        if name in scores:
            score, colour = scores[name], _COLOURS.get(name, "#3a7d44")
            axis.plot(
                [score.low, score.high], [height, height], color=colour, linewidth=6, alpha=0.35, solid_capstyle="butt"
            )
            axis.plot(score.value, height, "o", color=colour, markersize=5)
    axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(title, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
