"""What a dataset is like, before anything is trained on it: for people as tables, for programs as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table

from lom.dataset import Transitions
from lom.observation_parts import element_names

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_SCHEMA_VERSION = 1
_SHOWN_DIMENSIONS = 12
_HASHED_ROWS = 1 << 16
# Unit actions from here on are taken as the bound itself; the mixture's means reach no further (lom.networks).
_AT_BOUND = 0.999


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, population standard deviation and range of a quantity."""

    mean: float
    std: float
    min: float
    max: float

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> "Spread":
        wide = values.astype(np.float64)
        return cls(mean=float(wide.mean()), std=float(wide.std()), min=float(wide.min()), max=float(wide.max()))


@dataclass(frozen=True, kw_only=True)
class Dimension(Spread):
    """One element of the observation or action vector.

    Attributes:
        name: `observation[3]`, or a dict observation's part and index.
        constant: its spread is zero or only rounding: the normaliser leaves such a dimension unscaled.
    """

    name: str
    constant: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one file brought: rows, episodes, and the undiscounted returns of its episodes."""

    name: str
    rows: int
    episodes: int
    returns: Spread


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """Statistics of transitions, in environment units.

    Attributes:
        rows, episodes: how many.
        episode_lengths: in rows.
        returns: undiscounted, per episode.
        return_quantiles: of `QUANTILES`, by the quantile as text.
        rewards: per row.
        terminal_share: share of the rows whose next state is absorbing.
        rows_with_target: rows with a next action or a terminal state; the others stay out of the SARSA loss.
        actions_at_bounds: share of action entries at a bound (within 0.05 % of the range).
        duplicate_rows: rows beyond the first of the same observation, action, reward and next observation.
        duplicate_episodes: episodes beyond the first of exactly the same rows.
        sources: by file, in the order given.
        observation_dimensions, action_dimensions: by element.
        action_low, action_high: the bounds.
        notes: what had to be clipped or assumed, and what to beware of.
        fingerprint: of the transitions.
    """

    rows: int
    episodes: int
    episode_lengths: Spread
    returns: Spread
    return_quantiles: dict[str, float]
    rewards: Spread
    terminal_share: float
    rows_with_target: int
    actions_at_bounds: float
    duplicate_rows: int
    duplicate_episodes: int
    sources: tuple[Source, ...]
    observation_dimensions: tuple[Dimension, ...]
    action_dimensions: tuple[Dimension, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    notes: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of(cls, transitions: Transitions, notes: Sequence[str] = ()) -> "DatasetCard":
        """Looks at every row; needs little memory beside them.

        Args:
            notes: what was clipped or assumed while the files were read.
        """
        returns = transitions.episode_returns
        duplicate_rows, duplicate_episodes = _count_duplicates(transitions)
        names = element_names(transitions.observation_parts)
        low, high = transitions.action_low, transitions.action_high
        margin = 0.5 * (1.0 - _AT_BOUND) * (high - low)
        at_bounds = (transitions.actions <= low + margin) | (transitions.actions >= high - margin)
        observations = _dimensions("observation", names, transitions.observations)
        return cls(
            rows=len(transitions),
            episodes=len(returns),
            episode_lengths=Spread.of(np.bincount(transitions.episodes).astype(np.float64)),
            returns=Spread.of(returns),
            return_quantiles=dict(zip(map(str, QUANTILES), np.quantile(returns, QUANTILES).tolist(), strict=True)),
            rewards=Spread.of(transitions.rewards),
            terminal_share=float(transitions.terminals.mean()),
            rows_with_target=int((transitions.terminals | transitions.has_next_action).sum()),
            actions_at_bounds=float(at_bounds.mean()),
            duplicate_rows=duplicate_rows,
            duplicate_episodes=duplicate_episodes,
            sources=_sources(transitions, returns),
            observation_dimensions=observations,
            action_dimensions=_dimensions("action", (), transitions.actions),
            action_low=tuple(low.tolist()),
            action_high=tuple(high.tolist()),
            notes=(*notes, *_warnings(transitions, observations, duplicate_episodes)),
            fingerprint=transitions.fingerprint,
        )

    def to_json(self) -> str:
        """Strict JSON of every field."""
        return json.dumps({"schema_version": _SCHEMA_VERSION, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    def tables(self) -> RenderableType:
        """For a terminal of 80 columns and more; of many dimensions only the ones that stand out."""
        return Group(self._overview(), self._by_source(), self._by_dimension())

    def _overview(self) -> Table:
        table = Table(title="dataset", show_header=False, title_justify="left")
        quantiles = ", ".join(f"{value:.4g}" for value in self.return_quantiles.values())
        lengths = self.episode_lengths
        others = " (the others have no next action)" if self.rows_with_target < self.rows else ""
        for name, value in (
            ("rows", f"{self.rows:,} in {self.episodes:,} episodes of {lengths.min:.0f} to {lengths.max:.0f}"),
            ("return per episode", _shown(self.returns)),
            ("its 5, 25, 50, 75, 95 %", quantiles),
            ("reward per row", _shown(self.rewards)),
            ("terminal rows", f"{self.terminal_share:.2%}"),
            ("rows with a target", f"{self.rows_with_target:,}{others}"),
            (
                "actions",
                f"in [{min(self.action_low):g}, {max(self.action_high):g}], {self.actions_at_bounds:.1%} at a bound",
            ),
            ("duplicates", f"{self.duplicate_rows:,} rows, {self.duplicate_episodes:,} whole episodes"),
            ("constant dimensions", _constant(self.observation_dimensions + self.action_dimensions)),
        ):
            table.add_row(name, value)
        return table

    def _by_source(self) -> Table:
        table = Table(title="by file", title_justify="left")
        for heading in ("file", "rows", "episodes", "return"):
            table.add_column(heading, overflow="fold", justify="left" if heading == "file" else "right")
        for source in self.sources:
            table.add_row(source.name, f"{source.rows:,}", f"{source.episodes:,}", _shown(source.returns))
        return table

    def _by_dimension(self) -> Table:
        table = Table(title="by dimension", title_justify="left")
        for heading in ("dimension", "mean", "std", "min", "max"):
            table.add_column(heading, overflow="fold", justify="left" if heading == "dimension" else "right")
        for dimensions in (self.observation_dimensions, self.action_dimensions):
            for dimension in _outstanding(dimensions):
                numbers = (dimension.mean, dimension.std, dimension.min, dimension.max)
                table.add_row(dimension.name, *(f"{number:.4g}" for number in numbers))
            if len(dimensions) > _SHOWN_DIMENSIONS:
                table.add_row(f"(of {len(dimensions)})")
                table.caption = "of many dimensions those that vary least and most"
            table.add_section()
        return table


def _shown(spread: Spread) -> str:
    return f"{spread.mean:.4g} ± {spread.std:.4g} ({spread.min:.4g} to {spread.max:.4g})"


def _constant(dimensions: Sequence[Dimension]) -> str:
    names = [dimension.name for dimension in dimensions if dimension.constant]
    more = f" and {len(names) - _SHOWN_DIMENSIONS} more" if len(names) > _SHOWN_DIMENSIONS else ""
    return ", ".join(names[:_SHOWN_DIMENSIONS]) + more or "none"


def _outstanding(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """All of a few; of many those that vary most and least, in their order. Constant ones are named elsewhere."""
    if len(dimensions) <= _SHOWN_DIMENSIONS:
        return list(dimensions)
    by_spread = sorted((d for d in dimensions if not d.constant), key=lambda dimension: dimension.std)
    half = _SHOWN_DIMENSIONS // 2
    chosen = {dimension.name for dimension in by_spread[:half] + by_spread[-half:]}
    return [dimension for dimension in dimensions if dimension.name in chosen]


def _dimensions(kind: str, names: Sequence[str], values: NDArray[np.float32]) -> tuple[Dimension, ...]:
    dimensions = []
    for index, column in enumerate(values.T):  # one at a time: a float64 copy of all would be large
        spread = Spread.of(column)
        dimensions.append(
            Dimension(
                **asdict(spread),
                name=names[index] if names else f"{kind}[{index}]",
                constant=spread.std < 1e-6 * max(abs(spread.min), abs(spread.max), 1.0),
            )
        )
    return tuple(dimensions)


def _sources(transitions: Transitions, returns: NDArray[np.float64]) -> tuple[Source, ...]:
    first_rows = np.unique(transitions.episodes, return_index=True)[1]
    source_of_episode = transitions.sources[first_rows]
    return tuple(
        Source(
            name=name,
            rows=int((transitions.sources == index).sum()),
            episodes=int((source_of_episode == index).sum()),
            returns=Spread.of(returns[source_of_episode == index]),
        )
        for index, name in enumerate(transitions.source_names)
    )


def _count_duplicates(transitions: Transitions) -> tuple[int, int]:
    """(rows, episodes) that occurred before, found by 64-bit hashes: by chance once in 10⁷ datasets of 10⁶ rows."""
    count = len(transitions)
    hashes = np.empty(count, np.int64)
    for start in range(0, count, _HASHED_ROWS):
        rows = slice(start, start + _HASHED_ROWS)
        columns = (
            transitions.observations[rows],
            transitions.actions[rows],
            transitions.rewards[rows, None],
            transitions.next_observations[rows],
        )
        joined = np.concatenate(columns, axis=1) + np.float32(0.0)  # -0.0 and 0.0 are one number
        hashes[rows] = [hash(row) for row in joined.view(np.dtype((np.void, joined.strides[0])))[:, 0].tolist()]
    ends = np.flatnonzero(np.diff(transitions.episodes)) + 1
    episodes = {hash(part.tobytes()) for part in np.split(hashes, ends)}
    return count - len(np.unique(hashes)), len(ends) + 1 - len(episodes)


def _warnings(transitions: Transitions, observations: Sequence[Dimension], duplicate_episodes: int) -> list[str]:
    notes = []
    if transitions.rewards.min() == transitions.rewards.max() and not transitions.terminals.any():
        notes.append("every reward is the same and no row is terminal: no action can look better than another")
    if duplicate_episodes:
        notes.append("some episodes occur more than once: held-out episodes are then not unseen")
    scales = [dimension.std for dimension in observations if not dimension.constant]
    if not scales:
        notes.append("every observation dimension is constant: the policy will not depend on the observation")
    return notes
