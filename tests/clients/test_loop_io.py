"""Asking in a process of its own: the same answers, and no process outlives its loop or its parent."""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lom_client import ClientConfig, ControlLoop, Level, LoopConfig, PolicyClient, PolicyProcess, Source
from tests.support.fake_policy_server import PATIENCE_S, FakePolicyServer, honest_act
from tests.support.processes import is_running, policy_processes
from tests.support.servers import wait_until

ROW = np.array([0.1, 0.2, 0.3])
CONFIG = LoopConfig(
    period_s=10.0, kinds="position", safe_action=[0.0, 0.0], hold_limit=2, stop_limit=1000, recovery_ticks=2
)


@pytest.fixture
def loop(server: FakePolicyServer) -> Iterator[ControlLoop]:
    with ControlLoop(PolicyProcess(target=server.target), CONFIG) as loop:
        yield loop


def test_a_description_of_a_policy_survives_its_way_to_the_process() -> None:
    config = ClientConfig(tls_ca=Path("/ca.pem"), token_file=Path("/token"), use_stream=True, keepalive_time_s=2.5)
    for policy in (
        PolicyProcess(target="grpc://127.0.0.1:1"),
        PolicyProcess(target="grpcs://h:1", policy="p", version=3, config=config),
    ):
        assert PolicyProcess.from_json(policy.to_json()) == policy


def test_a_process_answers_as_a_thread_does(server: FakePolicyServer, loop: ControlLoop) -> None:
    for number in range(1, 21):
        action = loop.step(ROW / number)
        assert (action.source, action.mode, action.bundle_digest) == (Source.FRESH, 2, "d" * 64)
        np.testing.assert_array_equal(action.values, (ROW / number).astype(np.float32)[:2])
    assert len(policy_processes()) == 1
    assert len(set(server.peers)) == 1
    refused = loop.step([0.0, 0.0])
    assert (refused.reason, refused.detail) == (
        "BAD_SHAPE",
        "observation: expected [3] per row, got [2]",
    )


def test_a_killed_process_is_a_miss_and_comes_back(loop: ControlLoop) -> None:
    assert loop.step(ROW).source is Source.FRESH
    (process,) = policy_processes()
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not is_running(process), "the process to end")
    fast = replace(CONFIG, action_bounds=([-1.0, -1.0], [1.0, 1.0]))
    loop.switch(config=replace(fast, deadline_s=0.05))
    sources = []
    wait_until(lambda: sources.append(loop.step(ROW).source) or sources[-1] is Source.FRESH, "answers again")  # type: ignore[func-returns-value]
    assert sources[0] is not Source.FRESH
    assert policy_processes() != [process]


def test_a_process_that_cannot_start_is_tried_again_slowly(server: FakePolicyServer, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    config = replace(CONFIG, action_bounds=([-1.0, -1.0], [1.0, 1.0]), deadline_s=0.02)
    with ControlLoop(PolicyProcess(target=server.target), config) as loop:
        for _ in range(20):
            assert loop.step(ROW, measured=[0.5, 0.5]).source is not Source.FRESH
        monkeypatch.undo()
        wait_until(lambda: loop.step(ROW).source is Source.FRESH, "answers")


def test_closing_ends_the_process(loop: ControlLoop) -> None:
    loop.step(ROW)
    (process,) = policy_processes()
    loop.close()
    wait_until(lambda: not is_running(process), "the process to end")
    assert loop.step(ROW).reason == "LOOP_CLOSED"


def test_a_switch_asks_another_policy_in_the_same_process(loop: ControlLoop) -> None:
    def other_act(request: Any, context: Any) -> Any:
        reply = honest_act(request, context)
        reply.bundle_digest = "e" * 64
        return reply

    loop.step(ROW)
    before = policy_processes()
    with FakePolicyServer(other_act) as other:
        loop.switch(PolicyProcess(target=other.target))
        assert loop.step(ROW).bundle_digest == "e" * 64
        with PolicyClient(other.target) as client, pytest.raises(TypeError):
            loop.switch(client)
    assert policy_processes() == before


ORPHAN = """
import sys
from lom_client import ControlLoop, LoopConfig, PolicyProcess
config = LoopConfig(period_s=10, kinds="position", safe_action=[0.0, 0.0])
loop = ControlLoop(PolicyProcess(target=sys.argv[1]), config)
print(loop.step([0.1, 0.2, 0.3]).source, flush=True)
sys.stdin.read()
"""


def test_no_process_outlives_its_parent(server: FakePolicyServer) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, server.target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "fresh\n"
        (child,) = policy_processes(parent.pid)
        parent.kill()
    wait_until(lambda: not is_running(child), "the process of the killed parent to end", patience_s=PATIENCE_S)


def test_a_forked_process_leaves_the_parents_process_alone(loop: ControlLoop) -> None:
    loop.step(ROW)
    before = policy_processes()
    child = os.fork()
    if child == 0:  # nothing may escape from here
        action = loop.step(ROW)
        loop.close()
        os._exit(0 if (action.level, action.reason) == (Level.SAFE_STOP, "FORKED") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert policy_processes() == before
    assert loop.step(ROW).source is Source.FRESH


def test_nothing_of_the_client_pickles_or_reads_the_wall_clock() -> None:
    forbidden = {"pickle", "multiprocessing", "marshal", "shelve", "datetime"}
    for path in (Path(__file__).parents[2] / "clients" / "python" / "lom_client").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not forbidden & {name.partition(".")[0] for name in names}, path.name
            is_wall_clock = isinstance(node, ast.Attribute) and node.attr in ("time", "time_ns")
            assert not (is_wall_clock and ast.unparse(node) in ("time.time", "time.time_ns")), path.name


def test_a_function_cannot_go_along_into_another_process() -> None:
    with pytest.raises(ValueError, match=r"^config\.trace_headers: expected none"):
        PolicyProcess(target="grpc://127.0.0.1:8001", config=ClientConfig(trace_headers=dict))
