"""A training run on disk: what it was asked to do, how far it is, and the policy that it learned.

RUN/
  run.json                 environment, spaces, datasets, hyper-parameters; written once
  dataset_card.json        what the data is like; written once
  checkpoint.safetensors   networks, optimisers, random state, a sample of observations; replaced atomically
  summary.json             losses and evaluation at the end
  tensorboard/             curves

Of several seeds that train as one, RUNS/seed-0, RUNS/seed-1, ... are such folders.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lom.config import TrainConfig
from lom.dataset import Transitions
from lom.dataset_card import DatasetCard
from lom.observation_parts import Parts
from lom.policy import LomPolicy

RUN_FILE = "run.json"
CHECKPOINT_FILE = "checkpoint.safetensors"
SUMMARY_FILE = "summary.json"
CARD_FILE = "dataset_card.json"
TENSORBOARD_FOLDER = "tensorboard"
SAMPLE_ROWS = 8192

_SCHEMA_VERSION = 1
_SAMPLE_PREFIX = "sample."


class RunError(Exception):
    """A run folder that cannot be created, resumed or read; the message names the field."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What a run was asked to do; everything that a resumed run must find unchanged.

    Attributes:
        env: gymnasium id, or None when only data was given.
        datasets: file names (not paths) in the order given.
        dataset_fingerprint: sha256 over the paired transitions.
        dataset_rows: number of transitions.
        observation_low, observation_high: bounds per dimension, ±inf where unbounded.
        action_low, action_high: bounds per dimension, environment units.
        observation_parts: (key, elements) of dict observations, in the order in which they make up the vector; empty
            where observations were vectors already.
    """

    env: str | None
    datasets: tuple[str, ...]
    dataset_fingerprint: str
    dataset_rows: int
    observation_low: tuple[float, ...]
    observation_high: tuple[float, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    config: TrainConfig
    observation_parts: Parts = ()

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """Keys of dict observations, in order."""
        return tuple(key for key, _ in self.observation_parts)

    def learns_as(self, other: "RunSpec") -> bool:
        """Whether a run of one may go on as the other: all is the same but the device."""
        return replace(self, config=replace(self.config, device=other.config.device)) == other

    def to_json(self) -> str:
        """Strict JSON: an infinite bound is null."""
        document = {"schema_version": _SCHEMA_VERSION, **asdict(self)}
        for name in ("observation_low", "observation_high"):
            document[name] = [value if np.isfinite(value) else None for value in getattr(self, name)]
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunSpec":
        """Parses and checks.

        Raises:
            RunError: no JSON, another schema, or a missing or misshapen field.
        """
        try:
            document = dict(json.loads(text))
            version = document.pop("schema_version", None)
            if version != _SCHEMA_VERSION:
                raise RunError(f"{RUN_FILE}: schema_version: expected {_SCHEMA_VERSION}, got {version!r}")
            for name, unbounded in (("observation_low", -np.inf), ("observation_high", np.inf)):
                document[name] = tuple(unbounded if value is None else float(value) for value in document[name])
            for name in ("action_low", "action_high"):
                document[name] = tuple(float(value) for value in document[name])
            document["datasets"] = tuple(document["datasets"])
            document["observation_parts"] = tuple(
                (str(key), int(size)) for key, size in document.get("observation_parts", ())
            )
            document["config"] = TrainConfig.from_json(document["config"])
            return cls(**document)
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{RUN_FILE}: expected the description of a training run: {error}") from error


@dataclass(frozen=True, kw_only=True)
class DataSamples:
    """Observations that stay with the run, so that it can be exported without its dataset. Environment units.

    Attributes:
        trained_on: float32[≤8192, O], drawn from the rows that were trained on.
        trained_on_episodes: int32[≤8192], which episode each of them belongs to.
        held_out: float32[≤8192, O], the first rows of the episodes that were not; empty where there are none.
        held_out_episodes: int32[≤8192], likewise.
    """

    trained_on: NDArray[np.float32]
    trained_on_episodes: NDArray[np.int32]
    held_out: NDArray[np.float32]
    held_out_episodes: NDArray[np.int32]

    @classmethod
    def draw(cls, trained_on: Transitions, held_out: Transitions | None, seed: int) -> "DataSamples":
        """Draws rows without replacement; the same for the same seed."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(trained_on))[:SAMPLE_ROWS])
        kept = slice(0, SAMPLE_ROWS) if held_out is not None else slice(0, 0)
        apart = held_out or trained_on
        return cls(
            trained_on=trained_on.observations[rows],
            trained_on_episodes=trained_on.episodes[rows],
            held_out=apart.observations[kept],
            held_out_episodes=apart.episodes[kept],
        )


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run's result, ready to be exported.

    Attributes:
        summary: the content of summary.json; empty while training goes on.
    """

    spec: RunSpec
    policy: LomPolicy
    samples: DataSamples
    summary: Mapping[str, Any]

    @property
    def recommended(self) -> Mapping[str, Any] | None:
        """What the evaluation at the end of training recommends (`lom.evaluation.Recommendation`), if there was one."""
        evaluation = self.summary.get("evaluation") or self.summary.get("off_policy_evaluation") or {}
        return evaluation.get("recommended")


def require_new(folder: Path) -> None:
    """Raises RunError where the folder is there already, or where nobody may look."""
    try:
        exists = folder.exists()
    except OSError as error:
        raise RunError(f"--out {folder}: cannot be looked at: {error.strerror}") from error
    if exists:
        raise RunError(f"--out {folder}: expected a new folder, it is there already; --resume goes on with it")


def create_run(folder: Path, spec: RunSpec, card: DatasetCard | None = None) -> None:
    """Makes the folder and writes run.json, and dataset_card.json where there is a card.

    Raises:
        RunError: the folder is there already, or cannot be made.
    """
    with _new_folder(folder) as partial:
        _describe_run(partial, spec, card)


def create_runs(folder: Path, specs: Mapping[str, RunSpec], card: DatasetCard | None = None) -> None:
    """Makes the folder with one run in it for every name.

    Raises:
        RunError: the folder is there already, or cannot be made.
    """
    with _new_folder(folder) as partial:
        for name, spec in specs.items():
            (partial / name).mkdir()
            _describe_run(partial / name, spec, card)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Made beside and renamed, so that a kill at any moment leaves what can be resumed, or nothing."""
    require_new(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"--out {folder}: cannot be written: {error.strerror}") from error


