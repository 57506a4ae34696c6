"""The two distances that a robot can be warned by: calibrated on episodes, and honest about them."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lom.config import TrainConfig
from lom.run import load_run
from lom_export.state_score import conformal_quantile, fit_state_score
from lom_export.warning_scores import calibrate
from tests.support.runs import save_untrained_run

Array = NDArray[np.float32]


def ring(rows: int, seed: int) -> Array:
    """Points on a noisy circle in 4 dimensions, two of them copies: structured, with an empty middle."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, rows)
    plane = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.sqrt(2) + 0.05 * rng.standard_normal((rows, 2))
    return np.concatenate([plane, plane], axis=1).astype(np.float32)


def episodes_of(rows: int, length: int = 20) -> NDArray[np.int32]:
    return (np.arange(rows) // length).astype(np.int32)


@pytest.fixture(scope="module")
def fitted() -> tuple[torch.nn.Module, float]:
    return fit_state_score(ring(3000, 0), episodes_of(3000), false_alarm_rate=0.01, seed=0)


def share_flagged(fitted: tuple[torch.nn.Module, float], rows: Array) -> float:
    score, threshold = fitted
    with torch.no_grad():
        return float((score(torch.from_numpy(rows)) > threshold).float().mean())


def test_false_alarms_on_new_episodes_are_inside_the_binomial_interval(fitted: tuple[torch.nn.Module, float]) -> None:
    rows = 20_000
    # Threshold and test rows are both samples; the threshold's part dominates (3,000 rows).
    tolerance = 4 * sqrt(0.01 * 0.99 * (1 / rows + 1 / 3000))
    assert share_flagged(fitted, ring(rows, 1)) == pytest.approx(0.01, abs=tolerance)


@pytest.mark.parametrize(
    ("corruption", "at_least"),
    [
        (lambda rows: rows * 2, 0.99),
        (lambda rows: rows * np.float32(57.3), 0.99),
        (lambda rows: rows * np.array([1, 1, 1, -1], np.float32), 0.9),  # one sign: the copies disagree
        (lambda rows: rows * 0, 0.99),  # the middle, where no data is and every dimension is in range
        (lambda rows: rows + np.array([3, 0, 0, 0], np.float32), 0.99),
        (lambda rows: np.where([True, False, False, False], rows[:1], rows), 0.8),  # a frozen sensor with a witness
        (lambda rows: np.full_like(rows, 1e30), 1.0),
        (lambda rows: np.full_like(rows, -1e30), 1.0),
    ],
)
def test_what_the_data_never_showed_is_flagged(
    fitted: tuple[torch.nn.Module, float], corruption: object, at_least: float
) -> None:
    assert share_flagged(fitted, corruption(ring(4000, 2)).astype(np.float32)) >= at_least  # type: ignore[operator]


def test_numbers_beyond_float32s_squares_are_flagged_without_becoming_nan(
    fitted: tuple[torch.nn.Module, float],
) -> None:
    score, threshold = fitted
    with torch.no_grad():
        scores = score(torch.tensor([[3e38, -3e38, 3e38, -3e38], [-3e38] * 4, [1e20, 0.0, 0.0, -1e20]]))
    assert torch.isfinite(scores).all()
    assert (scores > threshold).all()


def test_episodes_that_differ_from_each_other_raise_the_threshold() -> None:
    """Judged by rows, such data would look well known, and every new episode would raise an alarm throughout."""

    def wandering(seed: int, episodes: int = 16, length: int = 40) -> Array:
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((episodes, 1, 3))
        rows: Array = (centres + 0.05 * rng.standard_normal((episodes, length, 3))).reshape(-1, 3).astype(np.float32)
        return rows

    rows, new = wandering(0), wandering(1)
    by_episode = fit_state_score(rows, episodes_of(len(rows), 40), false_alarm_rate=0.01, seed=0)
    as_one = fit_state_score(rows, np.zeros(len(rows), np.int32), false_alarm_rate=0.01, seed=0)
    assert share_flagged(by_episode, new) < 0.3
    assert share_flagged(as_one, new) > 0.6


def test_the_same_seed_gives_the_same_score() -> None:
    rows, episodes = ring(400, 3), episodes_of(400)
    (first, t1), (second, t2) = (fit_state_score(rows, episodes, false_alarm_rate=0.01, seed=5) for _ in range(2))
    assert t1 == t2
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((50, 1), np.float32),
        np.ones((50, 3), np.float32),
        np.tile(np.array([[1.0, 2.0]], np.float32), (2, 1)),
        np.arange(60, dtype=np.float32).reshape(20, 3) % 4,
        np.random.default_rng(0).standard_normal((5, 30)).astype(np.float32),
    ],
    ids=["one constant", "all constant", "two rows", "integers", "fewer rows than dimensions"],
)
def test_degenerate_data_gives_finite_scores_that_still_rise(rows: Array) -> None:
    score, threshold = fit_state_score(rows, episodes_of(len(rows), 1), false_alarm_rate=0.01, seed=0)
    with torch.no_grad():
        near, far = score(torch.from_numpy(rows)), score(torch.from_numpy(rows + 50))
    assert np.isfinite(threshold)
    assert torch.isfinite(near).all()
    assert (far > threshold).all()


def test_conformal_quantile_by_hand() -> None:
    scores = np.arange(1.0, 100.0)  # 1 to 99: ⌈100 · 0.99⌉ = 99th
    assert conformal_quantile(scores, 0.01) == 99.0
    assert conformal_quantile(scores, 0.1) == 90.0
    assert conformal_quantile(np.array([3.0, 1.0]), 0.01) == 3.0  # too few for 1 %: the largest


def test_thresholds_come_from_held_out_episodes_and_are_checked_there(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run")
    trained = load_run(tmp_path / "run")
    score, warnings = calibrate(
        trained.policy, trained.samples, ("greedy_mode", "actor"), false_alarm_rate=0.05, seed=0
    )
    assert score is not None
    assert set(warnings) == {"state_score", "action_score"}
    for name, warning in warnings.items():
        assert warning.held_out_rows == 500
        assert warning.held_out_episodes == 10
        for variant in ("greedy_mode", "actor"):
            tolerance = 4 * sqrt(0.05 * 0.95 * 2 / 500)
            assert warning.held_out_false_alarms[variant] == pytest.approx(0.05, abs=tolerance), (name, variant)


def test_without_held_out_episodes_nothing_is_claimed_to_be_measured(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run")
    samples = load_run(tmp_path / "run").samples
    bare = type(samples)(
        trained_on=samples.trained_on,
        trained_on_episodes=samples.trained_on_episodes,
        held_out=samples.held_out[:0],
        held_out_episodes=samples.held_out_episodes[:0],
    )
    policy = load_run(tmp_path / "run").policy
    _, warnings = calibrate(policy, bare, ("actor",), false_alarm_rate=0.01, seed=0)
    assert warnings["state_score"].held_out_false_alarms == {}
    assert "nothing was held out" in warnings["action_score"].calibration


def test_one_episode_cannot_be_calibrated_on(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run", config=TrainConfig(mixture_steps=5, steps=4, num_components=1))
    trained = load_run(tmp_path / "run")
    samples = trained.samples
    single = type(samples)(
        trained_on=samples.trained_on,
        trained_on_episodes=samples.trained_on_episodes * 0,
        held_out=samples.held_out[:0],
        held_out_episodes=samples.held_out_episodes[:0],
    )
    assert calibrate(trained.policy, single, ("actor",), false_alarm_rate=0.01, seed=0) == (None, {})
