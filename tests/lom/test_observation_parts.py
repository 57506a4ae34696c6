"""A dict observation is the same vector in the data, in the environment and in the bundle."""

import json
from pathlib import Path

import numpy as np
import pytest

from lom import train
from lom.evaluation import UnsuitableEnvError, env_spaces, make_env
from lom.observation_parts import choose_keys, element_names, flatten_observation, leaves
from lom.run import open_run
from lom_bundle import read_bundle
from lom_export.exporter import ExportConfig, export_run
from tests.support import goal_reach
from tests.support.datasets import box, write_arrays, write_minari

QUICK = ["--preset", "small", "--mixture-steps", "3", "--steps", "3", "--eval-episodes", "1"]
PARTS = (("observation", 2), ("desired_goal", 1))


@pytest.fixture(autouse=True)
def _registered() -> None:
    goal_reach.register()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_minari(tmp_path / "reach-v0", goal_reach.episodes(12), action_space=box([-0.5], [0.5]))


@pytest.mark.parametrize(
    ("present", "asked", "chosen"),
    [
        (["b", "a"], [], ("a", "b")),
        (["achieved_goal", "desired_goal", "observation"], [], ("observation", "desired_goal")),
        (["desired_goal", "extra", "observation"], [], ("observation", "desired_goal")),
        (["desired_goal", "position"], [], ("desired_goal", "position")),
        (["a", "b", "c"], ["c", "a"], ("c", "a")),
    ],
)
def test_the_order_is_asked_for_or_known(present: list[str], asked: list[str], chosen: tuple[str, ...]) -> None:
    assert choose_keys(present, asked) == chosen


@pytest.mark.parametrize("asked", [["d"], ["a", "a"]])
def test_what_cannot_be_meant_is_refused(asked: list[str]) -> None:
    with pytest.raises(ValueError, match="observation keys: expected"):
        choose_keys(["a", "b"], asked)


def test_parts_name_every_element_and_nested_ones_by_their_path() -> None:
    assert element_names((("arm/joints", 2), ("goal", 1))) == ("arm/joints[0]", "arm/joints[1]", "goal[0]")
    observation = {"arm": {"joints": [[1.0], [2.0]], "torque": 9.0}, "goal": 3.0}
    assert list(leaves(observation)) == ["arm/joints", "arm/torque", "goal"]
    assert flatten_observation(observation, ["goal", "arm/joints"]).tolist() == [3.0, 1.0, 2.0]


def test_an_environment_gives_the_vector_that_its_parts_describe() -> None:
    spaces = env_spaces(goal_reach.ENV_ID)
    assert spaces.observation_parts == PARTS
    assert spaces.observation_low.tolist() == [-np.inf, -np.inf, -2.0]
    env, raw = make_env(goal_reach.ENV_ID), goal_reach.GoalReachEnv()
    goal = raw.reset(seed=5)[0]["desired_goal"][0]
    assert env.reset(seed=5)[0].tolist() == [0.0, 0.0, goal]
    assert env.step(np.array([0.25], np.float32))[0].tolist() == [0.25, 0.25, goal]
    reverse = make_env(goal_reach.ENV_ID, ["desired_goal", "achieved_goal"])
    assert reverse.reset(seed=5)[0].tolist() == [goal, 0.0]
    with pytest.raises(
        UnsuitableEnvError, match=r"GoalReach-v0': observation space: observation keys: expected some of"
    ):
        make_env(goal_reach.ENV_ID, ["camera"])


def test_the_order_of_the_data_is_written_into_the_run(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.main([str(dataset), "--env", goal_reach.ENV_ID, "--out", str(run), *QUICK])
    assert open_run(run).observation_parts == PARTS
    assert json.loads((run / "run.json").read_text())["observation_parts"] == [["observation", 2], ["desired_goal", 1]]
    card = json.loads((run / "dataset_card.json").read_text())
    assert [dimension["name"] for dimension in card["observation_dimensions"]] == [*element_names(PARTS)]


def test_an_order_that_was_asked_for_holds_for_environment_run_and_bundle(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = ["--observation-keys", "desired_goal", "observation"]
    train.main([str(dataset), "--env", goal_reach.ENV_ID, "--out", str(run), *QUICK, *keys])
    assert open_run(run).observation_keys == ("desired_goal", "observation")
    export_run(ExportConfig(run=run, out=tmp_path / "bundle", env=goal_reach.ENV_ID, episodes=1))
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert manifest.inputs[0].element_names == ("desired_goal[0]", "observation[0]", "observation[1]")


def test_a_run_is_resumed_in_its_own_order_only(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(dataset), "--out", str(tmp_path / "run"), *QUICK]
    train.main([*command, "--observation-keys", "observation", "desired_goal"])
    with pytest.raises(SystemExit):
        train.main([*command, "--observation-keys", "observation", "achieved_goal", "--resume"])
    assert "expected the data, environment and settings that it began with" in capsys.readouterr().err


def test_data_with_other_parts_than_the_environment_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = {"observation": np.zeros((4, 1)), "desired_goal": np.zeros((4, 2))}
    arrays = {"actions": np.zeros((4, 1)), "rewards": np.zeros(4), "terminals": np.ones(4)}
    path = write_arrays(tmp_path / "swapped.npz", {**arrays, "observations": swapped, "next_observations": swapped})
    with pytest.raises(SystemExit) as caught:
        train.main([str(path), "--env", goal_reach.ENV_ID, "--out", str(tmp_path / "run"), *QUICK])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "observations: expected the environment's parts (('observation', 2), ('desired_goal', 1)), got" in said
