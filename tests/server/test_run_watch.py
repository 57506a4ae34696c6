"""`lom_server.run_watch` over real runs of real graphs."""

import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from lom_api.reasons import Reason
from lom_bundle import read_bundle
from lom_server.engine import OnnxEngine
from lom_server.errors import PolicyError
from lom_server.run_watch import EXIT_HUNG, RunWatch
from tests.support.bundles import Flaws, write_test_bundle
from tests.support.servers import PATIENCE_S, wait_until

LIMIT_S = 0.2
TOO_MANY_ROWS = np.zeros((1024, 3), dtype=np.float32)  # 0.5 gigaflop in each of the layers
ONE_ROW = TOO_MANY_ROWS[:1]

UNSTOPPABLE = """
import sys
import numpy as np
from lom_bundle import read_bundle
from lom_server.engine import OnnxEngine
from lom_server.run_watch import RunWatch
engine = OnnxEngine(read_bundle(sys.argv[1]), provider="cpu")
watch = RunWatch(lambda: [engine], 0.02, lambda: print("hung", flush=True))
engine.run("actor", ["action"], {"observation": np.zeros((100_000, 3), dtype=np.float32)})
print("not reached")
"""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> OnnxEngine:
    path = tmp_path_factory.mktemp("bundles") / "slow"
    write_test_bundle(path, flaws=Flaws(burn_layers=300))
    return OnnxEngine(read_bundle(path), provider="cpu")


def run(engine: OnnxEngine, observation: np.ndarray) -> None:
    engine.run("actor", ["action"], {"observation": observation})


def test_a_run_beyond_the_limit_is_stopped_and_reported_once(engine: OnnxEngine) -> None:
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()
    watch = RunWatch(lambda: [engine], LIMIT_S, lambda: reports.put(threading.current_thread().name))
    try:
        for _ in range(2):
            with pytest.raises(PolicyError) as refusal:
                run(engine, TOO_MANY_ROWS)
            assert refusal.value.reason is Reason.INFERENCE_FAILED
            assert reports.get(timeout=PATIENCE_S) == "lom-run-watch"
            run(engine, ONE_ROW)  # the engine answers on
        assert reports.empty()
    finally:
        watch.close()


def test_runs_within_the_limit_are_left_alone(engine: OnnxEngine) -> None:
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()
    watch = RunWatch(lambda: [engine], 600.0, lambda: reports.put("hung"))
    try:
        run(engine, ONE_ROW)
        assert reports.empty()
    finally:
        watch.close()


def test_engines_that_come_later_are_watched_too(engine: OnnxEngine) -> None:
    engines: list[OnnxEngine] = []
    watch = RunWatch(lambda: tuple(engines), LIMIT_S, lambda: None)
    try:
        engines.append(engine)
        with pytest.raises(PolicyError):
            run(engine, TOO_MANY_ROWS)
    finally:
        watch.close()


def test_closing_ends_the_thread(engine: OnnxEngine) -> None:
    before = threading.active_count()
    watch = RunWatch(lambda: [engine], 600.0, lambda: None)  # looks every 30 s
    watch.close()
    wait_until(lambda: threading.active_count() == before, "the thread ends")


def test_a_run_that_cannot_be_stopped_ends_the_process(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=Flaws(burn_layers=1))  # one operator that takes all of the time
    child = subprocess.run(
        [sys.executable, "-c", UNSTOPPABLE, str(tmp_path / "bundle")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert child.returncode == EXIT_HUNG
    assert child.stdout == "hung\n"
    assert "could not be stopped" in child.stderr
