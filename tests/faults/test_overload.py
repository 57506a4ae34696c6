"""A server that is asked five times what it can answer, and a loop among those who ask."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lom_client import PolicyClient, Source
from tests.support.bundles import Flaws, write_test_bundle
from tests.support.control_loops import hundred_hertz, running_loop
from tests.support.servers import running_server

SECONDS = 6.0
# A row burns about 10 ms of a core.
BURNING = Flaws(burn_layers=640)
OVERLOAD_REASONS = {"DEADLINE_INFEASIBLE", "QUEUE_FULL", "TOO_MANY_CALLS"}


def test_a_loop_asks_about_twice_as_often_as_it_is_answered(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "toy", flaws=BURNING)
    options = ("--max-batch-rows", "1", "--inference", "thread")
    config = hundred_hertz(period_s=0.05, max_age_s=0.1, slew_per_s=1.0)
    with (
        running_server(tmp_path / "toy", *options) as server,
        PolicyClient(f"grpc://{server.address}") as client,
        running_loop(client, config) as running,
    ):
        # More would ask whether this machine can refuse so many, which is a question of how fast it is.
        per_second = 5 / statistics.median(_seconds_to_answer(client) for _ in range(20))
        flood = subprocess.Popen([sys.executable, "-m", "tests.support.flood", server.address, str(per_second)])
        try:
            time.sleep(2.0)  # until it is up
            begin = len(running.actions)
            time.sleep(SECONDS)
            ticks = running.actions[begin:]
            assert flood.poll() is None
        finally:
            flood.kill()
            flood.wait()
    accepted = sum(action.source is Source.FRESH for action in ticks)
    refused = sum(action.reason in OVERLOAD_REASONS for action in ticks)
    left_out = sum(action.reason == "THROTTLED" for action in ticks)
    # A loop that is never answered still asks about four times a second, to see whether the server has recovered; one
    # that does not hold back would be refused about twenty times a second.
    assert refused <= accepted + 8 * SECONDS
    assert left_out > len(ticks) / 3


def _seconds_to_answer(client: PolicyClient) -> float:
    began_at = time.perf_counter()
    client.act(np.zeros(3, dtype=np.float32), deadline_s=5.0)
    return time.perf_counter() - began_at
