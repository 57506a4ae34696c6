"""Records what a control loop, or an environment's episodes, asked for and put out."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lom_api.recording import Layout, Recorder, RecordingError, Step, finish_recordings, require_h5py
from lom_api.recording.spool import OUTCOME, floats
from lom_client.actions import Actions
from lom_client.level_rules import LevelRules
from lom_client.levels import Command, Flag
from lom_client.loop_messages import (
    Answer,
    UnusableObservationError,
    pack_observation,
    packed_header,
    unpack_observation,
)
from lom_client.observations import Observations
from lom_client.spec import PolicySpec

_LOGGER = logging.getLogger(__name__)
_BYTES_OF_A_STEP = 512
_FOREVER_NS = 2**62
_GAP_PERIODS = 1.5

Array: TypeAlias = NDArray[Any]
_Steps: TypeAlias = Iterable[tuple[Layout, Step]]


class _Item(Protocol):
    def steps(self, recorder: "FlightRecorder", epoch: int) -> _Steps: ...


class FlightRecorder:
    """Writes the steps of one control loop, or of episodes, into a folder, which becomes a Minari dataset at the end.

    Costs the control thread microseconds, never holds it up and never raises there: what the writing thread cannot
    keep up with is dropped and counted; a full disk ends the recording, and nothing else. `docs/recording.md` says what
    is in the dataset. A process that is killed loses the last tenth of a second; whoever records into the folder next,
    or replays from it, finishes what it left.

    Recordings hold observations, which may be personal data: folders get mode 0700, files 0600.

    **Threads**: one loop or one player of episodes records; the rest may be called from any thread.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_mb: float = 1024.0,
        finishes: bool = True,
        on_failure: Callable[[str], object] | None = None,
    ) -> None:
        """Begins a recording; it may be used as a context manager, outside of the loop's.

        Args:
            folder: of all recordings; made where it is missing.
            max_mb: MiB that all recordings in the folder may take; the one that reaches them ends.
            finishes: `close` makes the dataset. False leaves that to `python -m lom_api.recording FOLDER`, on any
                machine: a robot then needs no h5py.
            on_failure: told, in a thread of the recorder, why the recording has ended before it was closed.

        Raises:
            ValueError: `max_mb` is not above 0, or the folder cannot be written.
            ImportError: it finishes, and h5py is not installed.
        """
        if not 0 < max_mb < math.inf:
            raise ValueError(f"max_mb must be above 0, got {max_mb}")
        if finishes:
            require_h5py()
        self._folder = Path(folder)
        self._finishes = finishes
        self._sequence = 0
        self._header = b""
        self._rules: LevelRules | None = None
        self._layout: Layout | None = None
        try:
            self._recorder: Recorder[_Item] = Recorder(
                self._folder,
                lambda item, epoch: item.steps(self, epoch),
                max_bytes=round(max_mb * 2**20),
                on_failure=on_failure,
            )
        except OSError as error:
            raise ValueError(f"record: cannot write to {str(folder)!r}: {error.strerror}") from None

    @property
    def recorded(self) -> int:
        """Steps and outcomes that were taken; those of the last tenth of a second still wait for the disk."""
        return self._recorder.recorded

    @property
    def dropped(self) -> int:
        """Steps and outcomes that are not in the recording."""
        return self._recorder.dropped

    @property
    def failure(self) -> str:
        """Why the recording has ended before it was closed; empty while it has not."""
        return self._recorder.failure

    def tick(
        self, observation: bytes, command: Command, rules: LevelRules, previous_mode: int, hysteresis_width: float
    ) -> None:
        """Records a tick of a control loop, which calls this; `observation` as `pack_observation` packs it."""
        self._recorder.put(
            _LoopTick(
                observation,
                command,
                rules,
                previous_mode,
                hysteresis_width,
                time.monotonic_ns(),
            ),
            len(observation) + _BYTES_OF_A_STEP,
        )

    def outcome(
        self,
        *,
        reward: float | None = None,
        terminated: bool = False,
        truncated: bool = False,
        final_observation: Observations | None = None,
    ) -> None:
        """Says what became of the newest tick, before the next one: a loop itself knows neither reward nor episode.

        Args:
            reward: None where it is not known.
            terminated: the episode has come to its end, or
            truncated: it is broken off.
            final_observation: what was observed then; else the last action of a truncated episode leads nowhere.

        Raises:
            ValueError: the final observation is not one.
        """
        try:
            packed = b"" if final_observation is None else pack_observation(final_observation)
        except UnusableObservationError as error:
            raise ValueError(f"final_observation: {error.detail}") from None
        self._recorder.put(_Outcome(reward, terminated, truncated, packed), len(packed) + _BYTES_OF_A_STEP)

    def steps(
        self,
        spec: PolicySpec,
        observations: Array,
        answer: Actions,
        *,
        actions: Array,
        rewards: Array,
        terminated: Array,
        truncated: Array,
        next_observations: Array,
        episodes: Sequence[int],
    ) -> None:
        """Records one step of B environments.

        Args:
            observations, next_observations: [B, O].
            answer: to `observations`; of B rows.
            actions: [B, A], what was put out.
            rewards, terminated, truncated: [B].
            episodes: of each row, a number that no other episode has.
        """
        self._sequence += 1
        rows = _EpisodeSteps(
            spec,
            np.array(observations, np.float32),
            answer,
            np.array(actions, np.float32),
            np.array(rewards, np.float64),
            np.array(terminated, np.bool_),
            np.array(truncated, np.bool_),
            np.array(next_observations, np.float32),
            tuple(int(episode) for episode in episodes),
            self._sequence,
            time.monotonic_ns(),
        )
        self._recorder.put(rows, 2 * rows.observations.nbytes + len(rows.episodes) * _BYTES_OF_A_STEP)

    def close(self) -> None:
        """Ends the recording and, where it finishes, makes the dataset: seconds for hours of flight. May be called
        twice.

        Raises:
            OSError: the dataset could not be written; what it is made of is still there.
        """
        self._recorder.close()
        if self._finishes:
            try:
                finish_recordings(self._folder)
            except RecordingError as error:  # not this one, which is finished
                _LOGGER.warning("%s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def layout_of(self, observation: bytes, rules: LevelRules) -> Layout:
        """Of a control loop's ticks. For the writing thread."""
        header = packed_header(observation)
        if self._layout is None or header != self._header or rules is not self._rules:
            arrays = _arrays(unpack_observation(observation))
            self._header, self._rules = header, rules
            self._layout = Layout(
                recorded_by="control loop",
                policy="",
                inputs=tuple((name, array.shape) for name, array in arrays.items()),
                low=rules.low,
                high=rules.high,
                longest_gap_ns=round(_GAP_PERIODS * rules.period_ns),
            )
        return self._layout

    @property
    def last_layout(self) -> Layout | None:
        """Of the newest tick. For the writing thread."""
        return self._layout


@dataclass(slots=True)
class _LoopTick:
    observation: bytes
    command: Command
    rules: LevelRules
    previous_mode: int
    hysteresis_width: float
    monotonic_ns: int

    def steps(self, recorder: FlightRecorder, epoch: int) -> _Steps:
        command = self.command
        reply = command.reply if isinstance(command.reply, Answer) else None
        step = Step(
            observation=_bytes(self.observation),
            action=floats(command.values),
            policy_action=None if reply is None else floats(reply.action),
            epoch=epoch,
            version=0 if reply is None else reply.version,
            flags=int(command.flags),
            bundle_digest="" if reply is None else reply.bundle_digest,
            variant="" if reply is None else reply.variant,
            level=command.level.value,
            source=command.source.value,
            reason=command.reason,
            mode=-1 if reply is None else reply.mode,
            margin=math.nan if reply is None or reply.margin is None else reply.margin,
            previous_mode=self.previous_mode if self.hysteresis_width else -1,  # not told otherwise
            hysteresis_width=self.hysteresis_width,
            sequence=command.sequence,
            answers=0 if reply is None else reply.sequence,
            monotonic_ns=self.monotonic_ns,
            age_s=math.nan if command.age_ns is None else command.age_ns * 1e-9,
        )
        return ((recorder.layout_of(self.observation, self.rules), step),)


@dataclass(slots=True)
class _Outcome:
    reward: float | None
    terminated: bool
    truncated: bool
    final: bytes

    def steps(self, recorder: FlightRecorder, epoch: int) -> _Steps:
        layout = recorder.last_layout
        if layout is None:
            raise ValueError("expected a tick before its outcome")
        step = Step(
            observation=_bytes(self.final) if self.final else bytes(4 * layout.observation_width),
            action=bytes(4 * layout.action_width),
            kind=OUTCOME,
            has_final=bool(self.final),
            has_outcome=self.reward is not None,
            reward=math.nan if self.reward is None else float(self.reward),
            terminated=bool(self.terminated),
            truncated=bool(self.truncated),
            epoch=epoch,
        )
        return ((layout, step),)


@dataclass(slots=True)
class _EpisodeSteps:
    spec: PolicySpec
    observations: Array
    answer: Actions
    actions: Array
    rewards: Array
    terminated: Array
    truncated: Array
    next_observations: Array
    episodes: tuple[int, ...]
    sequence: int
    monotonic_ns: int

    def steps(self, recorder: FlightRecorder, epoch: int) -> _Steps:
        answer, spec = self.answer, self.spec
        layout = Layout(
            recorded_by="episodes",
            policy=spec.policy,
            inputs=((spec.observation.name, spec.observation.shape),),
            low=tuple(spec.action.low.tolist()),
            high=tuple(spec.action.high.tolist()),
            longest_gap_ns=_FOREVER_NS,
        )
        warns = np.zeros(len(self.episodes), np.bool_)
        for score in answer.scores.values():
            warns |= score.warns
        for row, episode in enumerate(self.episodes):
            action = self.actions[row].tobytes()
            final = bool(self.terminated[row] or self.truncated[row])
            yield (
                layout,
                Step(
                    observation=self.observations[row].tobytes(),
                    action=action,
                    policy_action=floats(answer.actions[row]),
                    has_outcome=True,
                    reward=float(self.rewards[row]),
                    terminated=bool(self.terminated[row]),
                    truncated=bool(self.truncated[row]),
                    stream=episode,
                    epoch=epoch,
                    version=answer.version,
                    flags=int(Flag.OUT_OF_DISTRIBUTION) if warns[row] else 0,
                    bundle_digest=answer.bundle_digest,
                    variant=answer.variant,
                    level="nominal",
                    source="fresh",
                    mode=-1 if answer.mode is None else int(answer.mode[row]),
                    margin=math.nan if answer.margin is None else float(answer.margin[row]),
                    sequence=self.sequence,
                    answers=self.sequence,
                    monotonic_ns=self.monotonic_ns,
                    age_s=answer.timings.round_trip_s,
                ),
            )
            if final:
                yield (
                    layout,
                    Step(
                        observation=self.next_observations[row].tobytes(),
                        action=action,
                        kind=OUTCOME,
                        has_final=True,
                        stream=episode,
                        epoch=epoch,
                    ),
                )


def _arrays(observation: Observations) -> dict[str, Array]:
    if isinstance(observation, dict):
        return {name: np.asarray(array) for name, array in observation.items()}
    return {"": np.asarray(observation)}


def _bytes(packed: bytes) -> bytes:
    return b"".join(floats(array) for array in _arrays(unpack_observation(packed)).values())
