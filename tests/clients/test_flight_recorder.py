"""A loop's flight is in a dataset afterwards; the loop itself notices nothing of it."""

import json
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lom_api.recording import RecordingError, finish_recordings
from lom_api.recording.recorder import FLUSH_S
from lom_api.recording.spool import read_spool
from lom_client import (
    ControlLoop,
    Flag,
    FlightRecorder,
    Level,
    LoopConfig,
    LoopEvent,
    PolicyClient,
    PolicyProcess,
    RecordingEnded,
    Source,
)
from lom_client.main import main
from tests.clients import toy_environments
from tests.support import bundles
from tests.support.servers import wait_until

UNHURRIED = LoopConfig(period_s=10, kinds="position", safe_action=[0, 0], slew_per_s=0.005)
OBSERVATIONS = np.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6], [0.7, 0.8, 0.9], [-0.1, -0.3, -0.2]], np.float32)


@pytest.fixture
def client(target: str) -> Iterator[PolicyClient]:
    with PolicyClient(target) as client:
        client.get_spec(deadline_s=10)
        yield client


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metadata and episodes of the only dataset in `folder`."""
    (path,) = folder.glob("flight-*-v0")
    metadata = json.loads((path / "data" / "metadata.json").read_text())
    with h5py.File(path / "data" / "main_data.hdf5") as file:
        assert sorted(file) == sorted(f"episode_{number}" for number in range(metadata["total_episodes"]))
        episodes = [_plain(file[f"episode_{number}"]) for number in range(metadata["total_episodes"])]
    assert sum(len(episode["actions"]) for episode in episodes) == metadata["total_steps"]
    for episode in episodes:
        steps = len(episode["actions"])
        assert len(episode["observations"]) == steps + 1
        assert {len(values) for values in episode["infos"].values()} == {steps + 1}
        assert episode["terminations"][-1] or episode["truncations"][-1]
    return metadata, episodes


def _plain(group: Any) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, h5py.Group) else value[()] for key, value in group.items()}


def test_a_flight_becomes_a_dataset(client: PolicyClient, tmp_path: Path) -> None:
    """The command may move by 0.05 a tick: what was put out is not what the policy said, and both are recorded."""
    began_s = time.time()
    with FlightRecorder(tmp_path / "f") as recorder, ControlLoop(client, UNHURRIED, recorder=recorder) as loop:
        actions = [loop.step(row, measured=[0, 0]) for row in OBSERVATIONS]
    assert (recorder.recorded, recorder.dropped, recorder.failure) == (4, 0, "")
    metadata, (episode,) = read(tmp_path / "f")
    infos = episode["infos"]
    np.testing.assert_array_equal(episode["observations"], OBSERVATIONS)
    np.testing.assert_array_equal(episode["actions"], [action.values for action in actions[:3]])
    np.testing.assert_array_equal(infos["policy_action"], bundles.greedy_action(OBSERVATIONS))
    assert np.abs(episode["actions"]).max() <= 0.15
    np.testing.assert_array_equal(infos["mode"], bundles.greedy_mode(OBSERVATIONS))
    np.testing.assert_allclose(infos["margin"], bundles.greedy_margin(OBSERVATIONS), atol=1e-6)
    np.testing.assert_array_equal(infos["flags"], [int(action.flags) for action in actions])
    assert all(action.flags & Flag.SLEW_LIMITED for action in actions)
    np.testing.assert_allclose(infos["age_s"], np.array([action.age_s for action in actions], np.float64))
    assert infos["sequence"].tolist() == infos["answers"].tolist() == [1, 2, 3, 4]
    assert set(infos["bundle_digest"]) == {actions[0].bundle_digest.encode()}
    assert [set(infos[name]) for name in ("variant", "level", "source")] == [{b"greedy_mode"}, {b"nominal"}, {b"fresh"}]
    assert (np.diff(infos["monotonic_s"]) > 0).all()
    assert began_s - 1 < infos["wall_time_s"][0] < time.time() + 1
    assert metadata["rewards_known"] is False
    assert (metadata["total_episodes"], metadata["total_steps"], metadata["data_format"]) == (1, 3, "hdf5")
    assert json.loads(metadata["action_space"]) == {
        "type": "Box",
        "dtype": "float32",
        "shape": [2],
        "low": [-1.0, -1.0],
        "high": [1.0, 1.0],
    }


def test_a_process_that_asks_says_as_much_as_a_thread(target: str, tmp_path: Path) -> None:
    with FlightRecorder(tmp_path) as recorder, ControlLoop(PolicyProcess(target=target), UNHURRIED, recorder=recorder):
        pass
    assert not list(tmp_path.iterdir())  # not a step: no dataset, and nothing left
    with (
        FlightRecorder(tmp_path) as recorder,
        ControlLoop(PolicyProcess(target=target), UNHURRIED, recorder=recorder) as loop,
    ):
        for row in OBSERVATIONS:
            assert loop.step(row).source is Source.FRESH
    _, (episode,) = read(tmp_path)
    assert set(episode["infos"]["variant"]) == {b"greedy_mode"}
    np.testing.assert_allclose(episode["infos"]["margin"], bundles.greedy_margin(OBSERVATIONS), atol=1e-6)


def test_whoever_knows_the_outcome_says_it(client: PolicyClient, tmp_path: Path) -> None:
    with FlightRecorder(tmp_path) as recorder, ControlLoop(client, UNHURRIED, recorder=recorder) as loop:
        loop.step(OBSERVATIONS[0])
        recorder.outcome(reward=1.0)
        loop.step(OBSERVATIONS[1])
        recorder.outcome(reward=2.0, terminated=True, final_observation=[9, 9, 9])
        loop.step(OBSERVATIONS[2])
        recorder.outcome(reward=3.0)
        loop.step(OBSERVATIONS[3])
        recorder.outcome(reward=4.0, truncated=True)  # what came then is not known: its action leads nowhere
        loop.step(OBSERVATIONS[0])
        recorder.outcome(reward=5.0, terminated=True)  # what came then does not matter
    metadata, (first, second, third) = read(tmp_path)
    assert metadata["rewards_known"] is True
    assert first["observations"].tolist() == [*OBSERVATIONS[:2].tolist(), [9, 9, 9]]
    assert (first["rewards"].tolist(), first["terminations"].tolist()) == ([1, 2], [False, True])
    assert first["truncations"].tolist() == [False, False]
    assert first["infos"]["is_answered"].tolist() == [True, True, False]
    assert np.isnan(first["infos"]["policy_action"][2]).all()
    assert second["observations"].tolist() == OBSERVATIONS[2:].tolist()
    assert (second["rewards"].tolist(), second["truncations"].tolist()) == ([3], [True])
    assert (third["rewards"].tolist(), third["terminations"].tolist()) == ([5], [True])


def test_ticks_without_the_policy_are_recorded_as_what_they_were(tmp_path: Path) -> None:
    config = LoopConfig(
        period_s=0.001, kinds="position", safe_action=[0.25, 0], action_bounds=([-1, -1], [1, 1]), deadline_s=0
    )
    with (
        FlightRecorder(tmp_path) as recorder,
        PolicyClient("unix:/tmp/nobody-listens-here") as client,
        ControlLoop(client, config, recorder=recorder) as loop,
    ):
        wait_until(lambda: loop.step(OBSERVATIONS[0]).level is Level.FALLBACK, "the fallback")
        for _ in range(5):
            loop.step(OBSERVATIONS[0])
    _, episodes = read(tmp_path)
    infos = {
        key: np.concatenate([episode["infos"][key] for episode in episodes]) for key in ("source", "level", "mode")
    }
    assert set(infos["source"]) <= {b"hold", b"fallback"}
    assert infos["level"][-1] == b"fallback"
    assert set(infos["mode"]) == {-1}
    assert not np.concatenate([episode["infos"]["is_answered"] for episode in episodes]).any()
    assert np.isnan(episodes[0]["infos"]["policy_action"]).all()
    np.testing.assert_array_equal(episodes[0]["actions"][0], np.array([0.25, 0], np.float32))


def test_an_observation_that_cannot_be_used_ends_the_episode(client: PolicyClient, tmp_path: Path) -> None:
    """Nobody may learn that the fourth observation followed the second."""
    with FlightRecorder(tmp_path) as recorder, ControlLoop(client, UNHURRIED, recorder=recorder) as loop:
        for row in (OBSERVATIONS[0], OBSERVATIONS[1], [np.nan, 0, 0], OBSERVATIONS[2], OBSERVATIONS[3]):
            loop.step(row)
    _, (before, after) = read(tmp_path)
    assert before["observations"].tolist() == OBSERVATIONS[:2].tolist()
    assert after["observations"].tolist() == OBSERVATIONS[2:].tolist()
    assert after["infos"]["sequence"].tolist() == [4, 5]


def test_observations_of_another_form_become_another_dataset(tmp_path: Path, bundle: Path) -> None:
    named = [{"observation": row} for row in OBSERVATIONS]
    with (
        PolicyClient(f"inproc:{bundle}") as client,
        FlightRecorder(tmp_path) as recorder,
        ControlLoop(client, UNHURRIED, recorder=recorder) as loop,
    ):
        for observation in (*OBSERVATIONS, *named):
            loop.step(observation)
    assert len(list(tmp_path.glob("flight-*-v0"))) == 2
    for path in tmp_path.glob("flight-*-v0"):
        with h5py.File(path / "data" / "main_data.hdf5") as file:
            np.testing.assert_array_equal(file["episode_0/observations"], OBSERVATIONS)


def test_what_the_disk_cannot_keep_up_with_is_dropped_counted_and_a_seam(
    client: PolicyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue has room for two: ticks 1 and 2 are in, 3 and 4 are not, 5 and 6 are another episode."""
    monkeypatch.setattr("lom_api.recording.recorder._MOST_WAITING", 2)
    may_write = threading.Event()
    with FlightRecorder(tmp_path) as recorder, ControlLoop(client, UNHURRIED, recorder=recorder) as loop:
        drain = recorder._recorder._drain
        monkeypatch.setattr(recorder._recorder, "_drain", lambda: may_write.is_set() and drain())
        time.sleep(2 * FLUSH_S)
        for row in OBSERVATIONS:
            assert loop.step(row).source is Source.FRESH
        assert loop.counters.unrecorded == recorder.dropped == 2
        may_write.set()
        wait_until(lambda: not recorder._recorder._queue, "the disk")
        for row in OBSERVATIONS[:2]:
            loop.step(row)
    _, (before, after) = read(tmp_path)
    assert before["infos"]["sequence"].tolist() == [1, 2]
    assert after["infos"]["sequence"].tolist() == [5, 6]


