"""`lom-act replay` says whether a policy still answers as it did, and is not fooled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lom_api.recording import Golden, read_recording
from lom_client import ControlLoop, FlightRecorder, LoopConfig, PolicyClient, PolicyError
from lom_client.main import main
from lom_client.replay import DEFAULT_GOLDEN, ReplayReport, golden_of, replay
from tests.clients import toy_environments  # noqa: F401  registers Toy-v0
from tests.support import bundles


@pytest.fixture(scope="module")
def changed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every component's mean is 0.1 higher: a twentieth of the range of 2."""
    path = tmp_path_factory.mktemp("bundles") / "changed"
    bundles.write_test_bundle(path, flaws=bundles.Flaws(action_offset=0.1))
    return path


@pytest.fixture(scope="module")
def flown(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of four steps."""
    folder = tmp_path_factory.mktemp("flights")
    assert main(["--target", f"inproc:{bundle}", "--env", "Toy-v0", "--episodes", "3", "--record", str(folder)]) == 0
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def copied(flown: Path, tmp_path: Path) -> Path:
    """To be tampered with."""
    return Path(shutil.copytree(flown, tmp_path / flown.name))


def compared(path: Path, bundle: Path, golden: Golden | None = None) -> ReplayReport:
    recording = read_recording(path)
    target = f"inproc:{bundle}"
    with PolicyClient(target) as client:
        return replay(recording, client, golden=golden or golden_of(recording, target), deadline_s=10)


def test_the_same_bundle_answers_alike(flown: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(flown), "--target", f"inproc:{bundle}"]) == 0
    printed = capsys.readouterr().out
    assert "compared                  │       12" in printed
    assert "the same" in printed
    report = compared(flown, bundle)
    assert (report.steps, report.compared, report.within, report.ties) == (15, 12, 12, 0)
    assert (report.largest_difference, report.first_difference) == (0, None)
    assert report.reproduces
    assert report.has_same_bundle


@pytest.mark.parametrize("place", ["main_data.hdf5", "data", "the folder of all recordings"])
def test_a_recording_is_found_by_any_of_its_names(copied: Path, bundle: Path, place: str) -> None:
    path = {"main_data.hdf5": copied / "data" / place, "data": copied / "data"}.get(place, copied.parent)
    assert main(["replay", str(path), "--target", f"inproc:{bundle}"]) == 0


def test_a_changed_bundle_is_found_out(flown: Path, changed_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(flown), "--target", f"inproc:{changed_bundle}"]) == 1
    assert "another" in capsys.readouterr().out
    report = compared(flown, changed_bundle)
    assert (report.compared, report.within) == (12, 0)
    assert report.largest_difference == pytest.approx(0.05)
    assert report.first_difference is not None
    assert (report.first_difference.episode, report.first_difference.step) == (0, 0)
    np.testing.assert_allclose(report.first_difference.replayed, np.add(report.first_difference.recorded, 0.1))
    assert not report.has_same_bundle


def test_a_wider_tolerance_lets_it_pass(flown: Path, changed_bundle: Path) -> None:
    arguments = ["replay", str(flown), "--target", f"inproc:{changed_bundle}", "--tolerance"]
    assert main([*arguments, "0.0501"]) == 0
    assert main([*arguments, "0.0499"]) == 1


def test_one_perturbed_action_is_found_out(copied: Path, bundle: Path) -> None:
    with h5py.File(copied / "data" / "main_data.hdf5", "r+") as file:
        action = file["episode_1/infos/policy_action"]
        action[2] = action[2] + np.array([0, 4e-6], np.float32)
    report = compared(copied, bundle, golden=Golden(action_tolerance=1e-6, tie_width=0))
    assert (report.compared, report.within) == (12, 11)
    assert report.largest_difference == pytest.approx(2e-6, rel=0.1)
    assert report.first_difference is not None
    assert (report.first_difference.episode, report.first_difference.step) == (1, 2)


def test_another_mode_is_a_difference_unless_it_was_a_tie(copied: Path, bundle: Path) -> None:
    with h5py.File(copied / "data" / "main_data.hdf5", "r+") as file:
        infos = file["episode_2/infos"]
        infos["mode"][1] = (infos["mode"][1] + 1) % 3
        infos["margin"][1] = 1e-4
    report = compared(copied, bundle, golden=Golden(action_tolerance=1e-6, tie_width=9e-5))
    assert (report.within, report.ties, report.reproduces) == (11, 0, False)
    report = compared(copied, bundle, golden=Golden(action_tolerance=1e-6, tie_width=2e-4))
    assert (report.within, report.ties, report.reproduces) == (12, 1, True)


def test_the_tolerance_is_the_bundles(flown: Path, bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())["golden"]
    expected = Golden(action_tolerance=manifest["action_tolerance"], tie_width=manifest["tie_width"])
    recording = read_recording(flown)
    assert golden_of(recording, f"inproc:{bundle}") == expected != DEFAULT_GOLDEN
    assert golden_of(recording, "grpc://127.0.0.1:1") == DEFAULT_GOLDEN


def test_a_loop_that_does_not_wait_is_compared_with_the_observation_that_was_answered(
    bundle: Path, changed_bundle: Path, tmp_path: Path
) -> None:
    """Answers are a tick late, hysteresis goes by the mode that acted, and commands are slewed: none of it is a
    difference."""
    config = LoopConfig(
        period_s=0.02,
        kinds="position",
        safe_action=[0, 0],
        slew_per_s=0.1,
        deadline_s=0,
        max_age_s=1,
        hold_limit=1000,
        stop_limit=2000,
        hysteresis_width=0.5,
    )
    generator = np.random.default_rng(0)
    with (
        PolicyClient(f"inproc:{bundle}") as client,
        FlightRecorder(tmp_path) as recorder,
        ControlLoop(client, config, recorder=recorder) as loop,
    ):
        for _ in loop.ticks():
            loop.step(generator.uniform(-1, 1, 3))
            if loop.counters.fresh >= 40:
                break
    with h5py.File(read_recording(tmp_path).path / "data" / "main_data.hdf5") as file:
        infos = [episode["infos"] for episode in file.values()]
        lags = np.concatenate([(said["sequence"][()] - said["answers"][()])[said["is_answered"][()]] for said in infos])
    assert (lags > 0).mean() > 0.9
    report = compared(tmp_path, bundle)
    assert report.reproduces
    assert report.compared >= 20
    assert not compared(tmp_path, changed_bundle).reproduces


def test_what_a_killed_process_left_is_finished_first(bundle: Path, tmp_path: Path) -> None:
    config = LoopConfig(period_s=10, kinds="position", safe_action=[0, 0])
    with (
        PolicyClient(f"inproc:{bundle}") as client,
        FlightRecorder(tmp_path, finishes=False) as recorder,
        ControlLoop(client, config, recorder=recorder) as loop,
    ):
        for row in bundles.golden_observations()[:5]:
            loop.step(row)
    (spool,) = tmp_path.iterdir()
    assert main(["replay", str(spool), "--target", f"inproc:{bundle}"]) == 0
    assert not spool.exists()


def _empty(path: Path) -> str:
    shutil.rmtree(path)
    return "expected the folder of a recording, found none"


def _foreign(path: Path) -> str:
    metadata = path / "data" / "metadata.json"
    document = json.loads(metadata.read_text())
    del document["lom_recording"]
    metadata.write_text(json.dumps(document))
    return "expected a dataset that was recorded with --record"


def _damaged(path: Path) -> str:
    (path / "data" / "main_data.hdf5").write_bytes(b"HDF?")
    return "it is damaged"


def _unanswered(path: Path) -> str:
    with h5py.File(path / "data" / "main_data.hdf5", "r+") as file:
        for episode in file.values():
            episode["infos/is_answered"][:] = False
    return "the recording holds no answer to compare"


@pytest.mark.parametrize("spoil", [_empty, _foreign, _damaged, _unanswered])
def test_what_cannot_be_replayed_is_one_line(
    copied: Path, bundle: Path, spoil: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = spoil(copied)
    assert main(["replay", str(copied), "--target", f"inproc:{bundle}"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("lom-act replay: ")
    assert said in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["--deadline-s", "0"], ["--tolerance", "-1"], ["--tie-width", "nan"], ["--target", "nowhere"]]
)
def test_wrong_use_is_one_line(flown: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(flown), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_server_that_is_not_there_fails_the_replay(flown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(flown), "--target", "unix:/tmp/nobody-listens-here", "--deadline-s", "0.2"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_policy_of_other_actions_is_refused(copied: Path, bundle: Path) -> None:
    metadata = copied / "data" / "metadata.json"
    document: dict[str, Any] = json.loads(metadata.read_text())
    document["action_space"] = json.dumps({"low": [0.0], "high": [1.0]})
    metadata.write_text(json.dumps(document))
    with pytest.raises(PolicyError, match="SPACE_MISMATCH: action: the recording has 1 elements, the policy 2"):
        compared(copied, bundle)
