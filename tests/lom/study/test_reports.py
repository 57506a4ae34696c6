"""Tables and pictures from results that are made up, so that what they say is known."""

from pathlib import Path

import pytest

from lom.study.cells import Cell, Result
from lom.study.checks import (
    RANDOM_SHARES,
    TASKS,
    measure_choices,
    measure_error_bound,
    measure_forced_modes,
    measure_sensitivity,
)
from lom.study.hyper_policies import RULES
from lom.study.reports import ERRORS, EXPERIMENTS, exact_rules
from tests.support.pictures import is_drawn


def made_up(cell: Cell) -> Result:
    """Seed 0 measures a little less than seed 1."""
    more = 0.1 * cell.arguments.get("seed", 0)
    if cell.measure is measure_choices:
        return {
            "rules": {rule: position + more for position, rule in enumerate(RULES)},
            "random_share": {f"{share:g}": share + more for share in RANDOM_SHARES},
            "noise": {f"{std:g}": std + more for std in TASKS[cell.arguments["task"]].noise_stds},
        }
    if cell.measure is measure_sensitivity:
        assert cell.arguments["seeds"] == [0, 1]
        return [
            {"inverse_temperature": beta, "max_imitation_weight": ceiling, "mode_std": [0.04, 0.06]}
            | {"actor": [beta, beta + 0.1], "greedy_mode": [5.0, 5.0]}
            | {"active_components": [2.0, 2.0], "clipped_weights": [0.25, 0.25]}
            for beta, ceiling in cell.arguments["settings"]
        ]
    if cell.measure is measure_error_bound:
        return {"discount": 0.9, "worst": [[e, 2 * e] for e in ERRORS], "uniform": [[0.0, e] for e in ERRORS]}
    assert cell.measure is measure_forced_modes
    return [
        {
            "mode_mean": [x, y],
            "mode_std": [0.05, 0.05],
            "tilted_mean": [x, y],
            "action": [x, y - 0.03],
            "reward": reward,
        }
        for x, y, reward in ((-0.8, 0.8, 3.0), (-0.8, -0.8, 0.0), (0.8, 0.8, 1.5), (0.8, -0.8, 5.0))
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "random_mode",
            {
                "bandit4, hyper_q": ("3.050 [3.000, 3.100]", "5"),
                "bandit4, max_alpha": ("2.050 [2.000, 2.100]", "a tie: 0 to 5"),
                "bandit4_skewed, max_alpha": ("2.050 [2.000, 2.100]", "3"),
                "fork, hyper_q minus random_uniform": ("3.000 [3.000, 3.000]", "above 0"),
            },
        ),
        (
            "sensitivity",
            {
                "bandit4, M 10, β 10, C 100": (
                    "actor 10.05 [10.00, 10.10], greedy_mode 5.00 [5.00, 5.00]; σ 0.050; active 2.0; clipped 0.250",
                    "",
                )
            },
        ),
        (
            "corrupted",
            {
                "bandit4, M 4, p = 0.5": ("0.550 [0.500, 0.600]", "3.688 with exact hyper-Q of four modes"),
                "bandit4, M 8, σ = 1": ("1.050 [1.000, 1.100]", "4.829 with exact hyper-Q of four modes"),
                "tabular MDPs, ε = 0.1: worst errors; uniform errors": (
                    "0.2 (median 0.15); 0.1 (median 0.05)",
                    "at most 2",
                ),
                "forced mode: actor's distance from the closed form": ("0.030 (0.030)", "0; mode sd 0.05"),
                "forced mode worth 3: reward of the actor": ("3.000 [3.000, 3.000]", "3, the mode's own"),
            },
        ),
    ],
)
def test_a_report_says_what_was_measured_and_draws_it(
    tmp_path: Path, name: str, expected: dict[str, tuple[str, str]]
) -> None:
    experiment = EXPERIMENTS[name]
    results = [(cell, made_up(cell)) for cell in experiment.cells(2)]
    rows = {measured: (found, known) for measured, found, known in experiment.rows(results)}
    assert {row: rows.get(row) for row in expected} == expected
    experiment.draw(results, tmp_path / "picture.png")
    assert is_drawn(tmp_path / "picture.png")


def test_what_rules_are_worth_on_the_bandit_by_hand() -> None:
    """Corners worth 3, 0, 1.5 and 5; 0.45·3 + 0.1·0 + 0.4·1.5 + 0.05·5 = 2.2."""
    skewed = {rule: value for rule, value in exact_rules((0.45, 0.1, 0.4, 0.05)).items() if value is not None}
    assert skewed == pytest.approx(
        {"random_uniform": 2.375, "random_alpha": 2.2, "max_alpha": 3.0, "hyper_q": 5.0, "oracle": 5.0, "worst": 0.0}
    )
    assert exact_rules((0.25, 0.25, 0.25, 0.25)) == {
        "random_uniform": 2.375,
        "random_alpha": 2.375,
        "max_alpha": None,
        "hyper_q": 5.0,
        "oracle": 5.0,
        "worst": 0.0,
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_cell_has_a_file_of_its_own(name: str) -> None:
    names = [cell.name for cell in EXPERIMENTS[name].cells(3)]
    assert len(names) == len(set(names))