def _describe_run(folder: Path, spec: RunSpec, card: DatasetCard | None) -> None:
    if card is not None:
        (folder / CARD_FILE).write_text(card.to_json())
    (folder / RUN_FILE).write_text(spec.to_json())


def open_run(folder: Path) -> RunSpec:
    """Reads run.json.

    Raises:
        RunError: no run there, or an unreadable one.
    """
    try:
        return RunSpec.from_json((folder / RUN_FILE).read_text())
    except FileNotFoundError:
        raise RunError(f"{folder}: expected a training run (a folder with {RUN_FILE}), found none") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{folder}/{RUN_FILE}: cannot be read") from error


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], samples: DataSamples) -> None:
    """Replaces the checkpoint; a kill at any moment leaves the old one or the new one.

    Raises:
        RunError: the disk refuses; the old checkpoint stays.
    """
    save_checkpoints([(folder, tensors, samples)])


def save_checkpoints(checkpoints: Sequence[tuple[Path, Mapping[str, Tensor], DataSamples]]) -> None:
    """Replaces the checkpoints of runs that train as one: all are written before the first is replaced.

    Raises:
        RunError: the disk refuses; the old checkpoints stay.
    """
    written = False
    try:
        for folder, tensors, samples in checkpoints:
            arrays = {f"{_SAMPLE_PREFIX}{name}": torch.from_numpy(array) for name, array in vars(samples).items()}
            save_file({**tensors, **arrays}, _partial(folder))
        written = True
        for folder, _, _ in checkpoints:
            os.replace(_partial(folder), folder / CHECKPOINT_FILE)
    except (OSError, SafetensorError) as error:
        for each, _, _ in () if written else checkpoints:  # whole ones are for `finish_saving`
            _partial(each).unlink(missing_ok=True)
        raise RunError(f"{folder / CHECKPOINT_FILE}: cannot be written: {error}") from error


def finish_saving(folders: Sequence[Path]) -> None:
    """Mends what a kill between the replacements of `save_checkpoints` left: some runs are ahead of the others.

    That any run is ahead proves that every checkpoint of that step was written whole.

    Raises:
        RunError: an unreadable checkpoint.
    """
    steps_done = [_steps_done(folder) for folder in folders]
    for folder, done in zip(folders, steps_done, strict=True):
        if done < max(steps_done) and _partial(folder).is_file():
            os.replace(_partial(folder), folder / CHECKPOINT_FILE)


def _steps_done(folder: Path) -> int:
    """Of both stages; -1 where there is no checkpoint."""
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        return -1
    try:
        with safe_open(path, "pt") as file:
            return int(file.get_tensor("steps_done").sum())
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: expected a checkpoint of lom-train, it is damaged or foreign") from error


def _partial(folder: Path) -> Path:
    return folder / f".{CHECKPOINT_FILE}.partial"


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], DataSamples]:
    """The tensors of `Learner.state()` and the samples of the data.

    Raises:
        RunError: no checkpoint, or a damaged or foreign one.
    """
    path = folder / CHECKPOINT_FILE
    if not path.is_file():
        raise RunError(f"{path}: expected a checkpoint, found none: training has not reached its first one")
    try:
        tensors = load_file(path)
        samples = DataSamples(
            **{field.name: tensors.pop(f"{_SAMPLE_PREFIX}{field.name}").numpy() for field in fields(DataSamples)}
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise RunError(f"{path}: expected a checkpoint of lom-train, it is damaged or foreign") from error
    return tensors, samples


def load_run(folder: Path) -> TrainedRun:
    """Reads the policy of a run that has finished training.

    Raises:
        RunError: no run, a foreign or damaged checkpoint, weights that are not finite, or unfinished training.
    """
    spec = open_run(folder)
    tensors, samples = load_checkpoint(folder)
    low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
    policy = LomPolicy(spec.config, len(spec.observation_low), low, high)
    prefix = "policy."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        policy.load_state_dict(state)
        mixture_steps, steps = tensors["steps_done"].tolist()
    except (RuntimeError, KeyError, ValueError) as error:
        raise RunError(f"{folder / CHECKPOINT_FILE}: its tensors do not belong to {RUN_FILE}") from error
    if steps < spec.config.steps:
        raise RunError(
            f"{folder}: expected finished training, got {mixture_steps} of {spec.config.mixture_steps} mixture steps "
            f"and {steps} of {spec.config.steps} policy steps; lom-train --resume goes on"
        )
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"{folder / CHECKPOINT_FILE}: {name}: expected finite values")
    summary_path = folder / SUMMARY_FILE
    try:
        summary = json.loads(summary_path.read_text()) if summary_path.is_file() else {}
    except ValueError as error:
        raise RunError(f"{summary_path}: expected JSON") from error
    return TrainedRun(spec=spec, policy=policy.eval(), samples=samples, summary=summary)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes summary.json atomically."""
    _write_atomically(folder / SUMMARY_FILE, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
