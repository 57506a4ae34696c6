"""`lom-act` as a user meets it."""

import json
import struct
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lom_api.v1 import policy_pb2
from lom_client.main import main
from tests.clients import toy_environments  # registers Toy-v0
from tests.support.fake_policy_server import Context, FakePolicyServer, Reply, honest_act, never_act

KEYS = {
    "env",
    "seed",
    "policy",
    "variant",
    "bundle_digest",
    "episodes",
    "return_mean",
    "return_std",
    "returns",
    "success_rate",
    "length_mean",
    "envs",
    "rate_hz",
    "steps",
    "steps_per_s",
    "fresh",
    "source_share",
    "skipped_periods",
    "latency_p50_us",
    "latency_p99_us",
    "mode_share",
    "warning_share",
}


def test_the_report_is_printed_and_written(
    server: FakePolicyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    assert (
        main(["--target", server.target, "--env", "Toy-v0", "--episodes", "3", "--seed", "4", "--json", str(path)]) == 0
    )
    printed = capsys.readouterr().out
    for words in ("return", "success", "episode length", "latency p50", "latency p99", "mode "):
        assert words in printed
    report = json.loads(path.read_text())
    assert set(report) == KEYS
    assert (report["episodes"], report["seed"], report["env"]) == (3, 4, "Toy-v0")
    assert (report["policy"], report["variant"], report["bundle_digest"]) == ("toy", "greedy_mode", "d" * 64)
    assert report["return_mean"] == pytest.approx(sum(report["returns"]) / 3)
    assert report["success_rate"] == 1
    assert report["length_mean"] == toy_environments.STEPS
    assert report["fresh"] == 3 * toy_environments.STEPS
    assert (report["steps"], report["source_share"]) == (report["fresh"], {"fresh": 1})
    assert (report["envs"], report["rate_hz"], report["skipped_periods"]) == (1, None, 0)
    assert report["steps_per_s"] > 0
    assert 0 < report["latency_p50_us"] <= report["latency_p99_us"]
    assert sum(report["mode_share"].values()) == pytest.approx(1)
    assert list(tmp_path.iterdir()) == [path]


def test_the_program_runs_by_itself(server: FakePolicyServer, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lom_client.main", "--target", server.target, "--variant", "actor"),
            *("--env", "tests.clients.toy_environments:Toy-v0", "--episodes", "2", "--json", str(tmp_path / "r.json")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "r.json").read_text())["variant"] == "actor"


def run(server: FakePolicyServer, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "report.json"
    assert main(["--target", server.target, *arguments, "--json", str(path)]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return report


def test_environments_side_by_side_play_the_same_episodes(server: FakePolicyServer, tmp_path: Path) -> None:
    arguments = ("--env", "ToyWalk-v0", "--episodes", "5", "--seed", "3")
    alone = run(server, tmp_path, *arguments)
    asked = len(server.requests)
    together = run(server, tmp_path, *arguments, "--envs", "4")
    for same in ("returns", "success_rate", "length_mean", "steps", "fresh", "mode_share"):
        assert together[same] == alone[same]
    rows = [request.inputs[0].shape[0] for request in server.requests[asked:]]
    assert rows[0] == 4
    assert sum(rows) == alone["steps"]
    run(server, tmp_path, *arguments, "--envs", "64")
    assert max(request.inputs[0].shape[0] for request in server.requests) == 5  # there are no more episodes


def test_in_real_time_the_loop_acts_where_no_answer_comes(
    server: FakePolicyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(request: policy_pb2.ActRequest, context: Context) -> Reply:
        return (never_act if len(server.requests) > 2 else honest_act)(request, context)

    server.act = act
    arguments = ("--env", "Toy-v0", "--episodes", "1", "--rate-hz", "2.5", "--kind", "position")
    report = run(server, tmp_path, *arguments)
    assert report["source_share"] == {"fresh": 0.5, "safe_stop": 0.5}  # at 2.5 Hz, one miss is too many
    assert (report["steps"], report["fresh"], report["rate_hz"]) == (4, 2, 2.5)
    printed = capsys.readouterr().out
    for words in ("Toy-v0 · toy · greedy_mode · 2.5 Hz", "fresh actions", "safe_stop actions", "skipped periods"):
        assert words in printed


@pytest.mark.parametrize("envs", ["1", "2"])
def test_the_first_episode_is_filmed(server: FakePolicyServer, tmp_path: Path, envs: str) -> None:
    pil = pytest.importorskip("PIL.Image")
    path = tmp_path / "episode.gif"
    path.write_text("old")
    run(server, tmp_path, "--env", "ToyFilm-v0", "--episodes", "3", "--envs", envs, "--video", str(path))
    columns = []
    with pil.open(path) as film:
        for frame in range(film.n_frames):
            film.seek(frame)
            columns.append(int(np.argmax(np.asarray(film.convert("L"))[0])))
            assert film.info["duration"] == 40
            assert film.size == (32, 24)
    assert columns == [0, 8, 16]  # 50 steps a second, of which 25 are shown: before, after 2 and after 4
    assert list(tmp_path.iterdir()) == [path]


def test_an_episode_that_did_not_end_leaves_no_film(server: FakePolicyServer, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    server.act = never_act
    arguments = ["--target", server.target, "--env", "ToyFilm-v0", "--deadline-s", "0.1"]
    assert main([*arguments, "--video", str(tmp_path / "episode.gif")]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("variant", "height"), [("greedy_mode", 1200), ("actor", 750)])  # the actor has no modes
def test_the_report_is_drawn(server: FakePolicyServer, tmp_path: Path, variant: str, height: int) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    run(server, tmp_path, "--env", "ToyWalk-v0", "--episodes", "3", "--variant", variant, "--plot", str(path))
    width_and_height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width_and_height == (1800, height)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_matplotlib_is_named_before_the_run(
    server: FakePolicyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "lom_client.episode_plot", raising=False)
    assert main(["--target", server.target, "--env", "Toy-v0", "--plot", str(tmp_path / "report.png")]) == 2
    assert capsys.readouterr().err == "lom-act: --plot needs matplotlib: pip install matplotlib\n"
    assert server.requests == []


def test_an_mp4_names_what_it_needs(
    server: FakePolicyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--target", server.target, "--env", "ToyFilm-v0", "--video", str(tmp_path / "episode.mp4")]) == 2
    assert "pip install imageio-ffmpeg" in capsys.readouterr().err
    assert server.requests == []


def test_it_asks_over_a_stream_with_a_token(server: FakePolicyServer, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    arguments = ["--target", server.target, "--env", "Toy-v0", "--episodes", "2"]
    assert main([*arguments, "--stream", "--token-file", str(token), "--version", "1"]) == 0
    assert server.streams == 1
    assert {metadata["authorization"] for metadata in server.metadata} == {"Bearer 0123456789abcdef"}
    assert {request.version for request in server.requests} == {1}


def test_an_installed_package_brings_its_environments(
    server: FakePolicyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    if not entry_points(group="gymnasium.envs", name="lom"):
        pytest.skip("the installed lom names no environments")
    assert main(["--target", server.target, "--env", "lom/Fork-v0"]) == 1
    assert "SPACE_MISMATCH" in capsys.readouterr().err  # it was made, and is not the toy policy's


USER_ERRORS = [
    (["--env", "Toy-v0", "--episodes", "0"], 2, "--episodes must be 1 or more"),
    (["--env", "Toy-v0", "--seed", "-1"], 2, "--seed must be 0 or more"),
    (["--env", "Toy-v0", "--deadline-s", "0"], 2, "--deadline-s must be above 0"),
    (["--env", "Toy-v0", "--deadline-s", "nan"], 2, "--deadline-s must be above 0"),
    (["--env", "Toy-v0", "--json", "/nowhere/report.json"], 2, "folder /nowhere does not exist"),
    (["--env", "Toy-v0", "--json", "/tmp"], 2, "is a folder"),
    (["--env", "Toy-v0", "--envs", "0"], 2, "--envs must be 1 or more"),
    (["--env", "Toy-v0", "--envs", "100000"], 2, "--envs: the server answers at most"),
    (["--env", "Toy-v0", "--rate-hz", "0"], 2, "--rate-hz must be above 0"),
    (["--env", "Toy-v0", "--rate-hz", "nan"], 2, "--rate-hz must be above 0"),
    (["--env", "Toy-v0", "--rate-hz", "50", "--envs", "2"], 2, "plays one environment in real time"),
    (["--env", "Toy-v0", "--plot", "/nowhere/report.png"], 2, "--plot: folder /nowhere does not exist"),
    (["--env", "Toy-v0", "--plot", "report.jpg"], 2, "ends in .png, got 'report.jpg'"),
    (["--env", "Toy-v0", "--video", "/nowhere/episode.gif"], 2, "--video: folder /nowhere does not exist"),
    (["--env", "Toy-v0", "--video", "episode.avi"], 2, "ends in .gif or .mp4, got 'episode.avi'"),
    (["--env", "Toy-v0", "--video", "episode.gif"], 2, "Toy-v0 does not render rgb_array, but nothing"),
    (["--env", "ToyNoFilm-v0", "--video", "episode.gif"], 2, "--video: cannot render: no display (MuJoCo"),
    (["--env", "NoSuchEnv-v0"], 2, "cannot make 'NoSuchEnv-v0'"),
    (["--env", "no_such_module:Env-v0"], 2, "cannot make 'no_such_module:Env-v0'"),
    (["--env", "ToyWide-v0"], 1, "expects width 3, the environment has 4"),
    (["--env", "Toy-v0", "--variant", "expert"], 2, "expected one of greedy_mode, actor, got 'expert'"),
    (["--env", "Toy-v0", "--policy", "other"], 1, "MODEL_NOT_FOUND"),
    (["--env", "Toy-v0", "--target", "http://127.0.0.1:1"], 2, "grpc://HOST:PORT"),
    (["--env", "Toy-v0", "--version", "0"], 2, "version must be between 1 and"),
    (["--env", "Toy-v0", "--version", "2"], 1, "WRONG_VERSION"),
    (["--env", "Toy-v0", "--tls-ca", "ca.pem"], 2, "tls_ca needs a target grpcs://"),
    (["--env", "Toy-v0", "--tls-key", "key.pem"], 2, "must be given together"),
    (["--env", "Toy-v0", "--token-file", "/nowhere/token"], 2, "expected a readable file"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "words"), USER_ERRORS)
def test_a_user_error_is_one_clear_line(
    server: FakePolicyServer, capsys: pytest.CaptureFixture[str], arguments: Any, exit_code: int, words: str
) -> None:
    target = [] if "--target" in arguments else ["--target", server.target]
    assert main([*target, *arguments]) == exit_code
    captured = capsys.readouterr()
    assert captured.err.startswith("lom-act: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert captured.out == ""
    assert server.requests == []


def test_an_unreachable_server_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with FakePolicyServer() as server:
        target = server.target
    assert main(["--target", target, "--env", "Toy-v0"]) == 1
    assert capsys.readouterr().err.startswith("lom-act: UNAVAILABLE: ")


def test_a_server_that_stops_answering_ends_the_run_without_a_report(
    server: FakePolicyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.act = never_act
    path = tmp_path / "report.json"
    arguments = ["--target", server.target, "--env", "Toy-v0", "--deadline-s", "0.1", "--json", str(path)]
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("lom-act: DEADLINE_EXCEEDED: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["gymnasium", "tyro", "rich.console"])
def test_a_missing_extra_is_named(
    server: FakePolicyServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "lom_client.episodes", raising=False)
    assert main(["--target", server.target, "--env", "Toy-v0"]) == 2
    assert "pip install 'lom[client,envs]'" in capsys.readouterr().err


def test_the_package_itself_needs_none_of_the_extras() -> None:
    program = (
        "import sys\n"
        "for name in ('gymnasium', 'tyro', 'rich', 'torch', 'onnxruntime', 'onnx'): sys.modules[name] = None\n"
        "import lom_client, lom_client.main"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
