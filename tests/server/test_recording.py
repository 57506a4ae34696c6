"""`lom-serve --record`: what was answered is in a dataset afterwards, whatever became of the server."""

import json
import re
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lom_api.reasons import Reason
from lom_api.recording import finish_recordings
from lom_api.recording.recorder import FLUSH_S
from lom_client import ClientConfig, PolicyClient
from lom_client.main import main as lom_act
from lom_server.config import ConfigError, ServerConfig
from lom_server.errors import StartError
from lom_server.recording import TrafficRecorder, require_recording
from lom_server.service import ActReply, ActRequest
from tests.support import bundles
from tests.support.servers import ServerProcess, running_server, start_server_process, wait_until

ROBOT = np.array([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6], [0.7, 0.8, 0.9], [-0.1, -0.3, -0.2]], np.float32)


def ask(server: ServerProcess, rows: Any, **options: Any) -> list[Any]:
    with PolicyClient(f"grpc://{server.address}") as client:
        return [client.act(row, deadline_s=10, **options) for row in rows]


def counted(server: ServerProcess) -> dict[str, int]:
    """What the metrics say of the recording."""
    (address,) = re.findall(r"metrics=(\S+)", "\n".join(server.stdout))
    page = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    return {
        name: int(float(value)) for name, value in re.findall(r"^(lom_\w*recorded_answers)_total (\S+)$", page, re.M)
    }


def the_dataset(folder: Path) -> Path:
    (path,) = folder.glob("flight-*-v0")
    return path


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metadata = json.loads((path / "data" / "metadata.json").read_text())
    with h5py.File(path / "data" / "main_data.hdf5") as file:
        episodes = [
            {
                name: {key: array[()] for key, array in value.items()} if isinstance(value, h5py.Group) else value[()]
                for name, value in file[f"episode_{number}"].items()
            }
            for number in range(metadata["total_episodes"])
        ]
    return metadata, episodes


