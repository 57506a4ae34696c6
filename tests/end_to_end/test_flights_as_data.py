"""What a control loop recorded can be trained on, where its rewards are known."""

from pathlib import Path

import numpy as np
import pytest

from lom import train
from lom.dataset import DatasetError, load_transitions
from lom.run import load_run
from lom_client import ControlLoop, FlightRecorder, LoopConfig, PolicyClient
from tests.support import bundles

OBSERVATIONS = np.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6], [0.7, 0.8, 0.9]], np.float32)
UNHURRIED = LoopConfig(period_s=10, kinds="position", safe_action=[0, 0])


def record(folder: Path, *, rewards: bool, flights: int = 4) -> Path:
    """Flights of three steps; the last one of each reaches a terminal state. Returns the dataset."""
    bundles.write_test_bundle(folder / "bundle")
    with (
        PolicyClient(f"inproc:{folder / 'bundle'}") as client,
        FlightRecorder(folder / "recordings") as recorder,
        ControlLoop(client, UNHURRIED, recorder=recorder) as loop,
    ):
        for _ in range(flights):
            for step, observation in enumerate(OBSERVATIONS):
                loop.step(observation)
                if rewards:
                    recorder.outcome(reward=float(step), terminated=step == 2)
    (dataset,) = (folder / "recordings").glob("flight-*")
    return dataset


def test_a_recorded_flight_is_trained_on(tmp_path: Path) -> None:
    dataset = record(tmp_path, rewards=True)
    transitions = load_transitions([dataset])
    assert transitions.episode_returns.tolist() == [3.0] * 4
    assert transitions.terminals.sum() == 4
    np.testing.assert_array_equal(transitions.observations[:3], OBSERVATIONS)
    np.testing.assert_array_equal(transitions.next_actions[0], transitions.actions[1])
    assert transitions.action_high.tolist() == [1.0, 1.0]  # the bundle's bounds travel with the recording
    out = tmp_path / "run"
    train.main([str(dataset), "--out", str(out), "--preset", "small", "--mixture-steps", "5", "--steps", "5"])
    assert load_run(out).spec.datasets == (dataset.name,)


def test_a_flight_without_rewards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"rewards: expected known ones, .* rewards_known: false"):
        load_transitions([record(tmp_path, rewards=False)])
