"""Cells of a study: measured once, kept, found again."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from lom.study import cells
from lom.study.cells import Cell, Result, measured


@dataclass(frozen=True)
class Measurement:
    """What a cell may return: numbers and arrays."""

    squares: np.ndarray[tuple[int, ...], np.dtype[np.float64]]
    process: int


def square(numbers: list[int], journal: str) -> Measurement:
    """Leaves a line in the journal, so that a test sees what was measured."""
    with Path(journal).open("a") as lines:
        lines.write(f"{numbers}\n")
    if 13 in numbers:
        raise ArithmeticError("13 is unlucky")
    return Measurement(np.array(numbers) ** 2.0, os.getpid())


def cells_for(folder: Path, *every: list[int]) -> list[Cell]:
    journal = str(folder / "journal")
    return [
        Cell(name=f"square-{numbers}", measure=square, arguments={"numbers": numbers, "journal": journal})
        for numbers in every
    ]


def lines(folder: Path) -> list[str]:
    return (folder / "journal").read_text().splitlines()


def squares(results: list[tuple[Cell, Result]]) -> list[list[float]]:
    return sorted(result["squares"] for _, result in results)


def test_a_study_that_failed_goes_on_where_it_was(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(ArithmeticError, match="unlucky"):
        list(measured(cells_for(tmp_path, [1], [2, 3], [13]), kept))
    assert lines(tmp_path) == ["[1]", "[2, 3]", "[13]"]
    results = list(measured(cells_for(tmp_path, [1], [2, 3], [4]), kept))
    assert lines(tmp_path)[3:] == ["[4]"]
    assert squares(results) == [[1.0], [4.0, 9.0], [16.0]]


def test_other_arguments_and_another_configuration_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    (cell,) = cells_for(tmp_path, [1])
    list(measured([cell], kept))
    other = Cell(name=cell.name, measure=square, arguments={**cell.arguments, "numbers": [5]})
    assert squares(list(measured([other], kept))) == [[25.0]]
    list(measured([other], kept))
    assert len(lines(tmp_path)) == 2
    monkeypatch.setattr(cells, "STUDIED", replace(cells.STUDIED, batch=7))
    list(measured([other], kept))
    assert len(lines(tmp_path)) == 3


def test_what_was_measured_before_a_field_existed_is_kept(tmp_path: Path) -> None:
    (cell,) = cells_for(tmp_path, [1])
    list(measured([cell], tmp_path))
    path = tmp_path / f"{cell.name}.json"
    document = json.loads(path.read_text())
    del document["preset"]["imitation_samples"]
    path.write_text(json.dumps(document))
    assert cell.kept(tmp_path) is not None
    path.write_text(json.dumps(document | {"preset": {"a_field_that_is_gone": 1}}))
    assert cell.kept(tmp_path) is None


def test_everything_is_measured_again_on_request(tmp_path: Path) -> None:
    for again in (False, True):
        list(measured(cells_for(tmp_path, [1], [2]), tmp_path / "kept", again=again))
    assert len(lines(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cell": {}}', "null"])
def test_a_damaged_file_counts_as_missing_and_is_replaced(tmp_path: Path, damage: str) -> None:
    (cell,) = cells_for(tmp_path, [3])
    (tmp_path / f"{cell.name}.json").write_text(damage)
    assert squares(list(measured([cell], tmp_path))) == [[9.0]]
    list(measured([cell], tmp_path))
    assert len(lines(tmp_path)) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_several_processes_measure_side_by_side(tmp_path: Path) -> None:
    cells = cells_for(tmp_path, [1], [2])
    results = list(measured(cells, tmp_path / "kept", processes=2))
    assert squares(results) == [[1.0], [4.0]]
    assert os.getpid() not in {result["process"] for _, result in results}
