"""From a spool to a Minari dataset, and back to the steps that a replay asks again.

The dataset is what `minari` reads: `NAME-v0/data/main_data.hdf5` beside `metadata.json`, T + 1 observations and infos
for T actions, rewards, terminations and truncations. The info of an observation is what was answered to it; `actions`
are what was put out. It is written under a hidden name and renamed when it is whole.
"""

import contextlib
import fcntl
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lom_api.recording.spool import (
    PREFIX,
    STEP,
    SUFFIX,
    TEXT_FIELDS,
    EmptySpoolError,
    Facts,
    Golden,
    Layout,
    read_spool,
)

Array: TypeAlias = NDArray[Any]
Infos: TypeAlias = Mapping[str, Array]

DATA_FILE = "main_data.hdf5"
METADATA_FILE = "metadata.json"
FAILED, DAMAGED = 1, 3
"""Exit status of the process that makes datasets: the disk would not; a spool is none."""

# The oldest release whose readers know everything that is written here.
_MINARI_VERSION = "0.5.3"
_DRAFT_SUFFIX = ".partial"
_PARTS_OF_A_NAME = 4
_ROWS_AT_ONCE = 1024
_WORTH_COMPRESSING_BYTES = 16_384
_LONGEST_TEXT = 64
_PLAIN_INFOS = (
    "is_answered",
    "sequence",
    "answers",
    "mode",
    "margin",
    "version",
    "flags",
    "age_s",
    "forced_mode",
    "previous_mode",
    "hysteresis_width",
    "is_sampled",
    "sampling_seed",
    "stream",
    "row",
)


class RecordingError(ValueError):
    """A recording that cannot be read; the message names the file, what was expected and what was got."""


class MissingH5pyError(ImportError):
    """Datasets are HDF5 files."""

    def __init__(self) -> None:
        super().__init__("a recording becomes a dataset with h5py: pip install 'lom[record]'", name="h5py")


def require_h5py() -> None:
    """Raises MissingH5pyError where it is not installed. Does not import it."""
    try:
        is_there = importlib.util.find_spec("h5py") is not None
    except ValueError:  # it was taken out of this process on purpose
        is_there = False
    if not is_there:
        raise MissingH5pyError