FLIGHT = """
import os, resource, sys, time
import numpy as np
from lom_client import ControlLoop, FlightRecorder, LoopConfig, PolicyClient
target, folder, largest = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = LoopConfig(period_s=0.01, kinds="position", safe_action=[0, 0], max_age_s=1, hold_limit=1000, stop_limit=2000)
with PolicyClient(target) as client, FlightRecorder(folder, finishes=False) as recorder:
    say = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole lines from two threads
    with ControlLoop(client, config, on_event=lambda event: say("event", event), recorder=recorder) as loop:
        if largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        for tick in loop.ticks():
            action = loop.step(np.array([0.1, 0.2, 1e-6 * tick.index]))
            say("tick", action.tick, time.monotonic(), action.source, recorder.dropped)
"""


def start_flight(target: str, folder: Path, largest_file: int = 0) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", FLIGHT, target, str(folder), str(largest_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_flight_loses_no_more_than_its_last_second(target: str, tmp_path: Path) -> None:
    flight = start_flight(target, tmp_path)
    assert flight.stdout is not None
    lines = [flight.stdout.readline().split() for _ in range(20)]
    time.sleep(1.5)
    flight.kill()
    killed_at = time.monotonic()
    lines += [line.split() for line in flight.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    flight.wait()
    ticks = {int(line[1]): float(line[2]) for line in lines if line[0] == "tick"}
    assert not list(tmp_path.glob("flight-*"))
    (spool,) = tmp_path.glob(".flight-*.spool")
    assert stat.S_IMODE(spool.stat().st_mode) == 0o600
    with spool.open("rb") as file:
        recorded = {int(number) for _, rows, _ in read_spool(file)[1] for number in rows["sequence"]}
    # 1.5 s of ticks are older than a second, however busy the machine is.
    due = {tick for tick, at in ticks.items() if at < killed_at - 1}
    assert len(due) >= 10
    assert due <= recorded
    finish_recordings(tmp_path)
    _, episodes = read(tmp_path)
    assert {int(number) for episode in episodes for number in episode["infos"]["sequence"]} <= recorded
    assert not list(tmp_path.glob(".flight-*"))


def test_a_full_disk_ends_the_recording_and_the_robot_goes_on(target: str, tmp_path: Path) -> None:
    """A limit on the size of files: a write beyond it fails as one on a full disk does."""
    flight = start_flight(target, tmp_path, largest_file=4000)
    assert flight.stdout is not None
    assert flight.stderr is not None
    events: list[str] = []
    fresh_afterwards = 0
    try:
        while fresh_afterwards < 50:
            line = flight.stdout.readline()
            assert line, flight.stderr.read()
            if line.startswith("event RecordingEnded"):
                events.append(line.strip())
            elif events and line.split()[3] == "fresh":
                fresh_afterwards += 1
        assert int(line.split()[4]) > 0
    finally:
        flight.kill()
        flight.wait()
    assert events == ["event RecordingEnded(reason='File too large')"]
    complaints = [line for line in flight.stderr.read().splitlines() if "has ended: File too large" in line]
    assert len(complaints) == 1
    finish_recordings(tmp_path)
    metadata, _ = read(tmp_path)
    assert metadata["total_steps"] > 0


def test_the_limit_ends_the_recording_and_tells(client: PolicyClient, tmp_path: Path) -> None:
    events: list[LoopEvent] = []
    told: list[str] = []
    with (
        FlightRecorder(tmp_path, max_mb=0.0625, on_failure=told.append) as recorder,
        ControlLoop(client, UNHURRIED, on_event=events.append, recorder=recorder) as loop,
    ):

        def is_told() -> bool:
            return loop.step(OBSERVATIONS[0]).source is Source.FRESH and RecordingEnded(reason=reason) in events

        reason = "the recordings of its folder reached their 0.0625 MiB"
        wait_until(is_told, "the end of the recording")
        assert recorder.failure == reason
        assert told == [reason]
        assert loop.counters.unrecorded == recorder.dropped > 0


def test_a_folder_that_cannot_be_written_is_refused_when_the_recorder_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"record: cannot write to '.*file/below': Not a directory"):
        FlightRecorder(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="record: cannot write to"):
        FlightRecorder("/proc/recordings")
    for megabytes in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_mb must be above 0"):
            FlightRecorder(tmp_path, max_mb=megabytes)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_nobody_else_reads_a_recording(client: PolicyClient, tmp_path: Path) -> None:
    with FlightRecorder(tmp_path / "f") as recorder, ControlLoop(client, UNHURRIED, recorder=recorder) as loop:
        for row in OBSERVATIONS:
            loop.step(row)
    places = [tmp_path / "f", *(tmp_path / "f").rglob("*")]
    assert len(places) == 5
    for place in places:
        assert stat.S_IMODE(place.stat().st_mode) == (0o700 if place.is_dir() else 0o600), place


