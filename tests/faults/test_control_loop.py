"""Its server is killed, frozen, late, cut off or swapped, and the loop goes on: an action every tick, none wrong."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from lom_api.v1 import admin_pb2, admin_pb2_grpc
from lom_client import ClientConfig, ControlLoop, Flag, Level, LoopConfig, PolicyClient, PolicyProcess, Source
from tests.support.bundles import POLICY, Flaws, write_test_bundle, write_test_repository
from tests.support.control_loops import BOUNDS, RunningLoop, hundred_hertz, running_loop
from tests.support.fake_policy_server import (
    FakePolicyServer,
    FakePolicyServerProcess,
    honest_act,
    honest_spec,
    late_act,
)
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import policy_processes, workers_of
from tests.support.servers import running_server, wait_until

ROW = [0.1, 0.2, 0.3]
IO = ("thread", "process")


@contextmanager
def asking(io: str, target: str, **config: Any) -> Iterator[PolicyClient | PolicyProcess]:
    """Who asks `target`, in a thread or in a process."""
    if io == "process":
        yield PolicyProcess(target=target, config=ClientConfig(**config))
        return
    with PolicyClient(target, config=ClientConfig(**config)) as client:
        yield client


def sources_since(running: RunningLoop, tick: int) -> list[Source]:
    return [action.source for action in running.actions[tick:]]


# -- servers that die, hang or are late


@pytest.mark.parametrize(("io", "kills"), [("thread", 20), ("process", 10)])
def test_kills_at_any_moment(io: str, kills: int) -> None:
    rng = random.Random(kills)
    server = FakePolicyServerProcess()
    reasons: set[str] = set()
    try:
        with asking(io, server.target) as policy, running_loop(policy, hundred_hertz()) as running:
            for _ in range(kills):
                begin = len(running.actions)
                wait_until(lambda: len(running.actions) > begin + 2, "the loop to go on")  # noqa: B023
                time.sleep(rng.uniform(0, 0.01))  # any moment of a period
                server.kill()
                killed_at = len(running.actions)
                server.__exit__()
                wait_until(lambda: len(running.actions) > killed_at + 8, "the loop to go on")  # noqa: B023
                # The tick of the kill may still have been answered, and the one under way when it was counted.
                assert Source.FRESH not in sources_since(running, killed_at + 2)[:6]
                reasons |= {action.reason for action in running.actions[killed_at + 2 :]}
                server = FakePolicyServerProcess(port=server.port)
                running.rearm()
    finally:
        server.__exit__()
    assert "UNAVAILABLE" in reasons


def test_freezes_and_what_a_thawed_server_still_says() -> None:
    with (
        FakePolicyServerProcess() as server,
        PolicyClient(server.target) as client,
        running_loop(client, hundred_hertz(deadline_s=0.0)) as running,
    ):
        for freeze_s in (0.1, 0.5, 2.0):
            server.freeze()
            frozen_at = len(running.actions)
            time.sleep(freeze_s)
            while_frozen = sources_since(running, frozen_at)
            server.thaw()
            running.rearm()
            # Answers from before the freeze may be young enough for two ticks.
            assert Source.FRESH not in while_frozen[3:]
            assert len(while_frozen) >= 1


@pytest.mark.parametrize("deadline_s", [None, 0.0])
@pytest.mark.parametrize("periods", [1, 2, 10])
def test_late_answers(deadline_s: float | None, periods: int) -> None:
    with FakePolicyServer() as server, PolicyClient(server.target) as client:
        client.get_spec(deadline_s=10)
        config = hundred_hertz(deadline_s=deadline_s, stop_limit=10_000)
        with running_loop(client, config) as running:
            server.act = late_act(periods * 0.01)
            late_from = len(running.actions) + 2
            wait_until(lambda: len(running.actions) > late_from + 40, "the loop to go on")
            sources = sources_since(running, late_from)
            server.act = honest_act
            wait_until(lambda: running.last is not None and running.last.source is Source.FRESH, "a fresh action")
    if deadline_s is None or periods > 1:
        assert Source.FRESH not in sources


def test_answers_out_of_order_on_a_stream() -> None:
    rng = random.Random(5)

    def shuffled(request: Any, context: Any) -> Any:
        time.sleep(rng.choice([0.0, 0.0, 0.002, 0.012, 0.03]))
        return honest_act(request, context)

    with FakePolicyServer() as server, PolicyClient(server.target, config=ClientConfig(use_stream=True)) as client:
        client.get_spec(deadline_s=10)
        with running_loop(client, hundred_hertz(deadline_s=0.0, stop_limit=10_000)) as running:
            server.act = shuffled
            wait_until(lambda: running.loop.counters.fresh > 60, "fresh answers among the late ones")
            wait_until(lambda: running.loop.counters.ticks > running.loop.counters.fresh + 20, "misses")


def test_a_server_with_another_contract_moves_nothing() -> None:
    with FakePolicyServer() as server:
        policy = PolicyProcess(target=server.target)
        with ControlLoop(policy, LoopConfig(period_s=10, kinds="position", safe_action=[0.0, 0.0])) as loop:
            assert loop.step(ROW).source is Source.FRESH
            spec = honest_spec()
            spec.contract_hash = "e" * 64
            server.spec = spec
            # Another process makes another client, which agrees on the contract that it finds.
            (process,) = policy_processes()
            os.kill(process, signal.SIGKILL)
            wait_until(lambda: process not in policy_processes() and bool(policy_processes()), "another process")
            actions = [loop.step([-0.9, -0.9, 0.0]) for _ in range(5)]
    assert {action.reason for action in actions} == {"CONTRACT_MISMATCH"}
    for action in actions:
        np.testing.assert_array_equal(action.values, np.array(ROW[:2], np.float32))


# -- networks


@pytest.mark.parametrize("fault", ["cut", "cut_replies", "reset"])
def test_a_network_that_fails_and_heals(fault: str) -> None:
    with (
        FakePolicyServer() as server,
        FaultProxy(server.port) as proxy,
        PolicyClient(proxy.target) as client,
        running_loop(client, hundred_hertz()) as running,
    ):
        for number in range(3):
            getattr(proxy, fault)()
            cut_at = len(running.actions) + 2
            periods = (5, 40, 120)[number]
            wait_until(lambda: len(running.actions) > cut_at + periods, "the loop to go on")  # noqa: B023
            assert Source.FRESH not in sources_since(running, cut_at)
            level = running.actions[-1].level
            assert level in ((Level.DEGRADED, Level.FALLBACK, Level.SAFE_STOP) if number == 0 else (Level.SAFE_STOP,))
            proxy.heal()
            running.rearm()


def test_a_slow_network_is_followed_by_polling() -> None:
    with (
        FakePolicyServer() as server,
        FaultProxy(server.port, delay_s=0.003) as proxy,
        PolicyClient(proxy.target) as client,
        running_loop(client, hundred_hertz(deadline_s=0.0, max_age_s=0.1, stop_limit=10_000)) as running,
    ):
        wait_until(lambda: running.loop.counters.fresh > 50, "fresh actions")
        ages_s = [action.age_s for action in running.actions if action.source is Source.FRESH]
    assert min(age_s for age_s in ages_s if age_s is not None) > 0.006


# -- real servers


@contextmanager
def administrator(address: str) -> Iterator[Any]:
    with grpc.insecure_channel(address) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def test_hot_swaps_at_a_hundred_hertz(tmp_path: Path) -> None:
    models, admin = tmp_path / "models", f"unix:{tmp_path}/admin.sock"
    write_test_repository(models, {POLICY: {1: Flaws(), 2: Flaws(action_offset=0.25)}})
    config = hundred_hertz(slew_per_s=2.0, stop_limit=10_000)
    with (
        running_server(models, "--admin-listen", admin) as server,
        administrator(admin) as operator,
        PolicyClient(f"grpc://{server.address}") as client,
    ):
        operator.LoadPolicy(admin_pb2.LoadPolicyRequest(policy=POLICY, version=1), timeout=60)
        client.get_spec(deadline_s=10)
        with running_loop(client, config, lambda index: np.array([0.1, 0.3, 0.9 + 1e-6 * index])) as running:
            for number in range(6):
                version = 1 + number % 2
                operator.PromotePolicy(admin_pb2.PromotePolicyRequest(policy=POLICY, version=version), timeout=60)
                wait_until(lambda: running.last is not None and running.last.version == version, "the swap")  # noqa: B023
    changes = [action for action in running.actions if Flag.BUNDLE_CHANGED in action.flags]
    assert len(changes) >= 4
    assert len({action.bundle_digest for action in running.actions if action.bundle_digest}) == 2
    assert all(action.flags & (Flag.BLENDED | Flag.SLEW_LIMITED) for action in changes)


def test_a_killed_worker_of_a_real_server(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "toy")
    with (
        running_server(tmp_path / "toy") as server,
        PolicyClient(f"grpc://{server.address}") as client,
        running_loop(client, hundred_hertz()) as running,
    ):
        (worker,) = workers_of(server.process.pid)
        os.kill(worker, signal.SIGKILL)
        killed_at = len(running.actions)
        wait_until(lambda: len(running.actions) > killed_at + 8, "the loop to go on")
        assert Source.FRESH not in sources_since(running, killed_at + 2)[:6]
        running.rearm()


def test_a_real_server_restarted_with_another_contract_moves_nothing(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "first")
    write_test_bundle(tmp_path / "second", flaws=Flaws(observation_bound=5.0))
    config = LoopConfig(period_s=10, kinds="position", safe_action=[0.0, 0.0], action_bounds=BOUNDS, stop_limit=10_000)
    with running_server(tmp_path / "first") as server:
        client = PolicyClient(f"grpc://{server.address}")
        loop = ControlLoop(client, config)
        first = loop.step(ROW)
        assert first.source is Source.FRESH
    reasons: set[str] = set()
    with client, loop, running_server(tmp_path / "second", listen=server.address):

        def meets_the_other() -> bool:
            action = loop.step([0.9, 0.1, 0.1])
            assert action.source is not Source.FRESH
            np.testing.assert_array_equal(action.values, first.values)
            reasons.add(action.reason)
            return action.reason == "CONTRACT_MISMATCH"

        wait_until(meets_the_other, "the other contract")


def test_two_loops_on_one_client_do_not_mix() -> None:
    with (
        FakePolicyServer() as server,
        PolicyClient(server.target) as client,
        ControlLoop(client, LoopConfig(period_s=10, kinds="position", safe_action=[0.0, 0.0])) as left,
        ControlLoop(client, LoopConfig(period_s=10, kinds="position", safe_action=[0.0, 0.0])) as right,
    ):
        wrong: list[Any] = []

        def run(loop: ControlLoop, sign: float) -> None:
            for number in range(1, 101):
                action = loop.step([sign * number / 200, 0.0, 0.0])
                if action.source is Source.FRESH and action.values[0] != np.float32(sign * number / 200):
                    wrong.append(action)

        threads = [threading.Thread(target=run, args=pair) for pair in ((left, 1.0), (right, -1.0))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
