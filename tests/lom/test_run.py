import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lom.config import TrainConfig
from lom.run import (
    CHECKPOINT_FILE,
    RUN_FILE,
    RunError,
    RunSpec,
    create_run,
    load_run,
    open_run,
    save_checkpoint,
)
from tests.support.runs import samples_of, save_untrained_run

SPEC = RunSpec(
    env="lom/Fork-v0",
    datasets=("fork.npz",),
    dataset_fingerprint="0" * 64,
    dataset_rows=10,
    observation_low=(-1.5, -math.inf),
    observation_high=(1.5, math.inf),
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
    config=TrainConfig(hidden=(4,), mixture_hidden=(4,), num_components=2),
)


def test_the_description_survives_the_disk_as_strict_json(tmp_path: Path) -> None:
    create_run(tmp_path / "run", SPEC)
    text = (tmp_path / "run" / RUN_FILE).read_text()
    assert "Infinity" not in text
    assert open_run(tmp_path / "run") == SPEC


def test_an_existing_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RunError, match="expected a new folder"):
        create_run(tmp_path / "run", SPEC)
    assert list((tmp_path / "run").iterdir()) == []


def test_what_a_killed_start_left_is_in_nobodys_way(tmp_path: Path) -> None:
    left = tmp_path / ".run.partial"
    left.mkdir()
    (left / "half").touch()
    create_run(tmp_path / "run", SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_FILE]


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        create_run(tmp_path / "file" / "run", SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    samples = samples_of(np.zeros((6, 2), np.float32))
    save_checkpoint(tmp_path, {"a": torch.ones(1)}, samples)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    (tmp_path / f".{CHECKPOINT_FILE}.partial").mkdir()  # the next save cannot write its file
    with pytest.raises((RunError, OSError)):
        save_checkpoint(tmp_path, {"a": torch.zeros(1)}, samples)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before


def test_the_loaded_policy_is_the_saved_one(tmp_path: Path) -> None:
    policy = save_untrained_run(tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    observations = torch.randn(5, 2)
    with torch.no_grad():
        for variant in ("greedy_mode", "actor", "bc"):
            assert torch.equal(loaded.policy(observations, variant)["action"], policy(observations, variant)["action"])
    assert loaded.samples.trained_on.shape == (2500, 2)
    assert loaded.samples.held_out.shape == (500, 2)


def test_unfinished_training_is_no_result(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run", steps_done=(3, 1))
    with pytest.raises(RunError, match="expected finished training, got 3 of 5 mixture steps and 1 of 4 policy steps"):
        load_run(tmp_path / "run")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT_FILE
    tensors = load_file(path)
    tensors["policy.actor.body.0.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(RunError, match=r"actor\.body\.0\.weight: expected finite values"):
        load_run(tmp_path / "run")


def test_missing_normaliser_statistics_are_refused(tmp_path: Path) -> None:
    save_untrained_run(tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT_FILE
    tensors = load_file(path)
    del tensors["policy.normaliser.mean"]
    save_file(tensors, path)
    with pytest.raises(RunError, match="do not belong to"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04pickle"])
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    save_untrained_run(tmp_path / "run")
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(RunError, match="damaged or foreign"):
        load_run(tmp_path / "run")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a training run \(a folder with run.json\), found none"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.pop("action_low"),
        lambda document: document.update(schema_version=99),
        lambda document: document.update(surprise=1),
        lambda document: document["config"].update(steps=0),
        lambda document: document.update(observation_low=3),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, damage: object) -> None:
    create_run(tmp_path / "run", SPEC)
    path = tmp_path / "run" / RUN_FILE
    document = json.loads(path.read_text())
    damage(document)  # type: ignore[operator]
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match=RUN_FILE):
        open_run(tmp_path / "run")


def test_another_seed_is_another_run() -> None:
    assert replace(SPEC, config=replace(SPEC.config, seed=1)) != SPEC
