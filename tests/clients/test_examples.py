"""The examples run as they are printed."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support.fake_policy_server import FakePolicyServer, never_act

ROOT = Path(__file__).parents[2]


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "clients" / "examples" / name, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_minimal_act(server: FakePolicyServer) -> None:
    assert re.fullmatch(
        r"action \[0\. 0\.\] from greedy_mode in \d+ µs\n", run_example("minimal_act.py", server.target)
    )


def test_control_loop(server: FakePolicyServer) -> None:
    printed = run_example("control_loop.py", "tests.clients.toy_environments:Toy-v0", server.target, "25")
    told = re.fullmatch(r"(?:.*\n)*25 ticks: (\d+) fresh, (\d+) held, (\d+) by the fallback, (\d+) stopped\n", printed)
    assert told
    assert int(told[1]) > 0
    assert sum(map(int, told.groups())) == 25


def test_control_loop_goes_on_without_answers(server: FakePolicyServer) -> None:
    server.act = never_act
    printed = run_example("control_loop.py", "tests.clients.toy_environments:Toy-v0", server.target, "8")
    assert "tick 6: degraded -> fallback because DEADLINE_EXCEEDED\n" in printed
    assert printed.endswith("8 ticks: 0 fresh, 5 held, 3 by the fallback, 0 stopped\n")
