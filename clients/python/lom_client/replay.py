"""Asks a recording's questions again, and compares the answers with the recorded ones."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lom_api.recording.dataset import RecordedEpisode, RecordedTraffic
from lom_api.recording.spool import Golden
from lom_client.client import PolicyClient
from lom_client.errors import ContractMismatch
from lom_client.observations import Observations
from lom_client.spec import PolicySpec

Array: TypeAlias = NDArray[Any]

DEFAULT_GOLDEN = Golden(action_tolerance=1e-5, tie_width=0.0)
"""Where neither the recording nor the caller knows the bundle's: what an unquantised bundle is exported with."""

_INPROC = "inproc:"
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A recorded answer that was not given again. `step` counts from 0 within its episode."""

    episode: int
    step: int
    recorded: tuple[float, ...]
    replayed: tuple[float, ...]
    recorded_mode: int
    replayed_mode: int


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What became of a recording's answers.

    Attributes:
        steps: rows of the recording, those without an answer included.
        compared: rows whose answer belongs to an observation of the recording.
        ties: of those compared, rows that went to another mode at a margin below the tie width: either is right.
        within: of those compared, rows within the tolerance, ties included.
        largest_difference: of an action element, as a share of its range, ties left out.
        first_difference: the first row that is not within.
        tolerance, tie_width: that were applied.
        recorded_digests, replayed_digests: of the bundles that answered then and now.
    """

    steps: int
    compared: int
    ties: int
    within: int
    largest_difference: float
    first_difference: Difference | None
    tolerance: float
    tie_width: float
    recorded_digests: frozenset[str]
    replayed_digests: frozenset[str]

    @property
    def reproduces(self) -> bool:
        """Whether there was something to compare, and all of it was answered alike."""
        return self.compared > 0 and self.within == self.compared

    @property
    def has_same_bundle(self) -> bool:
        """Whether the bundle that answers is the one that was recorded."""
        return self.recorded_digests == self.replayed_digests


def golden_of(recording: RecordedTraffic, target: str) -> Golden:
    """Within what answers count as reproduced: as the recording says, else the bundle of an `inproc:` target, else
    `DEFAULT_GOLDEN`."""
    if recording.golden is not None:
        return recording.golden
    if target.startswith(_INPROC):
        try:
            said = json.loads((Path(target.removeprefix(_INPROC)) / "manifest.json").read_text())["golden"]
            return Golden(action_tolerance=float(said["action_tolerance"]), tie_width=float(said["tie_width"]))
        except (OSError, ValueError, LookupError, TypeError):  # whoever loads the bundle says what is wrong with it
            pass
    return DEFAULT_GOLDEN


