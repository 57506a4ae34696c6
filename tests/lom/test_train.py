"""`lom-train` as a user meets it: files in, a run out, or one line that says what was wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lom import train
from lom.envs.fork import fork_demonstrations
from lom.run import load_checkpoint, load_run

QUICK = ["--preset", "small", "--mixture-steps", "30", "--steps", "30", "--eval-episodes", "2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "fork.npz"
    np.savez(path, **fork_demonstrations(episodes=20, seed=0))  # type: ignore[arg-type]
    return path


def test_a_run_holds_policy_curves_and_evaluation(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train.main([str(dataset), "--env", "lom/Fork-v0", "--out", str(out), *QUICK])
    trained = load_run(out)
    assert trained.spec.config.num_components == 8  # from the preset
    assert trained.spec.config.steps == 30  # from the flag
    assert set(trained.summary["evaluation"]["variants"]) == {"greedy_mode", "actor", "bc"}
    curves = EventAccumulator(str(out / "tensorboard"))
    curves.Reload()
    assert {"mixture/nll", "critic/loss", "hyper_critic/mask_overruled"} <= set(curves.Tags()["scalars"])


def test_datasets_may_be_given_both_ways(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train.main([str(dataset), "--dataset", str(dataset), "--out", str(out), *QUICK])
    trained = load_run(out)
    assert trained.spec.datasets == ("fork.npz", "fork.npz")
    assert trained.spec.env is None
    assert trained.summary["evaluation"] == {}


STEPS = [100, 900]


@pytest.fixture(scope="module")
def settings(dataset: Path) -> list[str]:
    """A run long enough to be stopped, with a checkpoint every 50 steps."""
    steps = ["--mixture-steps", str(STEPS[0]), "--steps", str(STEPS[1]), "--checkpoint-every", "50"]
    return [str(dataset), "--preset", "small", *steps, "--no-off-policy-evaluation"]


@pytest.fixture(scope="module")
def uninterrupted(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint of that run when nothing stops it."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.main([*settings, "--out", str(out)])
    return load_checkpoint(out)[0]


def start(settings: list[str], out: Path, *more: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "lom.train", *settings, "--out", str(out), *more], stderr=subprocess.PIPE
    )


def wait_for_step(process: "subprocess.Popen[bytes]", out: Path, step: int) -> None:
    """Until a checkpoint says that so many steps of both stages were done, or the run was begun where it is 0."""
    deadline = time.monotonic() + 100
    while not (out / "run.json").exists() if step == 0 else steps_done(out) < step:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def steps_done(out: Path) -> int:
    return int(load_checkpoint(out)[0]["steps_done"].sum()) if (out / "checkpoint.safetensors").exists() else 0


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_a_terminated_run_saves_the_step_in_hand_and_resumes_to_the_same_result(
    settings: list[str], uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(settings, out)
    wait_for_step(process, out, 50)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"--resume goes on" in stderr
    assert steps_done(out) < sum(STEPS)
    train.main([*settings, "--out", str(out), "--resume"])
    assert_same_tensors(load_checkpoint(out)[0], uninterrupted)


def test_a_run_killed_at_random_steps_resumes_to_the_same_result(
    settings: list[str], uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out, rng = tmp_path / "run", random.Random()
    middle = rng.randrange(1, sum(STEPS) - 400)
    for resume, step in (([], 0), (["--resume"], middle)):
        process = start(settings, out, *resume)
        wait_for_step(process, out, step)
        time.sleep(rng.uniform(0, 0.05))  # in the middle of a step, or of a save
        process.kill()
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, stderr
    assert middle <= steps_done(out) < sum(STEPS)
    train.main([*settings, "--out", str(out), "--resume"])
    assert_same_tensors(load_checkpoint(out)[0], uninterrupted)
    assert (out / "summary.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_resuming_with_other_settings_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train.main([str(dataset), "--out", str(out), *QUICK])
    with pytest.raises(SystemExit) as caught:
        train.main([str(dataset), "--out", str(out), *QUICK, "--seed", "1", "--resume"])
    assert caught.value.code == 2
    assert "expected the data, environment and settings that it began with" in capsys.readouterr().err


def test_resuming_what_is_finished_changes_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(dataset), "--out", str(tmp_path / "run"), *QUICK]
    train.main(command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    train.main([*command, "--resume"])
    assert "finished already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.npz", "--env", "lom/Fork-v0"], "gone.npz: expected a file, found none"),
        (["--env", "lom/Fork-v0"], "expected at least one dataset file"),
        (["DATA", "--env", "Hopper-v4"], "expected shape"),
        (["DATA", "--env", "lom/Spoon-v0"], "lom/Spoon-v0"),
        (["DATA", "--preset", "huge"], "--preset: expected one of ["),
        (["DATA", "--steps", "0"], "steps: expected 1 or more, got 0"),
        (["DATA", "--eval-episodes", "0"], "--eval-episodes: expected 1 or more, got 0"),
        (["DATA", "--discount", "nan"], "discount: expected 0 to 1, got nan"),
        (["DATA", "--steps", "many"], "many"),
        (["DATA", "--resume"], "expected a training run"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        train.main([*(str(dataset) if word == "DATA" else word for word in arguments), "--out", str(out)])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in (printed.err + printed.out).replace("\n", " ")
    assert "Traceback" not in printed.err
    assert not out.exists()


def test_an_existing_folder_is_refused_before_the_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["gone.npz", "--out", str(tmp_path)])
    assert "expected a new folder" in capsys.readouterr().err.replace("\n", " ")


def test_strict_refuses_actions_outside_the_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = fork_demonstrations(episodes=3, seed=0)
    arrays["actions"] = arrays["actions"] * 2
    np.savez(tmp_path / "wild.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "wild.npz"), "--out", str(tmp_path / "run"), "--strict", *QUICK])
    assert "refused because of --strict" in capsys.readouterr().err.replace("\n", " ")
    train.main([str(tmp_path / "wild.npz"), "--out", str(tmp_path / "run"), *QUICK])
    assert "were clipped" in capsys.readouterr().err.replace("\n", " ")


def test_the_summary_is_strict_json(dataset: Path, tmp_path: Path) -> None:
    train.main([str(dataset), "--out", str(tmp_path / "run"), *QUICK])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["metrics"]["critic/loss"] > 0