def test_what_is_being_written_is_left_alone(client: PolicyClient, tmp_path: Path) -> None:
    with FlightRecorder(tmp_path) as recorder, ControlLoop(client, UNHURRIED, recorder=recorder) as loop:
        loop.step(OBSERVATIONS[0])
        time.sleep(2 * FLUSH_S)
        assert finish_recordings(tmp_path) == []
        loop.step(OBSERVATIONS[1])
    metadata, _ = read(tmp_path)
    assert metadata["total_steps"] == 1


def test_a_process_that_was_forked_off_neither_finishes_nor_holds_a_recording(
    client: PolicyClient, tmp_path: Path
) -> None:
    program = (
        "import os, sys, time; from lom_client import FlightRecorder; recorder = FlightRecorder(sys.argv[1])\n"
        "if os.fork() == 0:\n    recorder.close(); time.sleep(60); os._exit(0)\n"
        "time.sleep(1); print(*os.listdir(sys.argv[1]), flush=True); recorder.close(); print(os.listdir(sys.argv[1]))\n"
        "os.kill(0, 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    during, after = done.stdout.splitlines()
    assert during.endswith(".spool")
    assert after == "[]"


def test_a_robot_needs_no_h5py(client: PolicyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(ImportError, match=r"pip install 'lom\[record\]'"):
            FlightRecorder(tmp_path)
        with (
            FlightRecorder(tmp_path, finishes=False) as recorder,
            ControlLoop(client, UNHURRIED, recorder=recorder) as loop,
        ):
            loop.step(OBSERVATIONS[0])
            loop.step(OBSERVATIONS[1])
    done = subprocess.run([sys.executable, "-m", "lom_api.recording", str(tmp_path)], capture_output=True, text=True)
    (path,) = tmp_path.iterdir()
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(path), "")


def test_a_foreign_spool_is_named_and_left(tmp_path: Path) -> None:
    (tmp_path / ".flight-x.spool").write_bytes(b"nothing of ours, but long enough")
    with pytest.raises(RecordingError, match=r"\.flight-x\.spool: expected the spool of a recording"):
        finish_recordings(tmp_path)
    assert (tmp_path / ".flight-x.spool").exists()
    with FlightRecorder(tmp_path):
        pass  # somebody else's file is no reason to fail


def test_a_spool_that_never_began_goes_without_a_word(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"LOMF", b"LOMFLT01", b"LOMFLT01H\x20\0\0\0")):
        (tmp_path / f".flight-{number}.spool").write_bytes(content)
    assert finish_recordings(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_what_an_attempt_left_that_was_killed_is_replaced(client: PolicyClient, tmp_path: Path) -> None:
    with (
        FlightRecorder(tmp_path, finishes=False) as recorder,
        ControlLoop(client, UNHURRIED, recorder=recorder) as loop,
    ):
        for row in OBSERVATIONS:
            loop.step(row)
    (spool,) = tmp_path.iterdir()
    draft = tmp_path / f"{spool.stem}-v0.partial" / "data"
    draft.mkdir(parents=True)
    (draft / "main_data.hdf5").write_bytes(b"half")
    finish_recordings(tmp_path)
    assert read(tmp_path)[0]["total_steps"] == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_while_finishing_leaves_the_spool_and_no_half_dataset(client: PolicyClient, tmp_path: Path) -> None:
    with (
        FlightRecorder(tmp_path, finishes=False) as recorder,
        ControlLoop(client, UNHURRIED, recorder=recorder) as loop,
    ):
        for row in OBSERVATIONS:
            loop.step(row)
    before = list(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # which the process that makes the dataset inherits
    try:
        with pytest.raises(OSError, match=r"File too large|died: is the disk full"):
            finish_recordings(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == before
    finish_recordings(tmp_path)
    assert read(tmp_path)[0]["total_steps"] == 3


@pytest.mark.parametrize("options", [["--record", "/proc/recordings"], ["--record", "x", "--record-max-mb", "0"]])
def test_lom_act_refuses_in_one_line_what_cannot_be_recorded(
    bundle: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--target", f"inproc:{bundle}", "--env", "Toy-v0", *options]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("lom-act: ")
    assert "record" in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--envs", "2"], ["--rate-hz", "20"]], ids=["one", "vector", "real time"])
def test_lom_act_records_whole_episodes(bundle: Path, tmp_path: Path, more: list[str]) -> None:
    folder = tmp_path / "f"
    run = ["--target", f"inproc:{bundle}", "--env", "Toy-v0", "--episodes", "3", "--record", str(folder), *more]
    report = tmp_path / "report.json"
    assert main([*run, "--json", str(report)]) == 0
    metadata, episodes = read(folder)
    assert metadata["rewards_known"] is True
    whole = [episode for episode in episodes if len(episode["actions"]) == toy_environments.STEPS]
    if not more or more[0] == "--envs":
        assert len(whole) == len(episodes) == 3
    for episode in whole:
        assert episode["terminations"].tolist() == [False] * (toy_environments.STEPS - 1) + [True]
        assert not episode["truncations"].any()
        assert not episode["infos"]["is_answered"][-1]
        np.testing.assert_allclose(episode["rewards"], episode["actions"][:, 0], atol=1e-7)
    if len(whole) == 3:
        returns = sorted(float(episode["rewards"].sum()) for episode in whole)
        np.testing.assert_allclose(returns, sorted(json.loads(report.read_text())["returns"]), atol=1e-6)


def test_our_own_trainer_loads_it(bundle: Path, tmp_path: Path) -> None:
    dataset = pytest.importorskip("lom.dataset")
    assert main(["--target", f"inproc:{bundle}", "--env", "Toy-v0", "--episodes", "3", "--record", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    transitions = dataset.load_transitions([path])
    assert len(transitions) == 3 * toy_environments.STEPS
    assert transitions.terminals.sum() == 3


def test_minari_loads_it(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    assert main(["--target", f"inproc:{bundle}", "--env", "Toy-v0", "--episodes", "3", "--record", str(tmp_path)]) == 0
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (name,) = minari.list_local_datasets()
    loaded = minari.load_dataset(name)
    assert (loaded.total_episodes, loaded.total_steps) == (3, 3 * toy_environments.STEPS)
    for episode in loaded.iterate_episodes():
        assert len(episode.observations) == len(episode.actions) + 1 == len(episode.infos["mode"])