def replay(
    recording: RecordedTraffic,
    client: PolicyClient,
    *,
    golden: Golden,
    deadline_s: float = 1.0,
    on_steps: Callable[[int], object] | None = None,
) -> ReplayReport:
    """Asks everything that was answered once more, with the recorded variant and options.

    Args:
        golden: the tolerances.
        deadline_s: for each call, as for `PolicyClient.act`.
        on_steps: told how many rows are done with each call.

    Raises:
        RecordingError: the recording is damaged.
        ContractMismatch: the policy takes other observations or gives other actions than the recorded one.
        PolicyError: a call failed.
    """
    spec = client.get_spec(deadline_s=max(deadline_s, 5.0))
    if len(recording.low) != spec.action.width:
        raise ContractMismatch(
            "SPACE_MISMATCH", f"action: the recording has {len(recording.low)} elements, the policy {spec.action.width}"
        )
    tally = _Tally(golden, spec)
    for number, episode in enumerate(recording.episodes()):
        tally.steps += len(episode.infos["sequence"])
        tally.recorded_digests |= {
            digest.decode() for digest in np.unique(episode.infos["bundle_digest"][episode.infos["is_answered"]])
        }
        done = 0
        for group in _groups(episode, spec.max_batch_rows):
            tally.compare(number, episode, group, _ask(client, episode, group, deadline_s))
            if on_steps is not None:
                on_steps(len(group.answered))
            done += len(group.answered)
        if on_steps is not None:
            on_steps(len(episode.infos["sequence"]) - done)
    return tally.report()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answer:
    actions: Array
    modes: Array
    bundle_digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Rows that one call can ask: `answered` hold the answers to the observations of `asked`."""

    asked: Array
    answered: Array


def _groups(episode: RecordedEpisode, max_rows: int) -> Iterator[_Group]:
    """Calls of equal options; a loop that does not wait has its answers a row later than their observations."""
    infos = episode.infos
    answered = np.flatnonzero(infos["is_answered"])
    rows = {int(sequence): row for row, sequence in reversed(list(enumerate(infos["sequence"])))}
    asked = np.array([rows.get(int(sequence), -1) for sequence in infos["answers"][answered]], dtype=np.int64)
    answered, asked = answered[asked >= 0], asked[asked >= 0]
    begin = 0
    for end in range(1, len(answered) + 1):
        is_full = end - begin >= min(_ROWS_AT_ONCE, max_rows)
        if end == len(answered) or is_full or not _are_alike(infos, asked, answered, begin, end):
            yield _Group(asked=asked[begin:end], answered=answered[begin:end])
            begin = end


def _are_alike(infos: Any, asked: Array, answered: Array, one: int, other: int) -> bool:
    if infos["is_sampled"][answered[one]] or infos["is_sampled"][answered[other]]:
        return False
    of_question = ("forced_mode", "hysteresis_width")
    return bool(infos["variant"][answered[one]] == infos["variant"][answered[other]]) and all(
        infos[name][asked[one]] == infos[name][asked[other]] for name in of_question
    )


def _ask(client: PolicyClient, episode: RecordedEpisode, group: _Group, deadline_s: float) -> _Answer:
    infos, first = episode.infos, group.asked[0]
    options: dict[str, Any] = {}
    rows = group.asked
    if infos["forced_mode"][first] >= 0:
        options["mode"] = int(infos["forced_mode"][first])
    if infos["hysteresis_width"][first] > 0 or (infos["previous_mode"][rows] >= 0).any():
        options["hysteresis_width"] = float(infos["hysteresis_width"][first])
        options["previous_mode"] = infos["previous_mode"][rows]
    place = 0
    if infos["is_sampled"][first]:
        # A sample depends on the seed and the row's place in its request.
        options["sampling_seed"] = int(infos["sampling_seed"][first])
        place = int(infos["row"][first])
        rows = np.repeat(rows, place + 1)
        if "previous_mode" in options:
            options["previous_mode"] = np.repeat(options["previous_mode"], place + 1)
    answer = client.act(
        _observations(episode, rows),
        deadline_s=deadline_s,
        variant=infos["variant"][group.answered[0]].decode() or None,
        **options,
    )
    modes = np.full(len(rows), -1) if answer.mode is None else answer.mode
    return _Answer(actions=answer.actions[place:], modes=modes[place:], bundle_digest=answer.bundle_digest)


def _observations(episode: RecordedEpisode, rows: Array) -> Observations:
    arrays = {name: values[rows] for name, values in episode.observations.items()}
    if list(arrays) == [""]:
        (values,) = arrays.values()
        return np.asarray(values)
    return arrays


class _Tally:
    def __init__(self, golden: Golden, spec: PolicySpec) -> None:
        width = spec.action.high.astype(np.float64) - spec.action.low
        self._range = np.where(np.isfinite(width) & (width > 0), width, 1.0)
        self._golden = golden
        self._compared = 0
        self._ties = 0
        self._within = 0
        self._largest = 0.0
        self._first: Difference | None = None
        self._replayed_digests: set[str] = set()
        self.steps = 0
        self.recorded_digests: set[str] = set()

    def compare(self, number: int, episode: RecordedEpisode, group: _Group, answer: "_Answer") -> None:
        infos, rows = episode.infos, group.answered
        recorded, recorded_modes = infos["policy_action"][rows], infos["mode"][rows]
        flips = recorded_modes != answer.modes
        is_tie = flips & (infos["margin"][rows] < self._golden.tie_width)  # NaN, no runner-up, is none
        error = (np.abs(recorded.astype(np.float64) - answer.actions) / self._range).max(axis=1)
        within = is_tie | (~flips & (error <= self._golden.action_tolerance))
        self._replayed_digests.add(answer.bundle_digest)
        self._compared += len(rows)
        self._ties += int(is_tie.sum())
        self._within += int(within.sum())
        self._largest = max(self._largest, float(error[~is_tie].max(initial=0.0)))
        if self._first is None and not within.all():
            place = int(np.argmin(within))
            self._first = Difference(
                episode=number,
                step=int(rows[place]),
                recorded=tuple(recorded[place].tolist()),
                replayed=tuple(answer.actions[place].tolist()),
                recorded_mode=int(recorded_modes[place]),
                replayed_mode=int(answer.modes[place]),
            )

    def report(self) -> ReplayReport:
        return ReplayReport(
            steps=self.steps,
            compared=self._compared,
            ties=self._ties,
            within=self._within,
            largest_difference=self._largest,
            first_difference=self._first,
            tolerance=self._golden.action_tolerance,
            tie_width=self._golden.tie_width,
            recorded_digests=frozenset(self.recorded_digests),
            replayed_digests=frozenset(self._replayed_digests),
        )
