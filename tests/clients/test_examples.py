"""The examples run as they are printed."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import grpc
import pytest

import lom_client
from lom_client import ControlLoop, LoopAction
from tests.support.bundles import write_test_bundle
from tests.support.fake_policy_server import FakePolicyServer, never_act, refusing_act
from tests.support.pendulum_bundle import ENV_ID, write_pendulum_bundle
from tests.support.servers import ServerProcess, running_server

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "clients" / "examples"


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    bundle = tmp_path_factory.mktemp("examples") / "bundle"
    write_test_bundle(bundle)
    with running_server(bundle) as server:
        yield server


def start_example(name: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, EXAMPLES / name, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )


def run_example(name: str, *arguments: str) -> str:
    with start_example(name, *arguments) as example:
        printed, complained = example.communicate(timeout=60)
    assert (example.returncode, complained) == (0, "")
    return printed


def test_minimal_act(real_server: ServerProcess) -> None:
    printed = run_example("minimal_act.py", f"grpc://{real_server.address}")
    assert re.fullmatch(r"action \[-0\.5  -0\.25\] from greedy_mode in \d+ µs\n", printed)


def test_control_loop_balances_a_pendulum(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    write_pendulum_bundle(tmp_path / "bundle")
    with running_server(tmp_path / "bundle") as server:
        printed = run_example("control_loop.py", ENV_ID, f"grpc://{server.address}", "150")
    told = re.fullmatch(
        r"(?:.*\n)*150 ticks: (\d+) fresh, (\d+) held, (\d+) by the fallback, (\d+) stopped\n(\d+) episodes over\n",
        printed,
    )
    assert told
    fresh, *others, over = map(int, told.groups())
    assert fresh > 0
    assert fresh + sum(others) == 150
    # Left to itself the pole falls again and again. A machine with other things to do may lose some answers.
    assert over == 0 or fresh < 140


def test_control_loop_goes_on_without_answers(server: FakePolicyServer) -> None:
    server.act = never_act
    printed = run_example("control_loop.py", "tests.clients.toy_environments:Toy-v0", server.target, "8")
    assert "tick 6: degraded -> fallback because DEADLINE_EXCEEDED\n" in printed
    assert printed.endswith("8 ticks: 0 fresh, 5 held, 3 by the fallback, 0 stopped\n2 episodes over\n")


def test_vectorised_simulation(real_server: ServerProcess) -> None:
    env_id = "tests.clients.toy_environments:Toy-v0"
    printed = run_example("vectorised_simulation.py", env_id, f"grpc://{real_server.address}", "4", "25")
    # Four steps to an episode and a fifth to reset: five episodes of each environment in 25 steps.
    assert re.fullmatch(
        r"4 environments: 80 steps in \S+ s, \d+ steps/s, 20 episodes; 25 calls, p50 \d+ µs, p99 \d+ µs\n", printed
    )


def test_robot_fleet(real_server: ServerProcess) -> None:
    head, *lines, last = run_example("robot_fleet.py", f"grpc://{real_server.address}", "1").splitlines()
    assert head == "16 robots, policy toy, 1 s at 50 Hz"
    assert [line.partition(":")[0] for line in lines] == [f"robot {number:2}" for number in range(16)]
    told = re.fullmatch(r"16 robots, 800 ticks: fresh (\S+)%  p50 \S+ ms  p99 \S+ ms  held \{.*\}", last)
    assert told
    assert float(told[1]) > 0


def test_robot_fleet_holds_when_the_server_dies(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle")
    with (
        running_server(tmp_path / "bundle") as server,
        start_example("robot_fleet.py", f"grpc://{server.address}", "2", "4") as example,
    ):
        assert example.stdout is not None
        assert example.stdout.readline() == "4 robots, policy toy, 2 s at 50 Hz\n"
        server.process.kill()
        printed, complained = example.communicate(timeout=60)
    assert (example.returncode, complained) == (0, "")
    last = printed.splitlines()[-1]
    assert last.startswith("4 robots, 400 ticks: fresh")
    assert "'UNAVAILABLE'" in last


def test_robot_fleet_leaves_an_overloaded_server_alone(server: FakePolicyServer) -> None:
    server.act = refusing_act(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL: 64 rows wait; retry_after_ms 600000")
    last = run_example("robot_fleet.py", server.target, "1", "2").splitlines()[-1]
    # Each of the two asks until it is told to wait; a busy machine may be too late to hear the first refusal.
    told = re.fullmatch(r"2 robots, 100 ticks: fresh 0\.0 %  held \{.*'QUEUE_FULL': 2\b.*\}", last)
    assert told
    assert len(server.requests) < 50


def test_robot_fleet_without_a_server_is_one_line() -> None:
    with FakePolicyServer() as server:
        target = server.target
    with start_example("robot_fleet.py", target, "1", "2") as example:
        printed, complained = example.communicate(timeout=60)
    assert (example.returncode, printed, complained.count("\n")) == (1, "", 1)
    assert complained.startswith("UNAVAILABLE: ")


def test_the_ros2_template_uses_the_library_as_it_is() -> None:
    tree = ast.parse((EXAMPLES / "ros2_policy_node.py").read_text())
    compile(tree, "ros2_policy_node.py", "exec")
    assert (ast.get_docstring(tree) or "").startswith("UNTESTED TEMPLATE")
    imported = {
        alias.name: getattr(lom_client, alias.name)  # fails where there is no such name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "lom_client"
        for alias in node.names
    }
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given, named = [None] * len(node.args), {str(keyword.arg): None for keyword in node.keywords}
            name = ast.unparse(node.func)
            if name in imported:
                inspect.signature(imported[name]).bind(*given, **named)
                called.add(name)
            elif name.startswith("self._loop."):
                method = name.removeprefix("self._loop.")
                inspect.signature(getattr(ControlLoop, method)).bind(None, *given, **named)
                called.add(method)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "action":
            assert node.attr in {field.name for field in fields(LoopAction)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in imported:
            assert hasattr(imported[ast.unparse(node.value)], node.attr)
    assert called == {"PolicyClient", "LoopConfig", "ControlLoop", "step", "close", "rearm", "operator_stop"}
