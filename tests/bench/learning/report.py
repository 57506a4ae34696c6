"""Tables and pictures of the results, into docs/results.md between its two marks."""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.bench.learning.intervals import Estimate, estimate, interquartile_mean, mean
from tests.bench.learning.results import Record, Results
from tests.bench.learning.tasks import TASKS

DOCUMENT = Path("docs/results.md")
BEGIN, END = "<!-- learning: begin -->", "<!-- learning: end -->"

Array = NDArray[np.float64]

_LABELS = {
    ("lom", "actor"): "lom",
    ("lom", "greedy_mode"): "lom greedy",
}
_ORDER = ("bc", "bc-all-steps", "td3_bc", "iql", "cql", "awr", "onestep", "lom greedy", "lom")
_OURS = _ORDER[-2:]
_GROUPS = {
    "generated": "Generated tasks",
    "like": "Our roll-outs of other people's policies",
    "mix": "Transitions and policies of others, mixed",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one method did on one task: arrays float64[S], over seeds; scores are normalised."""

    returns: Array
    last: Array
    best: Array
    success: Array | None
    train_cpu_s: Array
    record: Record

    @cached_property
    def last_score(self) -> Estimate:
        """Mean over seeds of the final evaluation."""
        return estimate([self.last], mean)


Cells = dict[str, dict[str, Cell]]


def label(method: str, variant: str) -> str:
    """The name of a method in tables: cloning, trained beside LOM, is the same whatever LOM's options are."""
    if variant == "bc":
        return "bc"
    if (method, variant) in _LABELS:
        return _LABELS[method, variant]
    return f"{method} greedy" if variant == "greedy_mode" else method


def cells_of(records: Sequence[Record]) -> Cells:
    """By task and label; of several settings of a method on a task those of the newest result, and only those."""
    newest: dict[tuple[str, str], str] = {(r["task"], r["method"]): r["settings"] for r in records}
    grouped: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if newest[record["task"], record["method"]] == record["settings"]:
            for variant in record["variants"]:
                grouped[record["task"], record["method"], variant].append(record)
    cells: Cells = defaultdict(dict)
    for (task, method, variant), group in grouped.items():
        cells[task][label(method, variant)] = _cell(task, variant, sorted(group, key=lambda r: int(r["seed"])))
    return {task: cells[task] for task in TASKS if task in cells}


def _cell(task: str, variant: str, records: Sequence[Record]) -> Cell:
    scale = TASKS[task].scale
    acted = [record["variants"][variant] for record in records]
    returns = np.array([a["return_mean"] for a in acted])
    successes = [a["success_rate"] for a in acted]
    return Cell(
        returns=returns,
        last=np.array([scale(value) for value in returns]),
        best=np.array([scale(max(a["curve"] or [a["return_mean"]])) for a in acted]),
        success=None if None in successes else np.array(successes),
        train_cpu_s=np.array([record["train_cpu_s"] for record in records]),
        record=records[-1],
    )


def leaders(row: dict[str, Cell]) -> set[str]:
    """The best mean of a task, and every method whose mean lies within the interval of the best."""
    best = max((cell.last_score for cell in row.values()), key=lambda score: score.value)
    return {name for name, cell in row.items() if cell.last_score.value >= best.low}


def is_below_cloning(row: dict[str, Cell], name: str) -> bool:
    """Whether a method's mean lies below the interval of behaviour cloning."""
    return "bc" in row and row[name].last_score.value < row["bc"].last_score.low


def _count(cells: Cells, name: str, holds: Callable[[dict[str, Cell], str], bool]) -> str:
    there = [row for row in cells.values() if name in row]
    return f"{sum(holds(row, name) for row in there)} of {len(there)}"


def columns_of(cells: Cells) -> list[str]:
    """Labels that are there, ours last."""
    present = {name for row in cells.values() for name in row}
    return [name for name in _ORDER if name in present] + sorted(present - set(_ORDER))


def methods_and_options(cells: Cells) -> tuple[Cells, Cells]:
    """The methods, which compete; and LOM's own options beside its defaults, on the tasks where one was tried."""
    options = {
        task: {name: cell for name, cell in row.items() if name in _OURS or name not in _ORDER}
        for task, row in cells.items()
        if row.keys() - set(_ORDER)
    }
    methods = {task: {name: cell for name, cell in row.items() if name in _ORDER} for task, row in cells.items()}
    return {task: row for task, row in methods.items() if row}, options


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _shown(score: Estimate, bold: bool) -> str:
    text = f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"
    return f"**{text}**" if bold else text


def _score_row(task: str, row: dict[str, Cell], columns: Sequence[str], bold: Collection[str] = ()) -> list[str]:
    return [task, *(_shown(row[name].last_score, name in bold) if name in row else "" for name in columns)]


def render(cells: Cells) -> str:
    """Markdown of every group that has results."""
    lines: list[str] = []
    for group, title in _GROUPS.items():
        chosen = {task: row for task, row in cells.items() if TASKS[task].group == group}
        if chosen:
            methods, options = methods_and_options(chosen)
            lines += [f"### {title}", "", *_scores(methods), "", *_raw_and_best(methods), "", *_seconds(methods), ""]
            if options:
                lines += [*_options(options), ""]
    return "\n".join(lines)


def _scores(cells: Cells) -> Iterator[str]:
    columns = columns_of(cells)
    rows = []
    for task, row in cells.items():
        bold = leaders(row)
        rows.append(_score_row(task, row, columns, bold))
    shared = [name for name in columns if all(name in row for row in cells.values())]
    if len(cells) > 1:
        iqm = {name: estimate([row[name].last for row in cells.values()], interquartile_mean) for name in shared}
        rows.append(["IQM of all", *(_shown(iqm[name], False) if name in iqm else "" for name in columns)])
        rows.append(["leads on", *(_count(cells, name, lambda row, name: name in leaders(row)) for name in columns)])
        rows.append(["below bc on", *(_count(cells, name, is_below_cloning) for name in columns)])
    yield "Normalised score of the last policy, mean over seeds and its 95 % interval; bold: the best mean, and every"
    yield "mean within the interval of the best. Below bc: a mean below the interval of behaviour cloning."
    yield ""
    yield from _table(["task", *columns], rows)


def _options(cells: Cells) -> Iterator[str]:
    columns = columns_of(cells)
    yield "LOM's defaults beside other settings of its options (`tests/bench/learning/methods.py`), scores as above:"
    yield ""
    yield from _table(["task", *columns], [_score_row(task, row, columns) for task, row in cells.items()])


def _raw_and_best(cells: Cells) -> Iterator[str]:
    columns = columns_of(cells)
    yield "Return of the last policy (success where the environment tells it); in brackets the best normalised score of"
    yield "ten evaluations during training, which nobody could have chosen without the environment."
    yield ""
    rows = []
    for task, row in cells.items():
        texts = []
        for name in columns:
            cell = row.get(name)
            if cell is None:
                texts.append("")
                continue
            success = "" if cell.success is None else f", {cell.success.mean():.2f}"
            texts.append(f"{cell.returns.mean():.4g}{success} ({cell.best.mean():.0f})")
        rows.append([task, *texts])
    yield from _table(["task", *columns], rows)


def _seconds(cells: Cells) -> Iterator[str]:
    columns = [name for name in columns_of(cells) if name != "bc" and not name.endswith("greedy")]
    yield "Budget, seeds, and seconds of one core that a seed's training took (its share where seeds train as one):"
    yield ""
    rows = []
    for task, row in cells.items():
        one = next(iter(row.values())).record
        seeds = sorted({len(cell.returns) for cell in row.values()})
        texts = [f"{np.median(row[name].train_cpu_s):.0f}" if name in row else "" for name in columns]
        steps = f"{one['mixture_steps']:,} + {one['steps']:,}"
        rows.append([task, f"{one['rows']:,}", steps, " to ".join(map(str, seeds)), *texts])
    yield from _table(["task", "rows", "mixture + policy steps", "seeds", *columns], rows)


def write(results: Results, document: Path = DOCUMENT) -> None:
    """Renews what stands between the marks, and the pictures."""
    from tests.bench.learning.pictures import draw  # matplotlib loads slowly

    cells = cells_of(results.records)
    if not cells:
        sys.exit("no results yet: python -m tests.bench.learning makes them")
    text = document.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{document}: expected the lines {BEGIN} and {END}, once each")
    pictures = draw(methods_and_options(cells)[0], document.parent)
    shown = "\n".join(f"![{caption}]({path.name})\n" for path, caption in pictures)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n{render(cells)}\n{shown}{END}{after}")
