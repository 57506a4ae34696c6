"""`lom-act` as a user meets it."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from lom_client.main import main
from tests.clients import toy_environments  # registers Toy-v0
from tests.support.fake_policy_server import FakePolicyServer, never_act

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
    "fresh",
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
