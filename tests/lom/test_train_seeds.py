"""`lom-train --seeds`: several runs from one command, each as if it had been alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lom import train
from lom.envs.fork import fork_demonstrations
from lom.run import CHECKPOINT_FILE, load_checkpoint, load_run

QUICK = ["--preset", "small", "--mixture-steps", "10", "--steps", "10", "--no-off-policy-evaluation"]
LONGER = ["--mixture-steps", "60", "--steps", "340", "--checkpoint-every", "20"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "fork.npz"
    np.savez(path, **fork_demonstrations(episodes=20, seed=0))  # type: ignore[arg-type]
    return str(path)


def assert_same_tensors(got: Path, expected: Path) -> None:
    (tensors, samples), (expected_tensors, expected_samples) = load_checkpoint(got), load_checkpoint(expected)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert torch.equal(tensor, tensors[name]), name
    assert np.array_equal(samples.held_out, expected_samples.held_out)


def test_every_seed_is_an_ordinary_run_and_the_one_that_it_is_alone(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several, one = tmp_path / "several", tmp_path / "one"
    train.main(
        [dataset, *QUICK, "--env", "lom/Fork-v0", "--eval-episodes", "2", "--seeds", "4:6", "--out", str(several)]
    )
    train.main([dataset, *QUICK, "--env", "lom/Fork-v0", "--eval-episodes", "2", "--seed", "5", "--out", str(one)])
    assert sorted(path.name for path in several.iterdir()) == ["seed-4", "seed-5"]
    run, alone = load_run(several / "seed-5"), load_run(one)
    assert run.spec == alone.spec
    assert run.summary["evaluation"]["variants"].keys() == alone.summary["evaluation"]["variants"].keys()
    assert (several / "seed-5" / "dataset_card.json").read_bytes() == (one / "dataset_card.json").read_bytes()
    assert list((several / "seed-5" / "tensorboard").iterdir())
    (tensors, samples), (expected, expected_samples) = load_checkpoint(several / "seed-5"), load_checkpoint(one)
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4)
    assert np.array_equal(samples.held_out, expected_samples.held_out)
    assert not np.array_equal(samples.held_out, load_checkpoint(several / "seed-4")[1].held_out)
    capsys.readouterr()
    for arguments in (["--seed", "5", "--out", str(several / "seed-5")], ["--seeds", "4:6", "--out", str(several)]):
        train.main([dataset, *QUICK, "--env", "lom/Fork-v0", *arguments, "--resume"])
        assert "finished already" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def uninterrupted(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "runs"
    train.main([dataset, *QUICK, *LONGER, "--seeds", "0:3", "--out", str(out)])
    return out


def steps_done(folder: Path) -> int:
    return int(load_checkpoint(folder)[0]["steps_done"].sum()) if (folder / CHECKPOINT_FILE).exists() else 0


def test_seeds_that_were_killed_resume_to_the_same_result(dataset: str, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    command = [dataset, *QUICK, *LONGER, "--seeds", "0:3", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "lom.train", *command], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 100
    while steps_done(out / "seed-2") < 40:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.05))  # in the middle of a step, or of a save
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    train.main([*command, "--resume"])
    for name in ("seed-0", "seed-1", "seed-2"):
        assert_same_tensors(out / name, uninterrupted / name)
        assert (out / name / "summary.json").is_file()


def test_a_kill_between_two_checkpoints_is_mended(dataset: str, uninterrupted: Path, tmp_path: Path) -> None:
    """As the disk is then: the first seed has its new checkpoint, of the others a whole one lies beside the old one."""
    out, early = tmp_path / "runs", tmp_path / "early"
    shutil.copytree(uninterrupted, out)
    train.main([dataset, *QUICK, "--seeds", "0:3", "--out", str(early)])
    for name in ("seed-1", "seed-2"):
        os.replace(out / name / CHECKPOINT_FILE, out / name / f".{CHECKPOINT_FILE}.partial")
        shutil.copy(early / name / CHECKPOINT_FILE, out / name / CHECKPOINT_FILE)
    (out / "seed-2" / "summary.json").unlink()
    train.main([dataset, *QUICK, *LONGER, "--seeds", "0:3", "--out", str(out), "--resume"])
    for name in ("seed-0", "seed-1", "seed-2"):
        assert_same_tensors(out / name, uninterrupted / name)
        assert not (out / name / f".{CHECKPOINT_FILE}.partial").exists()


def test_a_divergence_names_the_seed_and_leaves_the_last_sound_checkpoints(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--reward-scale", "1e30", "--seeds", "0:2", "--out", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as caught:
        train.main([dataset, *QUICK, *arguments])
    assert caught.value.code == 1
    assert "seed 0: critic/loss: expected a finite value" in " ".join(capsys.readouterr().err.split())
    for name in ("seed-0", "seed-1"):
        tensors = load_checkpoint(tmp_path / "runs" / name)[0]
        assert tensors["steps_done"].tolist() == [10, 0]
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("given", ["8", "0:", "3:3", "5:2", "-1:2", "0:2:4", "a:b"])
def test_other_seeds_are_one_line(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main([dataset, f"--seeds={given}", "--out", str(tmp_path / "runs")])
    assert caught.value.code == 2
    assert "--seeds: expected FIRST:END with FIRST below END" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


def test_seeds_that_do_not_fit_into_memory_are_refused_before_anything_is_written(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "free_memory", lambda device: 1e6)
    with pytest.raises(SystemExit) as caught:
        train.main([dataset, *QUICK, "--seeds", "0:900", "--out", str(tmp_path / "runs")])
    assert caught.value.code == 2
    assert "GB are free: train fewer at once" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()