def test_what_was_answered_is_a_dataset_after_the_stop(toy_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    with running_server(toy_bundle, "--record", str(folder)) as server:
        answers = ask(server, ROBOT)
        assert server.terminate() == 0
    metadata, (episode,) = read(the_dataset(folder))
    assert (metadata["total_episodes"], metadata["total_steps"], metadata["data_format"]) == (1, 3, "hdf5")
    assert metadata["rewards_known"] is False
    assert metadata["lom_recording"]["bundle_digests"] == [answers[0].bundle_digest]
    np.testing.assert_array_equal(episode["observations"], ROBOT)
    np.testing.assert_array_equal(episode["actions"], bundles.greedy_action(ROBOT)[:3])
    np.testing.assert_array_equal(episode["infos"]["policy_action"], bundles.greedy_action(ROBOT))
    np.testing.assert_array_equal(episode["infos"]["mode"], bundles.greedy_mode(ROBOT))
    np.testing.assert_allclose(episode["infos"]["margin"], bundles.greedy_margin(ROBOT), atol=1e-6)
    assert set(episode["infos"]["bundle_digest"]) == {answers[0].bundle_digest.encode()}
    assert set(episode["infos"]["variant"]) == {b"greedy_mode"}
    assert episode["truncations"].tolist() == [False, False, True]
    assert not episode["terminations"].any()
    assert not list(folder.glob(".*"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for place in the_dataset(folder).rglob("*"):
        assert stat.S_IMODE(place.stat().st_mode) == (0o700 if place.is_dir() else 0o600)


def test_robots_and_rows_do_not_share_episodes(toy_bundle: Path, tmp_path: Path) -> None:
    with running_server(toy_bundle, "--record", str(tmp_path)) as server:
        target = f"grpc://{server.address}"
        stream = ClientConfig(use_stream=True)
        with PolicyClient(target, config=stream) as one, PolicyClient(target, config=stream) as other:
            for row in ROBOT:
                one.act(row, deadline_s=10)
                other.act(-row, deadline_s=10)
        ask(server, [ROBOT[:2], ROBOT[2:]])
        server.terminate()
    _, episodes = read(the_dataset(tmp_path))
    found = sorted(episode["observations"].tolist() for episode in episodes)
    expected = [ROBOT, -ROBOT, ROBOT[[0, 2]], ROBOT[[1, 3]]]
    assert found == sorted(rows.tolist() for rows in expected)


def test_a_replay_repeats_seeds_modes_and_hysteresis(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 1 of a seeded request of two rows has its own noise: asked alone, or without the seed, it would differ."""
    with running_server(toy_bundle, "--record", str(tmp_path / "r")) as server:
        ask(server, [ROBOT[:2], ROBOT[2:]], sampling_seed=7)
        ask(server, ROBOT, mode=1)
        ask(server, ROBOT, previous_mode=0, hysteresis_width=5.0)
        ask(server, ROBOT, variant="actor")
        server.terminate()
    _, episodes = read(the_dataset(tmp_path / "r"))
    assert len(episodes) == 5
    same, other = tmp_path / "same", tmp_path / "other"
    bundles.write_test_bundle(same)
    bundles.write_test_bundle(other, flaws=bundles.Flaws(action_offset=1e-3))
    assert lom_act(["replay", str(tmp_path / "r"), "--target", f"inproc:{same}"]) == 0
    assert "the same" in capsys.readouterr().out
    # The offset is in every component's mean, and not in the actor: 4 of the 16 are as they were.
    assert lom_act(["replay", str(tmp_path / "r"), "--target", f"inproc:{other}"]) == 1
    printed = capsys.readouterr().out
    assert "another" in printed
    rows = {words[1]: words[-2] for line in printed.splitlines() if len(words := line.split()) > 3}
    assert (rows["compared"], rows["within"]) == ("16", "4")


def test_a_killed_server_loses_no_more_than_the_last_instant(toy_bundle: Path, tmp_path: Path) -> None:
    with running_server(toy_bundle, "--record", str(tmp_path)) as server:
        ask(server, ROBOT)
        time.sleep(10 * FLUSH_S)
        server.process.kill()
        server.wait()
    assert not list(tmp_path.glob("flight-*"))
    assert list(tmp_path.glob(".flight-*.spool"))
    with running_server(toy_bundle, "--record", str(tmp_path)) as server:
        wait_until(lambda: bool(list(tmp_path.glob("flight-*"))), "the next start to finish the recording")
        metadata, _ = read(the_dataset(tmp_path))
        assert metadata["total_steps"] == 3
        assert server.terminate() == 0


def test_a_killed_worker_costs_its_last_instant(toy_bundle: Path, tmp_path: Path) -> None:
    with running_server(toy_bundle, "--record", str(tmp_path)) as server:
        ask(server, ROBOT)
        time.sleep(10 * FLUSH_S)
        ((pid,),) = [_children_named(server.process.pid, "lom_server.worker")]
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
        wait_until(lambda: _answers(server), "the worker's successor")
        server.terminate()
    steps = [read(path)[0]["total_steps"] for path in tmp_path.glob("flight-*")]
    assert 3 in steps


def test_a_full_disk_ends_the_recording_and_nothing_else(toy_bundle: Path, tmp_path: Path) -> None:
    """A limit on the size of files: a write beyond it fails as one on a full disk does."""
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "sys.argv[0] = 'lom-serve'; runpy.run_module('lom_server.main', run_name='__main__')"
    )
    with running_server(
        toy_bundle, "--record", str(tmp_path), program=(sys.executable, "-c", program), patience_s=60
    ) as server:
        for _ in range(3):
            ask(server, [np.tile(ROBOT, (20, 1))] * 4)
            time.sleep(3 * FLUSH_S)
        assert len(ask(server, ROBOT)) == 4
        server.terminate()
    ended = [line for line in server.stderr if "has ended" in line]
    assert len(ended) == 1
    assert "File too large" in ended[0]


def test_a_folder_that_cannot_be_written_is_refused(toy_bundle: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    server = start_server_process(toy_bundle, "--record", str(occupied / "below"))
    assert server.wait() == 1
    (line,) = server.stderr
    assert line.startswith("lom-serve: RECORD_UNWRITABLE: record: expected a folder that can be written, got")


def test_without_h5py_it_says_which_extra(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(StartError, match=r"RECORD_NEEDS_H5PY: .*pip install 'lom\[record\]'"):
        require_recording(tmp_path)


@pytest.mark.parametrize("megabytes", [0, -1, 2**20 + 1])
def test_the_limit_has_a_range(megabytes: int) -> None:
    with pytest.raises(ConfigError, match="record_max_mb"):
        ServerConfig(models=Path("x"), record=Path("y"), record_max_mb=megabytes)


def test_the_limit_is_for_the_whole_folder(toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "flight-before-v0").mkdir()
    (tmp_path / "flight-before-v0" / "data").write_bytes(bytes(2**20))
    options = ("--record", str(tmp_path), "--record-max-mb", "1", "--metrics-listen", "127.0.0.1:0")
    with running_server(toy_bundle, *options) as server:
        ask(server, ROBOT)
        time.sleep(3 * FLUSH_S)
        assert len(ask(server, ROBOT)) == 4
        wait_until(lambda: counted(server) == {"lom_recorded_answers": 0, "lom_unrecorded_answers": 8}, "the metrics")
        server.terminate()
    assert sum("reached their 1 MiB" in line for line in server.stderr) == 1


def test_a_worker_does_not_load_h5py() -> None:
    program = "import sys, lom_server.worker; print('h5py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"


class _Deaf:
    def __init__(self) -> None:
        self.answers = 0

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        self.answers += 1

    def refused(self, policy: str, reason: Reason) -> None:
        raise AssertionError


def test_what_the_disk_cannot_keep_up_with_is_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writing thread is held up; the queue takes 8192 answers and no more, and nobody waits."""
    gate = threading.Event()
    recorder = TrafficRecorder(tmp_path, max_mb=100, workers=1)
    monkeypatch.setattr(recorder._recorder, "_drain", gate.wait)
    deaf = _Deaf()
    observer = recorder.observing(deaf)
    request = ActRequest(policy="toy", inputs=[("observation", ROBOT[:1])])
    reply = ActReply(
        action=np.zeros((1, 2), np.float32),
        mode=None,
        margin=None,
        scores={},
        explanation={},
        is_clamped=False,
        policy="toy",
        version=1,
        variant="actor",
        bundle_digest="d",
        queue_ns=0,
        inference_ns=0,
        batch_rows=1,
    )
    time.sleep(2 * FLUSH_S)
    for _ in range(10_000):
        observer.answered(request, reply, 1)
    assert deaf.answers == 10_000
    assert (recorder.recorded, recorder.dropped) == (8192, 10_000 - 8192)
    gate.set()
    recorder.close()
    finish_recordings(tmp_path)


def _answers(server: ServerProcess) -> bool:
    try:
        return bool(ask(server, ROBOT[:1]))
    except Exception:
        return False


def _children_named(parent: int, module: str) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and module in (status.parent / "cmdline").read_text():
                found.append(int(status.parent.name))
        except (OSError, IndexError):
            continue
    return found