def finish_recordings(folder: Path) -> list[Path]:
    """Makes datasets of every spool in `folder` that nobody writes any more, and removes the spool.

    A spool of several policies or observation layouts becomes several datasets; one without two steps in a row
    becomes none. The work is done by a process of its own: HDF5 crashes where it cannot close a file on a full disk.

    Raises:
        MissingH5pyError: h5py is not installed.
        OSError: the disk is full, or the folder cannot be written; what was not finished is still there.
        RecordingError: one of them is no spool; the others were finished.
    """
    require_h5py()
    done = subprocess.run(
        finishing_command(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        process_group=0,  # whoever interrupts a program interrupts it alone
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if done.returncode:
        remove_drafts(folder)
        complaint = (done.stderr.splitlines() or [""])[-1]
        if done.returncode == DAMAGED:
            raise RecordingError(complaint)
        raise OSError(complaint if done.returncode == FAILED else _crash(folder))
    return [Path(line) for line in done.stdout.splitlines()]


def finishing_command(folder: Path) -> list[str]:
    """What finishes the recordings in `folder`, and prints the datasets; see `lom_api.recording.__main__`."""
    return [sys.executable, "-P", "-m", "lom_api.recording", str(folder)]


def _crash(folder: Path) -> str:
    return f"{folder}: the process that makes the dataset died: is the disk full?"


def remove_drafts(folder: Path) -> None:
    """Removes the datasets that a process was making when it died."""
    for draft in folder.glob(f"{PREFIX}*{_DRAFT_SUFFIX}"):
        spool = folder / f"{'-'.join(draft.name.split('-')[:_PARTS_OF_A_NAME])}{SUFFIX}"
        with _unwritten(spool) as file:
            if file is not None or not spool.exists():
                shutil.rmtree(draft, ignore_errors=True)


def write_datasets(folder: Path) -> Iterator[Path]:
    """As `finish_recordings`, in this process."""
    remove_drafts(folder)
    damaged: list[Path] = []
    for path in sorted(folder.glob(f"{PREFIX}*{SUFFIX}")):
        with _unwritten(path) as file:
            if file is None:
                continue
            try:
                facts, rows = read_spool(file)
            except EmptySpoolError:
                path.unlink()
                continue
            except ValueError:
                damaged.append(path)
                continue
            yield from _write_datasets(folder, path.name.removeprefix(".").removesuffix(SUFFIX), facts, rows)
            path.unlink()
    if damaged:
        raise RecordingError(f"{damaged[0]}: expected the spool of a recording, it cannot be read as one")


@contextlib.contextmanager
def _unwritten(spool: Path) -> Iterator[BinaryIO | None]:
    """The spool, kept from everybody else; None where it is gone, being written, or being finished."""
    try:
        file = spool.open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file if os.fstat(file.fileno()).st_nlink else None


def _write_datasets(
    folder: Path, name: str, facts: Facts, rows: Iterator[tuple[Layout, Array, Mapping[int, str]]]
) -> list[Path]:
    datasets: dict[Layout, _Dataset] = {}
    try:
        for layout, part, texts in rows:
            dataset = datasets.get(layout)
            if dataset is None:
                suffix = f"-{len(datasets) + 1}" if datasets else ""
                dataset = datasets[layout] = _Dataset(folder, f"{name}{suffix}-v0", layout, facts)
            dataset.take(part, texts)
        return [path for dataset in datasets.values() if (path := dataset.finish()) is not None]
    except RuntimeError as error:  # as h5py calls some failures of the disk
        raise OSError(f"{folder}: the dataset could not be written: {error}") from error
    finally:
        for dataset in datasets.values():
            dataset.abandon()


@dataclass(eq=False)
class _Episode:
    """Steps of one stream, in order. All but the last may be in the file already."""

    group: Any = None
    written: int = 0
    waiting: list[Array] = field(default_factory=list)
    waiting_rows: int = 0
    rewards_known: bool = True

    @property
    def last(self) -> Array:
        """Its newest step, as an array of one."""
        return self.waiting[-1][-1:]


class _Dataset:
    """One Minari dataset in the making."""

    def __init__(self, folder: Path, name: str, layout: Layout, facts: Facts) -> None:
        import h5py

        self._layout = layout
        self._facts = facts
        self._name = name
        self._place = folder / name
        self._draft = folder / f".{name}{_DRAFT_SUFFIX}"
        self._draft.mkdir(mode=0o700)
        (self._draft / "data").mkdir(mode=0o700)
        data = self._draft / "data" / DATA_FILE
        os.close(os.open(data, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self._file = h5py.File(data, "w", track_order=True)
        self._episodes: dict[tuple[int, int], _Episode] = {}
        self._texts: Mapping[int, str] = {0: ""}
        self._total_episodes = 0
        self._total_steps = 0
        self._left_out = 0
        self._rewards_known = True
        self._digests: set[str] = set()

    def take(self, rows: Array, texts: Mapping[int, str]) -> None:
        """The next rows of the spool."""
        self._texts = texts
        keys = (rows["stream"].astype(np.uint64) << np.uint64(32)) | rows["row"]
        order = np.argsort(keys, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            self._take_stream(rows[part])

    def finish(self) -> Path | None:
        """The dataset, whole and in its place; None where there is not one step in it."""
        for key in list(self._episodes):
            self._end(key)
        self._file.close()
        if not self._total_episodes:
            self.abandon()
            return None
        self._write_metadata()
        _sync(self._draft / "data" / DATA_FILE)
        if self._place.exists():  # of a process with the same number in the same second, after a restart of the clock
            raise FileExistsError(f"{self._place}: expected no dataset of this name")
        self._draft.rename(self._place)
        return self._place

    def abandon(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(Exception):  # a full disk shows once more when h5py closes its file
            self._file.close()
        shutil.rmtree(self._draft, ignore_errors=True)

    def _take_stream(self, rows: Array) -> None:
        key = int(rows["stream"][0]), int(rows["row"][0])
        is_step = rows["kind"] == STEP
        steps = rows[is_step].copy()
        if (~is_step).any():
            owners = np.cumsum(is_step) - 1
            for place in np.flatnonzero(~is_step):
                owner = int(owners[place])
                if owner >= 0:
                    self._ends(key, steps[: owner + 1], rows[place])
                    steps, owners = steps[owner + 1 :], owners - owner - 1
                elif key in self._episodes:
                    self._settle(key, rows[place])
        self._append(key, steps)

    def _ends(self, key: tuple[int, int], steps: Array, outcome: Any) -> None:
        self._append(key, steps)
        if key in self._episodes:
            self._settle(key, outcome)

    def _settle(self, key: tuple[int, int], outcome: Any) -> None:
        """Tells the newest step what became of it."""
        last = self._episodes[key].last
        if outcome["has_outcome"]:
            for name in ("reward", "terminated", "truncated", "has_outcome"):
                last[name] = outcome[name]
        if outcome["has_final"] and np.isfinite(outcome["observation"]).all():
            self._end(key, outcome["observation"])
        elif outcome["terminated"] or outcome["truncated"]:
            self._end(key)

    def _append(self, key: tuple[int, int], steps: Array) -> None:
        if not len(steps):
            return
        is_finite = np.isfinite(steps["observation"]).all(axis=1) & np.isfinite(steps["action"]).all(axis=1)
        before = self._episodes[key].last if key in self._episodes else steps[:1]
        previous = np.concatenate([before, steps[:-1]])
        begins = steps["begins"] | (steps["epoch"] != previous["epoch"])
        begins |= previous["terminated"] | previous["truncated"]
        begins |= steps["monotonic_ns"] - previous["monotonic_ns"] > self._layout.longest_gap_ns
        if self._layout.is_numbered:
            begins |= steps["sequence"] != previous["sequence"] + 1
        begins[1:] |= ~is_finite[:-1]
        begins[0] |= not is_finite[0]
        for piece in np.split(np.arange(len(steps)), np.flatnonzero(begins)):
            if not len(piece):
                continue
            if begins[piece[0]]:
                self._end(key)
            kept = steps[piece[is_finite[piece]]]
            if len(kept):
                self._extend(key, kept)
            self._left_out += len(piece) - len(kept)

    def _extend(self, key: tuple[int, int], steps: Array) -> None:
        episode = self._episodes.setdefault(key, _Episode())
        episode.waiting.append(steps)
        episode.waiting_rows += len(steps)
        if episode.waiting_rows > _ROWS_AT_ONCE:
            waiting = np.concatenate(episode.waiting)
            self._write(episode, waiting[:-1], waiting, grows=True)
            episode.waiting, episode.waiting_rows = [waiting[-1:].copy()], 1

    def _end(self, key: tuple[int, int], final: Array | None = None) -> None:
        """Closes the episode with the observation that ended it.

        Where that is not known, the last observation is it, and its action leads nowhere; unless the episode has
        terminated, where what follows is worth nothing whatever it looks like.
        """
        episode = self._episodes.pop(key, None)
        if episode is None:
            return
        waiting = np.concatenate(episode.waiting)
        if final is None and waiting["terminated"][-1]:
            final = waiting["observation"][-1]
        if final is None:
            steps, observed = waiting[:-1], waiting
        else:
            closing = np.zeros(1, waiting.dtype)
            closing["observation"] = final
            closing["policy_action"], closing["margin"], closing["age_s"] = np.nan, np.nan, np.nan
            for name in ("mode", "forced_mode", "previous_mode"):
                closing[name] = -1
            for name in ("stream", "row", "sequence", "monotonic_ns"):
                closing[name] = waiting[name][-1]
            steps, observed = waiting, np.concatenate([waiting, closing])
        if not episode.written and not len(steps):
            self._left_out += 1
            return
        self._write(episode, steps, observed)
        truncations = episode.group["truncations"]
        if len(truncations) and not episode.group["terminations"][-1]:
            truncations[-1] = True
        episode.group.attrs["total_steps"] = episode.written
        if not episode.rewards_known:
            episode.group.attrs["rewards_known"] = False
            self._rewards_known = False
        self._total_steps += episode.written

    def _write(self, episode: _Episode, steps: Array, observed: Array, *, grows: bool = False) -> None:
        """Appends `steps`, and `observed` in place of what is there from the first of them on; more may follow."""
        if episode.group is None:
            episode.group = self._file.create_group(f"episode_{self._total_episodes}")
            episode.group.attrs["id"] = self._total_episodes
            self._total_episodes += 1
        known = steps["has_outcome"]
        episode.rewards_known &= bool(known.all())
        for name, values in (
            ("actions", steps["action"]),
            ("rewards", np.where(known, steps["reward"], 0.0)),
            ("terminations", steps["terminated"]),
            ("truncations", steps["truncated"]),
        ):
            _put(episode.group, name, values, episode.written, grows=grows)
        for name, values in self._observations(observed["observation"]):
            _put(episode.group, name, values, episode.written, grows=grows)
        for name, values in self._infos(observed):
            _put(episode.group, f"infos/{name}", values, episode.written, grows=grows)
        episode.written += len(steps)

    def _observations(self, rows: Array) -> Iterator[tuple[str, Array]]:
        begin = 0
        for name, shape in self._layout.inputs:
            width = math.prod(shape)
            values = rows[:, begin : begin + width].reshape(len(rows), *shape)
            yield "observations" if len(self._layout.inputs) == 1 else f"observations/{_key(name)}", values
            begin += width

    def _infos(self, rows: Array) -> Iterator[tuple[str, Array]]:
        for name in _PLAIN_INFOS:
            yield name, rows[name]
        yield "policy_action", rows["policy_action"]
        offset_s = (rows["monotonic_ns"] - self._facts.monotonic_ns) * 1e-9
        yield "monotonic_s", offset_s
        yield "wall_time_s", self._facts.wall_ns * 1e-9 + offset_s
        for name in TEXT_FIELDS:
            numbers, places = np.unique(rows[name], return_inverse=True)
            texts = [self._texts.get(int(number), "").encode() for number in numbers]
            if name == "bundle_digest":
                self._digests |= {text.decode() for text in texts if text}
            yield name, np.array(texts, dtype=f"S{_LONGEST_TEXT}")[places]

    def _write_metadata(self) -> None:
        layout = self._layout
        boxes = {
            name: _box(shape, [-math.inf] * math.prod(shape), [math.inf] * math.prod(shape))
            for name, shape in layout.inputs
        }
        if len(boxes) == 1:
            (observation_space,) = boxes.values()
        else:
            observation_space = {
                "type": "Dict",
                "subspaces": {_key(name): box for name, box in boxes.items()},
            }
        data = self._draft / "data"
        metadata = {
            "dataset_id": self._name,
            "minari_version": _MINARI_VERSION,
            "data_format": "hdf5",
            "jpeg_encoding": False,
            "total_episodes": self._total_episodes,
            "total_steps": self._total_steps,
            "dataset_size": round((data / DATA_FILE).stat().st_size / 1e6, 3),
            "observation_space": json.dumps(observation_space),
            "action_space": json.dumps(_box((layout.action_width,), layout.low, layout.high)),
            "description": f"Recorded by: {layout.recorded_by}.",
            "rewards_known": self._rewards_known,
            "lom_recording": {
                "recorded_by": layout.recorded_by,
                "policy": layout.policy,
                "bundle_digests": sorted(self._digests),
                "inputs": [[name, list(shape)] for name, shape in layout.inputs],
                "began_unix_s": self._facts.wall_ns * 1e-9,
                "golden": None
                if layout.golden is None
                else {"action_tolerance": layout.golden.action_tolerance, "tie_width": layout.golden.tie_width},
                "steps_left_out": self._left_out,
            },
        }
        fd = os.open(data / METADATA_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(metadata, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put(group: Any, name: str, values: Array, at: int, *, grows: bool) -> None:
    """Has `values` begin at row `at`, which is at most the present length."""
    if name in group:
        dataset = group[name]
        dataset.resize(at + len(values), axis=0)
        if len(values):
            dataset[at:] = values
    elif grows:
        chunk = (_ROWS_AT_ONCE, *values.shape[1:])
        group.create_dataset(
            name, data=values, maxshape=(None, *values.shape[1:]), chunks=chunk, compression="gzip", compression_opts=1
        )
    elif name.startswith("infos/") and values.nbytes > _WORTH_COMPRESSING_BYTES:  # the same digest, a thousand times
        group.create_dataset(name, data=values, chunks=values.shape, compression="gzip", compression_opts=1)
    else:
        group.create_dataset(name, data=values)


def _key(name: str) -> str:
    return name.replace("/", "_") or "observation"


def _box(shape: Sequence[int], low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    """A gymnasium Box as Minari writes it."""
    return {
        "type": "Box",
        "dtype": "float32",
        "shape": list(shape),
        "low": np.reshape(low, shape).tolist(),
        "high": np.reshape(high, shape).tolist(),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedEpisode:
    """What was observed and answered, in order.

    Attributes:
        observations: by input, float32[T + 1, ...]; a single unnamed input is called ``.
        infos: by name, [T + 1, ...], as the dataset has them.
    """

    observations: Mapping[str, Array]
    infos: Infos


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedTraffic:
    """A dataset that was recorded.

    Attributes:
        path: its folder.
        policy: empty where it is not known.
        low, high: bounds of the action.
        golden: of the bundle that answered, where it is known.
        total_steps: of all episodes.
        total_episodes: how many `episodes` gives.
    """

    path: Path
    policy: str
    low: Array
    high: Array
    golden: Golden | None
    total_steps: int
    total_episodes: int
    inputs: tuple[tuple[str, tuple[int, ...]], ...]

    def episodes(self) -> Iterator[RecordedEpisode]:
        """One after the other. Raises RecordingError where the file is damaged."""
        import h5py

        try:
            with h5py.File(self.path / "data" / DATA_FILE, "r") as file:
                for number in range(self.total_episodes):
                    group = file[f"episode_{number}"]
                    observed = group["observations"]
                    observations = (
                        {self.inputs[0][0]: observed[()]}
                        if len(self.inputs) == 1
                        else {name: observed[_key(name)][()] for name, _ in self.inputs}
                    )
                    infos = {name: values[()] for name, values in group["infos"].items()}
                    _require_infos(self.path, infos)
                    yield RecordedEpisode(observations=observations, infos=infos)
        except (OSError, KeyError, RuntimeError) as error:
            raise RecordingError(f"{self.path}: expected the episodes of its metadata, it is damaged") from error


def _require_infos(path: Path, infos: Infos) -> None:
    for name in (*_PLAIN_INFOS, *TEXT_FIELDS, "policy_action"):
        if name not in infos:
            raise RecordingError(f"{path}: expected infos/{name}, as recordings have it, found none")


def read_recording(path: Path) -> RecordedTraffic:
    """The recording at `path`: the folder of a dataset, its `main_data.hdf5`, or a folder of recordings with only one.

    Spools in that folder that nobody writes any more are finished first.

    Raises:
        RecordingError: there is none, several, or none that `--record` made.
        MissingH5pyError: h5py is not installed.
        OSError: the folder cannot be read, or a spool not be finished.
    """
    require_h5py()
    if path.name == DATA_FILE or path.suffix == SUFFIX:
        path = path.parent
    if path.name == "data" and (path / METADATA_FILE).is_file():
        path = path.parent
    if not path.is_dir():
        raise RecordingError(f"{path}: expected the folder of a recording, found none")
    if not (path / "data" / METADATA_FILE).is_file():
        finish_recordings(path)
        found = sorted(place.parent.parent for place in path.glob(f"flight-*/data/{METADATA_FILE}"))
        if not found:
            raise RecordingError(f"{path}: expected a recording, found none")
        if len(found) > 1:
            names = ", ".join(place.name for place in found[-4:])
            raise RecordingError(f"{path}: expected one recording, got a folder of {len(found)}: ..., {names}")
        path = found[0]
    try:
        metadata = json.loads((path / "data" / METADATA_FILE).read_text(encoding="utf-8"))
        recording = metadata["lom_recording"]
        action_space = json.loads(metadata["action_space"])
        golden = recording["golden"]
        return RecordedTraffic(
            path=path,
            policy=str(recording["policy"]),
            low=np.asarray(action_space["low"], np.float32),
            high=np.asarray(action_space["high"], np.float32),
            golden=None if golden is None else Golden(**golden),
            total_steps=int(metadata["total_steps"]),
            total_episodes=int(metadata["total_episodes"]),
            inputs=tuple((name, tuple(shape)) for name, shape in recording["inputs"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordingError(f"{path}: expected a dataset that was recorded with --record, got another one") from error
