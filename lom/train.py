"""`lom-train`: from dataset files to a trained run."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
from lom.learner import Learner, LearningDivergedError, Stage
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
    resume: bool = False
    """Go on with the run in --out."""
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
    config, folder = arguments.config, arguments.out
    if not arguments.resume:
        runs.require_new(folder)
    if config.threads:
        torch.set_num_threads(config.threads)
    spec, transitions, card = _read_data(arguments, console)
    console.print(card.tables())
    for note in card.notes if arguments.env else (*card.notes, "no --env: nothing will be played"):
        console.print(f"warning: {note}", style="yellow", markup=False, soft_wrap=True)
    trained_on, held_out = transitions.hold_out(config.held_out_share, config.seed)
    del transitions  # a million rows should not be held twice
    samples = runs.DataSamples.draw(trained_on, held_out, config.seed)
    learner = Learner(trained_on, config, torch.tensor(spec.action_low), torch.tensor(spec.action_high))
    if arguments.resume:
        if runs.open_run(folder) != spec:
            raise runs.RunError(f"--resume {folder}: expected the data, environment and settings that it began with")
        if (folder / runs.CHECKPOINT_FILE).is_file():  # else it was killed before the first one, and begins again
            learner.restore(runs.load_checkpoint(folder)[0])
        if learner.policy_steps_done == config.steps and (folder / runs.SUMMARY_FILE).is_file():
            console.print(f"{folder}: training and evaluation are finished already", markup=False, soft_wrap=True)
            return
    else:
        runs.create_run(folder, spec, card)

    started = time.monotonic()
    metrics = _learn(learner, samples, arguments, console)
    training_s = time.monotonic() - started
    evaluation = {} if spec.env is None else _evaluate(learner.policy, spec, arguments.eval_episodes, console)
    off_policy_evaluation = {}
    if spec.env is None and arguments.off_policy_evaluation:
        off_policy_evaluation = evaluate_variants(learner.policy, trained_on, FittedQConfig.after(config), console)
    failures = signatures.report(metrics)
    for failure in failures:
        warning = f"{failure['name']} ({failure['measured']:.2f}, limit {failure['limit']:g}): {failure['advice']}"
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    summary = {
        "training_s": round(training_s, 1),
        "metrics": metrics,
        "failures": failures,
        "evaluation": evaluation,
        "off_policy_evaluation": off_policy_evaluation,
    }
    runs.write_summary(folder, summary)
    console.print(f"trained in {training_s:.0f} s; run written to {folder}", markup=False, soft_wrap=True)


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
        config=arguments.config,
        observation_parts=parts,
    )
    return spec, transitions, card


def _learn(
    learner: Learner, samples: runs.DataSamples, arguments: TrainArguments, console: Console
) -> dict[str, float]:
    """Trains to the end, with progress, curves and checkpoints; returns the last metrics."""
    config, folder = arguments.config, arguments.out
    totals: dict[Stage, int] = {"mixture": config.mixture_steps, "policy": config.steps}
    done: dict[Stage, int] = {"mixture": learner.mixture_steps_done, "policy": learner.policy_steps_done}
    all_metrics: dict[str, float] = {}
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
        SummaryWriter(str(folder / runs.TENSORBOARD_FOLDER), purge_step=sum(done.values())) as curves,
        Progress(*columns, console=console) as progress,
        _stop_requested() as stop_requested,
    ):
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
                metrics = learner.metrics()
                all_metrics |= metrics
                for name, value in metrics.items():
                    curves.add_scalar(name, value, overall)
                shown = (
                    ("mixture/nll", "bc/loss")
                    if stage == "mixture"
                    else ("critic/loss", "hyper_critic/loss", "actor/loss")
                )
                losses = "  ".join(f"{name} {metrics[name]:.3g}" for name in shown)
                progress.update(bars[stage], completed=steps_done, losses=losses)
            if steps_done % max(1, totals[stage] // 20) == 0 or finished:
                signs = learner.signs()
                all_metrics |= signs
                for name, value in signs.items():
                    curves.add_scalar(name, value, overall)
                if 2 * steps_done >= totals[stage]:  # at the start of a stage every sign is there
                    progress.update(bars[stage], signs=", ".join(each.name for each in signatures.found(signs)))
            if overall % arguments.checkpoint_every == 0 or finished or stop_requested():
                runs.save_checkpoint(folder, learner.state(), samples)
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
