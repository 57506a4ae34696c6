import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lom.dataset import load_transitions
from lom.dataset_card import DatasetCard
from tests.support.datasets import box, minari_episode, write_arrays, write_minari


def four_rows(**changes: Any) -> dict[str, Any]:
    """Two episodes of two rows with returns 3 and 30; the second observation dimension never varies."""
    observations = np.array([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0], [6.0, 7.0]])
    return {
        "observations": observations,
        "next_observations": observations + 0.5,
        "actions": np.array([[-1.0], [0.0], [0.99], [1.0]]),
        "rewards": np.array([1.0, 2.0, 10.0, 20.0]),
        "terminals": np.array([False, False, False, True]),
        "timeouts": np.array([False, True, False, False]),
        **changes,
    }


def card_of(tmp_path: Path, *files: dict[str, Any]) -> DatasetCard:
    notes: list[str] = []
    paths = [write_arrays(tmp_path / f"{index}.npz", arrays) for index, arrays in enumerate(files)]
    return DatasetCard.of(load_transitions(paths, warn=notes.append), notes)


def shown(card: DatasetCard, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(card.tables())
    return capture.get()


def test_every_figure_is_the_one_worked_out_by_hand(tmp_path: Path) -> None:
    card = card_of(tmp_path, four_rows())
    assert (card.rows, card.episodes) == (4, 2)
    assert (card.returns.mean, card.returns.std, card.returns.min, card.returns.max) == (16.5, 13.5, 3.0, 30.0)
    assert card.return_quantiles["0.5"] == 16.5
    assert card.return_quantiles["0.25"] == 3.0 + 0.25 * 27.0
    assert card.rewards.mean == 8.25
    assert card.terminal_share == 0.25
    assert card.rows_with_target == 3  # all but the one that the time limit cut
    assert card.actions_at_bounds == 0.5  # -1 and 1, not 0.99
    assert (card.duplicate_rows, card.duplicate_episodes) == (0, 0)
    first, second = card.observation_dimensions
    assert (first.name, first.mean, first.std, first.min, first.max) == ("observation[0]", 3.0, np.sqrt(5.0), 0.0, 6.0)
    assert (first.constant, second.constant) == (False, True)
    assert (second.mean, second.std) == (7.0, 0.0)
    assert (card.action_low, card.action_high) == ((-1.0,), (1.0,))


def test_rounding_is_no_variation(tmp_path: Path) -> None:
    observations = np.array([[1e6], [1e6], [1e6], [np.nextafter(np.float32(1e6), np.float32(2e6))]], np.float32)
    card = card_of(tmp_path, four_rows(observations=observations, next_observations=observations))
    assert card.observation_dimensions[0].constant


def test_a_file_given_twice_shows_as_duplicates(tmp_path: Path) -> None:
    card = card_of(tmp_path, four_rows(), four_rows())
    assert (card.duplicate_rows, card.duplicate_episodes) == (4, 2)
    assert any("more than once" in note for note in card.notes)
    assert [(source.name, source.rows, source.episodes) for source in card.sources] == [
        ("0.npz", 4, 2),
        ("1.npz", 4, 2),
    ]


def test_rows_that_differ_in_one_number_are_no_duplicates_and_zero_has_no_sign(tmp_path: Path) -> None:
    other = four_rows()
    other["rewards"] = other["rewards"] + np.array([0.0, 0.0, 0.0, 1e-3])
    other["actions"] = np.array([[-1.0], [-0.0], [0.99], [1.0]])
    card = card_of(tmp_path, four_rows(), other)
    assert (card.duplicate_rows, card.duplicate_episodes) == (3, 1)


def test_returns_are_told_apart_by_file(tmp_path: Path) -> None:
    good = four_rows()
    good["rewards"] = good["rewards"] * 100
    first, second = card_of(tmp_path, four_rows(), good).sources
    assert (first.returns.mean, second.returns.mean) == (16.5, 1650.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actions": np.array([[-3.0], [0.0], [0.0], [0.0]])}, "1 of 4 action entries (25.0%)"),
        ({"rewards": np.ones(4), "terminals": np.zeros(4, bool)}, "every reward is the same"),
        (
            {"observations": np.ones((4, 2)), "next_observations": np.ones((4, 2))},
            "every observation dimension is const",
        ),
    ],
)
def test_what_to_beware_of_is_noted(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    assert any(words in note for note in card_of(tmp_path, four_rows(**changes)).notes)
    assert not any(words in note for note in card_of(tmp_path, four_rows()).notes)


def test_without_timeouts_and_next_observations_the_episodes_are_a_guess(tmp_path: Path) -> None:
    arrays = four_rows()
    del arrays["timeouts"], arrays["next_observations"]
    assert any("episodes are taken to end at terminals only" in note for note in card_of(tmp_path, arrays).notes)


def test_the_tables_name_what_matters(tmp_path: Path) -> None:
    text = shown(card_of(tmp_path, four_rows(), four_rows()))
    for words in ("8 in 4 episodes of 2 to 2", "16.5 ± 13.5", "50.0% at a bound", "4 rows, 2 whole episodes", "1.npz"):
        assert words in text
    assert "constant dimensions     │ observation[1]" in text


def test_many_dimensions_stay_a_table_that_can_be_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(4, 400)) * np.geomspace(1e-3, 1e3, 400)
    card = card_of(tmp_path, four_rows(observations=observations, next_observations=observations))
    text = shown(card, width=80)
    assert len(text.splitlines()) < 50
    assert max(map(len, text.splitlines())) <= 80
    assert "(of 400)" in text
    names = [line.split()[1] for line in text.splitlines() if line.startswith("│ observation[")]
    spread = sorted(card.observation_dimensions, key=lambda dimension: dimension.std)
    assert set(names) == {dimension.name for dimension in spread[:6] + spread[-6:]}


def test_the_json_is_strict_and_whole(tmp_path: Path) -> None:
    folder = write_minari(tmp_path / "d-v0", [minari_episode(2)], action_space=box([-2.0], [2.0]))
    card = DatasetCard.of(load_transitions([folder]))
    document = json.loads(card.to_json(), parse_constant=pytest.fail)
    assert document["rows"] == 2
    assert document["sources"][0]["name"] == "d-v0"
    assert document["action_high"] == [2.0]
    assert len(document["observation_dimensions"]) == 2
