"""`lom-train`: from dataset files to a trained run."""

import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from lom import run as runs
from lom import signatures
from lom.config import PRESETS, TrainConfig, preset_config
from lom.dataset import DatasetError, Transitions, load_transitions
from lom.dataset_card import DatasetCard
from lom.dataset_files import find_dataset
from lom.evaluation import EVALUATION_SEED, UnsuitableEnvError, env_spaces, evaluate, policy_act, recommend
from lom.learner import Learner, LearningDivergedError, Stage, cached_row_bytes, chosen_device, free_memory
from lom.off_policy_evaluation import FittedQConfig, evaluate_variants
from lom.policy import VARIANTS, LomPolicy

_STAGE_TITLES: dict[Stage, str] = {"mixture": "behaviour mixture", "policy": "critics and actor"}


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a LOM policy on offline transitions."""

    datasets: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files with D4RL keys (.npz, .hdf5), folders or ids of Minari datasets that are here; joined in this order."""
    dataset: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """One more dataset; repeatable."""
    out: Path
    """Folder of the run; must be new."""
    env: str | None = None
    """Gymnasium id: gives the spaces and the evaluation. Without it the action bounds are those that the files state,
    or [-1, 1]."""
    observation_keys: tuple[str, ...] = ()
    """Parts of dict observations in the order in which they make up the vector. Without it: observation and
    desired_goal of a goal environment, else all parts in alphabetical order."""
    preset: str = "standard"
    """Hyper-parameters to start from: standard, locomotion_cpu, small, paper or faithful; flags below override it."""
    task: str | None = None
    """One of the 15 published tasks, as hopper-medium-replay: lays its hyper-parameters over the preset's."""
    seeds: str | None = None
    """FIRST:END, as 0:8, trains these seeds (without END) at once, each on its own share of the data. Each becomes an
    ordinary run, OUT/seed-0 and so on. Takes the place of --seed."""
    resume: bool = False
    """Go on with the run in --out, or with the runs of --seeds there."""
    strict: bool = False
    """Refuse actions outside the action space instead of clipping them."""
    eval_episodes: int = 100
    """Episodes per variant at the end, where there is an environment."""
    off_policy_evaluation: bool = True
    """Where there is none: estimate from the data what each variant is worth (fitted-Q evaluation)."""
    checkpoint_every: int = 2_000
    """Gradient steps between checkpoints."""
    config: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=lambda: PRESETS["standard"])

    def __post_init__(self) -> None:
        if self.eval_episodes < 1:
            raise ValueError(f"--eval-episodes: expected 1 or more, got {self.eval_episodes}")
        if self.checkpoint_every < 1:
            raise ValueError(f"--checkpoint-every: expected 1 or more, got {self.checkpoint_every}")
        if self.seeds is not None and not (re.fullmatch(r"\d+:\d+", self.seeds) and self.folders):
            raise ValueError(f"--seeds: expected FIRST:END with FIRST below END, as 0:8, got {self.seeds!r}")

    @property
    def folders(self) -> dict[int, Path]:
        """Where the run of each seed is."""
        if self.seeds is None:
            return {self.config.seed: self.out}
        first, end = map(int, self.seeds.split(":"))
        return {seed: self.out / f"seed-{seed}" for seed in range(first, end)}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One seed's."""

    seed: int
    folder: Path
    spec: runs.RunSpec
    samples: runs.DataSamples


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lom-train`; exits 0, or with one line that says what was wrong.

    2: arguments, data or folder were refused and nothing was begun. 1: training failed. 130: stopped by a signal.
    """
    arguments_given = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True, highlight=False)
    try:
        preset = preset_config(_given(arguments_given, "--preset") or "standard", _given(arguments_given, "--task"))
        arguments = tyro.cli(
            TrainArguments,
            prog="lom-train",
            args=arguments_given,
            default=TrainArguments(out=tyro.MISSING, config=preset),
        )
        train(arguments, console)
    except (DatasetError, UnsuitableEnvError, runs.RunError, LearningDivergedError, ValueError) as error:
        console.print(f"lom-train: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1 if isinstance(error, LearningDivergedError) else 2) from None
    except KeyboardInterrupt:
        console.print("lom-train: stopped; the same command with --resume goes on from the last step", markup=False)
        raise SystemExit(130) from None


def _given(arguments: list[str], flag: str) -> str | None:
    """Preset and task decide the other flags' defaults, so they must be known before those are parsed."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
    return value


def train(arguments: TrainArguments, console: Console) -> None:
    """Reads, trains, evaluates and writes the run at `arguments.out`.

    Raises:
        DatasetError, UnsuitableEnvError, RunError, LearningDivergedError: nothing half-written remains; a run that
            had begun keeps its last checkpoint.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the step in hand is done and saved.
    """
    config, folders = arguments.config, arguments.folders
    if not arguments.resume:
        runs.require_new(arguments.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    spec, transitions, card = _read_data(arguments, console)
    config = spec.config
    console.print(card.tables())
    for note in card.notes if arguments.env else (*card.notes, "no --env: nothing will be played"):
        console.print(f"warning: {note}", style="yellow", markup=False, soft_wrap=True)
    if arguments.seeds is not None:
        _require_memory(len(folders), transitions, config, console)
    split = _splits(transitions, config.held_out_share, tuple(folders))
    del transitions  # see _splits
    trained = [
        _Run(
            seed=seed,
            folder=folder,
            spec=replace(spec, config=replace(config, seed=seed)),
            samples=runs.DataSamples.draw(*split(seed), seed),
        )
        for seed, folder in folders.items()
    ]
    learner = Learner(
        (split(seed)[0] for seed in folders),
        config,
        torch.tensor(spec.action_low),
        torch.tensor(spec.action_high),
        () if arguments.seeds is None else tuple(folders),
    )
    if arguments.resume:
        if _resumed(learner, trained):
            console.print(
                f"{arguments.out}: training and evaluation are finished already", markup=False, soft_wrap=True
            )
            return
    elif arguments.seeds is None:
        runs.create_run(arguments.out, trained[0].spec, card)
    else:
        runs.create_runs(arguments.out, {run.folder.name: run.spec for run in trained}, card)

    started = time.monotonic()
    metrics = _learn(learner, trained, arguments, console)
    training_s = time.monotonic() - started
    policies = learner.policies
    del learner  # fitted values have a copy of the data of their own
    for run, policy, metrics_of_run in zip(trained, policies, metrics, strict=True):
        if len(trained) > 1:
            console.rule(f"seed {run.seed}", align="left")
        evaluation = {} if spec.env is None else _evaluate(policy, spec, arguments.eval_episodes, console)
        off_policy_evaluation = {}
        if spec.env is None and arguments.off_policy_evaluation:
            fitted_q = FittedQConfig.after(run.spec.config)
            off_policy_evaluation = evaluate_variants(policy, split(run.seed)[0], fitted_q, console)
        failures = signatures.report(metrics_of_run)
        for failure in failures:
            warning = f"{failure['name']} ({failure['measured']:.2f}, limit {failure['limit']:g}): {failure['advice']}"
            console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
        summary = {
            "training_s": round(training_s, 1),
            "seeds_at_once": len(trained),
            "metrics": metrics_of_run,
            "failures": failures,
            "evaluation": evaluation,
            "off_policy_evaluation": off_policy_evaluation,
        }
        runs.write_summary(run.folder, summary)
    written = str(arguments.out) if arguments.seeds is None else f"{trained[0].folder} to {trained[-1].folder.name}"
    console.print(f"trained in {training_s:.0f} s; run written to {written}", markup=False, soft_wrap=True)


def _splits(
    transitions: Transitions, held_out_share: float, seeds: Sequence[int]
) -> Callable[[int], tuple[Transitions, Transitions | None]]:
    """What a seed trains on and what it holds out.

    A million rows should not be held twice: of one seed its two parts are kept, of several the whole, which is split
    again whenever it is asked for.
    """
    if len(seeds) > 1:
        return lambda seed: transitions.hold_out(held_out_share, seed)
    parts = transitions.hold_out(held_out_share, seeds[0])
    return lambda seed: parts


def _require_memory(seeds: int, transitions: Transitions, config: TrainConfig, console: Console) -> None:
    """Every seed has its own rows in memory: which ones it holds out, and so how it scales them, is its own."""
    observation_dim, action_dim = transitions.observations.shape[1], transitions.actions.shape[1]
    row_bytes = 4 * (2 * observation_dim + 2 * action_dim + 2) + 8
    rows = seeds * len(transitions)
    cache_bytes = rows * cached_row_bytes(config, action_dim)
    cached = cache_bytes if cache_bytes <= config.mixture_cache_bytes else 0
    needed, free = rows * row_bytes + cached, free_memory(chosen_device(config.device))
    if needed > free:
        raise ValueError(
            f"--seeds: {seeds} seeds of {len(transitions):,} rows need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
            "free: train fewer at once"
        )
    kept = "kept" if cached else "computed in every step (mixture_cache_bytes)"
    console.print(f"{seeds} seeds: {needed / 1e9:.2f} GB of data; outputs of the mixtures are {kept}", soft_wrap=True)


def _resumed(learner: Learner, trained: Sequence[_Run]) -> bool:
    """Takes the learner to where the runs are; true where nothing is left to do."""
    for run in trained:
        if not runs.open_run(run.folder).learns_as(run.spec):
            raise runs.RunError(
                f"--resume {run.folder}: expected the data, environment and settings that it began with"
            )
    folders = [run.folder for run in trained]
    runs.finish_saving(folders)
    if any((folder / runs.CHECKPOINT_FILE).is_file() for folder in folders):  # else killed before the first one
        learner.restore(*(runs.load_checkpoint(folder)[0] for folder in folders))
    finished = all((folder / runs.SUMMARY_FILE).is_file() for folder in folders)
    return finished and learner.policy_steps_done == learner.config.steps


def _read_data(arguments: TrainArguments, console: Console) -> tuple[runs.RunSpec, Transitions, DatasetCard]:
    notes: list[str] = []
    given = (*arguments.datasets, *arguments.dataset)
    keys = arguments.observation_keys
    spaces = None if arguments.env is None else env_spaces(arguments.env, keys)
    minari_root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")
    paths = [find_dataset(name, minari_root) for name in given]
    with console.status("reading the data"):
        transitions = load_transitions(
            paths,
            names=[path.name if path == name else str(name) for path, name in zip(paths, given, strict=True)],
            action_bounds=None if spaces is None else (spaces.action_low, spaces.action_high),
            observation_dim=None if spaces is None else spaces.observation_low.size,
            observation_keys=keys,
            strict=arguments.strict,
            warn=notes.append,
        )
        card = DatasetCard.of(transitions, notes)
    parts = transitions.observation_parts
    if spaces is not None:
        if parts and parts != spaces.observation_parts:
            raise DatasetError(
                f"observations: expected the environment's parts {spaces.observation_parts}, got {parts}"
            )
        parts = spaces.observation_parts
    unbounded = (float("inf"),) * transitions.observations.shape[1]
    spec = runs.RunSpec(
        env=arguments.env,
        datasets=transitions.source_names,
        dataset_fingerprint=transitions.fingerprint,
        dataset_rows=len(transitions),
        observation_low=tuple(-bound for bound in unbounded)
        if spaces is None
        else tuple(spaces.observation_low.tolist()),
        observation_high=unbounded if spaces is None else tuple(spaces.observation_high.tolist()),
        action_low=tuple(transitions.action_low.tolist()),
        action_high=tuple(transitions.action_high.tolist()),
        config=arguments.config.for_rows(len(transitions)),
        observation_parts=parts,
    )
    return spec, transitions, card


def _learn(
    learner: Learner, trained: Sequence[_Run], arguments: TrainArguments, console: Console
) -> list[dict[str, float]]:
    """Trains to the end, with progress, curves and checkpoints; returns the last metrics of every run.

    Losses that are shown are medians over the seeds. Where one diverges all stop, with the checkpoints before it.
    """
    config = arguments.config
    totals: dict[Stage, int] = {"mixture": config.mixture_steps, "policy": config.steps}
    done: dict[Stage, int] = {"mixture": learner.mixture_steps_done, "policy": learner.policy_steps_done}
    all_metrics: list[dict[str, float]] = [{} for _ in trained]
    log_every = max(1, sum(totals.values()) // 500)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
        TextColumn("[yellow]{task.fields[signs]}"),
    )
    with (
        ExitStack() as open_curves,
        Progress(*columns, console=console) as progress,
        _stop_requested() as stop_requested,
    ):
        curves = [
            open_curves.enter_context(
                SummaryWriter(str(run.folder / runs.TENSORBOARD_FOLDER), purge_step=sum(done.values()))
            )
            for run in trained
        ]

        def note(metrics: list[dict[str, float]], step: int) -> None:
            for known, new, writer in zip(all_metrics, metrics, curves, strict=True):
                known |= new
                for name, value in new.items():
                    writer.add_scalar(name, value, step)

        bars = {
            stage: progress.add_task(
                _STAGE_TITLES[stage], total=totals[stage], completed=done[stage], losses="", signs=""
            )
            for stage in totals
        }
        for stage, steps_done in learner.remaining():
            done[stage] = steps_done
            overall = sum(done.values())
            finished = steps_done == totals[stage]
            if overall % log_every == 0 or finished:
                metrics = learner.metrics_of_runs()
                note(metrics, overall)
                shown = (
                    ("mixture/nll", "bc/loss")
                    if stage == "mixture"
                    else ("critic/loss", "hyper_critic/loss", "actor/loss")
                )
                losses = "  ".join(f"{name} {median(each[name] for each in metrics):.3g}" for name in shown)
                progress.update(bars[stage], completed=steps_done, losses=losses)
            if steps_done % max(1, totals[stage] // 20) == 0 or finished:
                signs = learner.signs_of_runs()
                note(signs, overall)
                if 2 * steps_done >= totals[stage]:  # at the start of a stage every sign is there
                    found = Counter(sign.name for each in signs for sign in signatures.found(each))
                    of_seeds = f" ({{}} of {len(trained)})" if len(trained) > 1 else ""
                    shown_signs = ", ".join(f"{name}{of_seeds.format(count)}" for name, count in found.items())
                    progress.update(bars[stage], signs=shown_signs)
            if overall % arguments.checkpoint_every == 0 or finished or stop_requested():
                learner.metrics_of_runs()  # what has diverged does not replace what has not
                states = learner.states()
                runs.save_checkpoints(
                    [(run.folder, state, run.samples) for run, state in zip(trained, states, strict=True)]
                )
            if stop_requested():
                raise KeyboardInterrupt
    return all_metrics


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question asked between steps, so that no step is saved half done."""
    requested = False

    def remember(signal_number: int, frame: object) -> None:
        nonlocal requested
        requested = True

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _evaluate(policy: LomPolicy, spec: runs.RunSpec, episodes: int, console: Console) -> dict[str, Any]:
    env_id = str(spec.env)
    table = Table(title=f"{episodes} episodes of {env_id}", title_justify="left")
    for heading in ("variant", "return", "95 % interval of the mean", "success"):
        table.add_column(heading)
    results: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("evaluation", total=episodes * len(VARIANTS))
        for variant in VARIANTS:
            outcome = evaluate(
                policy_act(policy, variant),
                env_id,
                episodes=episodes,
                seed=EVALUATION_SEED,
                observation_keys=spec.observation_keys,
                on_episode=lambda: progress.advance(bar),
            )
            results[variant] = {**outcome.to_json(), "returns": outcome.returns.tolist()}
            low, high = results[variant]["return_interval"]
            success = "" if outcome.success_rate is None else f"{outcome.success_rate:.2f}"
            spread = f"{outcome.returns.mean():.2f} ± {outcome.returns.std():.2f}"
            table.add_row(variant, spread, f"{low:.2f} to {high:.2f}", success)
    console.print(table)
    recommendation = recommend({variant: np.array(result["returns"]) for variant, result in results.items()})
    recommendation.show(console)
    return {
        "env": env_id,
        "episodes": episodes,
        "seed": EVALUATION_SEED,
        "variants": results,
        "recommended": asdict(recommendation),
    }


if __name__ == "__main__":
    main()
