"""What bundles cost and what their warnings see, for three of them: the demo's, a MuJoCo one, and one with M = 1.

    LOM_BENCH_DATA=FOLDER python -m tests.bench.bundles      # or: make bench-export LOM_BENCH_DATA=FOLDER

Trains with one seed each (a few minutes), exports in every precision, and prints the tables of docs/bundles.md.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lom.config import PRESETS
from lom.envs.fork import fork_demonstrations
from lom.run import load_run
from lom.train import TrainArguments, train
from lom_bundle import Bundle, BundleError, read_bundle
from lom_export.exporter import ExportConfig, Exported, export_run
from lom_export.graph import OBSERVATION, STATE_SCORE, PolicyGraph, export_graph
from lom_export.proof import cpu_session, free_choice
from tests.bench.learning.tasks import TASKS, MissingDataError, given_data

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """A run to export."""

    name: str
    env: str
    preset: str
    num_components: int
    files: tuple[str, ...] = ()


SUBJECTS = (
    Subject("fork, M = 8 (the demo's)", "lom/Fork-v0", "small", 8),
    Subject("fork, M = 1", "lom/Fork-v0", "small", 1),
    Subject("Hopper, M = 5", "Hopper-v4", "locomotion_cpu", 5, TASKS["hopper-real-mix"].files),
)


def _frozen(rows: Rows, rng: np.random.Generator) -> Rows:
    """Every row with one dimension stuck at another row's value; the dimension changes from row to row."""
    stuck = rows.copy()
    index = np.arange(len(rows))
    dimension = rng.integers(rows.shape[1], size=len(rows))
    stuck[index, dimension] = rows[rng.permutation(len(rows)), dimension]
    return stuck


CORRUPTIONS: dict[str, Callable[[Rows, np.random.Generator], Rows]] = {
    "dimensions permuted": lambda rows, rng: np.roll(rows, 1, axis=1),
    "degrees for radians": lambda rows, rng: rows * np.float32(180 / np.pi),
    "scale doubled": lambda rows, rng: rows * np.float32(2),
    "one sensor frozen": _frozen,
}


def main() -> None:
    """Prints three tables in Markdown."""
    try:
        data = given_data() / "transitions"
    except MissingDataError as error:
        sys.exit(str(error))
    console = Console(stderr=True)
    costs = [
        "| bundle | precision | export s | graph KiB | action error / range | ties | mode flips | B=1 µs | B=64 µs |"
    ]
    costs.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    alarms = ["| bundle | score | false alarms, held-out (rows, episodes) | " + " | ".join(CORRUPTIONS) + " |"]
    alarms.append("| --- | --- | --- |" + " --- |" * len(CORRUPTIONS))
    parts = ["| graph | B=1 µs, no scores | scores | explain | B=64 µs, no scores | scores | explain |"]
    parts.append("| --- | --- | --- | --- | --- | --- | --- |")
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            _train(subject, Path(folder), data, console)
            for precision in ("fp32", "fp16", "int8"):
                console.print(f"{subject.name}: exporting in {precision}")
                config = ExportConfig(run=run, out=Path(folder) / precision, precision=precision)
                try:
                    exported = export_run(config)
                except BundleError as error:
                    costs.append(f"| {subject.name} | {precision} | refused: {error.detail} | | | | | | |")
                    continue
                bundle = read_bundle(config.out)
                costs += _cost_lines(subject, exported, bundle)
                if precision == "fp32":
                    alarms += _alarm_lines(subject, bundle, load_run(run).samples.held_out)
                    parts += _parts_lines(subject, bundle, run)
    print("\n".join([*costs, "", *parts, "", *alarms]))


def _train(subject: Subject, folder: Path, data: Path, console: Console) -> None:
    files = tuple(data / name for name in subject.files)
    if not files:
        files = (folder / "fork.npz",)
        np.savez(files[0], **fork_demonstrations(seed=0))  # type: ignore[arg-type]
    preset = vars(PRESETS[subject.preset]) | {"num_components": subject.num_components}
    config = type(PRESETS[subject.preset])(**preset)
    train(TrainArguments(datasets=files, out=folder / "run", env=subject.env, config=config), console)


def _cost_lines(subject: Subject, exported: Exported, bundle: Bundle) -> list[str]:
    lines = []
    for variant, graph in bundle.graphs.items():
        narrow = exported.precision.get(variant)
        parity = exported.parity[variant]
        error = parity.action_error if narrow is None else narrow.action_error
        has_modes = f"{variant}.mode" in bundle.golden
        flips = "" if narrow is None or not has_modes else f"{narrow.flip_rate:.2%}"
        ties = str(parity.ties) if has_modes else ""
        single, many = (_microseconds(graph, {OBSERVATION: _rows(bundle, rows)}) for rows in (1, 64))
        lines.append(
            f"| {subject.name}, `{variant}` | {bundle.manifest.precision} | {exported.seconds:.0f} "
            f"| {len(graph) / 1024:.0f} | {error:.1e} | {ties} | {flips} | {single:.0f} | {many:.0f} |"
        )
    return lines


def _parts_lines(subject: Subject, bundle: Bundle, run: Path) -> list[str]:
    """What the scores cost each answer, and what diagnostics would: the reason for a graph of their own."""
    policy = load_run(run).policy
    lines = []
    for variant, graph in bundle.graphs.items():
        graphs = {"bare": export_graph(PolicyGraph(policy, variant, None)), "scores": graph}
        if variant in bundle.explain_graphs:
            graphs["explain"] = bundle.explain_graphs[variant]
        cells = []
        for rows in (1, 64):
            feeds = {OBSERVATION: _rows(bundle, rows)}
            for name in ("bare", "scores", "explain"):
                extra = free_choice(rows, policy) if name == "explain" else {}
                cells.append(f"{_microseconds(graphs[name], {**feeds, **extra}):.0f}" if name in graphs else "")
        lines.append(f"| {subject.name}, `{variant}` | " + " | ".join(cells) + " |")
    return lines


def _alarm_lines(subject: Subject, bundle: Bundle, held_out: Rows) -> list[str]:
    session = cpu_session(bundle.graphs["greedy_mode"])
    rng = np.random.default_rng(0)
    lines = []
    for score, warning in bundle.manifest.warnings.items():
        threshold = warning.thresholds["greedy_mode"]
        measured = warning.held_out_false_alarms.get("greedy_mode")
        false_alarms = "not measured: one episode" if measured is None else f"{measured:.2%}"
        cells = [f"{false_alarms} ({warning.held_out_rows}, {warning.held_out_episodes})"]
        for corrupt in CORRUPTIONS.values():
            scores = session.run([score], {OBSERVATION: corrupt(held_out, rng)})[0]
            cells.append(f"{(~(scores <= threshold)).mean():.1%}")
        name = "state" if score == STATE_SCORE else "action"
        lines.append(f"| {subject.name} | {name} | " + " | ".join(cells) + " |")
    return lines


def _rows(bundle: Bundle, rows: int) -> Rows:
    resized: Rows = np.resize(bundle.golden[OBSERVATION], (rows, *bundle.golden[OBSERVATION].shape[1:]))
    return resized


def _microseconds(graph: bytes, feeds: Mapping[str, NDArray[Any]]) -> float:
    """Median of 7 rounds of 200 runs, one thread, every output fetched."""
    session = cpu_session(graph)
    rounds = []
    for _ in range(7):
        started = time.perf_counter()
        for _ in range(200):
            session.run(None, dict(feeds))
        rounds.append((time.perf_counter() - started) / 200)
    return float(np.median(rounds) * 1e6)


if __name__ == "__main__":
    main()
