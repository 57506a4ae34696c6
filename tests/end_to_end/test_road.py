"""Data → lom-train → lom-export → lom-serve → client: the commands as a user types them, small."""

import json
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lom.envs.fork import fork_demonstrations
from lom.run import load_run
from lom_bundle import read_bundle
from lom_client import ContractMismatch, InvalidRequest, PolicyClient, PolicyNotFound
from tests.support.servers import ServerProcess, running_server, start_server_process

QUICK = ["--preset", "small", "--mixture-steps", "300", "--steps", "300", "--eval-episodes", "3"]


def command(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / name
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run and its bundle."""
    folder = tmp_path_factory.mktemp("road")
    np.savez(folder / "fork.npz", **fork_demonstrations(episodes=60, seed=0))  # type: ignore[arg-type]
    for step in (
        command("lom-train", folder / "fork.npz", "--env", "lom/Fork-v0", "--out", folder / "run", *QUICK),
        command("lom-export", folder / "run", "--out", folder / "bundle"),
    ):
        assert step.returncode == 0, step.stderr
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with running_server(folder / "bundle") as server:
        yield server


@pytest.fixture(scope="module")
def target(server: ServerProcess) -> str:
    return f"grpc://{server.address}"


@pytest.mark.parametrize("variant", ["greedy_mode", "actor"])
@pytest.mark.parametrize("rows", [1, 64])
def test_served_actions_are_torchs(folder: Path, target: str, variant: str, rows: int) -> None:
    policy = load_run(folder / "run").policy
    observations = np.random.default_rng(rows).uniform(-1.5, 1.5, (rows, 2)).astype(np.float32)
    with torch.no_grad():
        expected = policy(torch.from_numpy(observations), variant)
    with PolicyClient(target) as client:
        answer = client.act(observations, deadline_s=10.0, variant=variant)
    clear = ~(expected["margin"].numpy() < 1e-4)
    assert answer.mode is not None
    np.testing.assert_array_equal(answer.mode[clear], expected["mode"].numpy()[clear])
    action_range = 2.0
    difference = np.abs(answer.actions - expected["action"].numpy())[clear]
    assert clear.mean() > 0.95
    assert difference.max() <= 1e-5 * action_range


@pytest.mark.parametrize("variant", ["greedy_mode", "actor"])
def test_a_row_alone_is_the_row_in_a_batch(target: str, variant: str) -> None:
    observations = np.random.default_rng(5).uniform(-1.5, 1.5, (64, 2)).astype(np.float32)
    with PolicyClient(target) as client:
        together = client.act(observations, deadline_s=10.0, variant=variant)
        alone = [client.act(row, deadline_s=10.0, variant=variant) for row in observations]
    assert together.margin is not None
    assert together.mode is not None
    clear = ~np.less(together.margin, 1e-4)
    difference = np.abs(together.actions - np.stack([answer.actions for answer in alone]))
    assert difference[clear].max() <= 1e-5 * 2.0
    np.testing.assert_array_equal(together.mode[clear], np.array([answer.mode for answer in alone])[clear])


@pytest.mark.parametrize("variant", ["greedy_mode", "actor"])
def test_both_variants_are_explained_and_take_a_mode(target: str, variant: str) -> None:
    observations = np.random.default_rng(6).uniform(-1.5, 1.5, (16, 2)).astype(np.float32)
    with PolicyClient(target) as client:
        chosen = client.act(observations, deadline_s=10.0, variant=variant, explain=True)
        assert chosen.explanation is not None
        forced = client.act(observations, deadline_s=10.0, variant=variant, mode=3, explain=True)
        previous = chosen.explanation.hyper_q.argsort(axis=1)[:, -2]
        kept = client.act(observations, deadline_s=10.0, variant=variant, previous_mode=previous, hysteresis_width=1e6)
    assert chosen.explanation.component_means.shape == (16, 8, 2)
    assert forced.mode is not None
    assert forced.mode.tolist() == [3] * 16
    assert forced.explanation is not None
    deviation = np.abs(forced.actions - forced.explanation.component_means[:, 3])
    reach = 3.0 * np.exp(forced.explanation.component_log_stds[:, 3]) if variant == "actor" else np.zeros((16, 2))
    assert (deviation <= reach + 1e-5).all()
    supported = np.take_along_axis(chosen.explanation.mixing_weights, previous[:, None], 1)[:, 0] > 0.06
    assert kept.mode is not None
    np.testing.assert_array_equal(kept.mode[supported], previous[supported])
    assert supported.any()


def test_every_answer_names_the_bundle_and_the_variant_that_ran(folder: Path, target: str) -> None:
    bundle = read_bundle(folder / "bundle")
    with PolicyClient(target) as client:
        default = client.act(np.zeros(2), deadline_s=10.0)
        actor = client.act(np.zeros(2), deadline_s=10.0, variant="actor")
    assert default.variant == bundle.manifest.default_variant == "greedy_mode"
    assert actor.variant == "actor"
    assert actor.mode == default.mode
    assert default.bundle_digest == actor.bundle_digest == bundle.digest
    assert default.policy == "fork-v0"
    assert set(default.scores) == set(actor.scores) == {"state_score", "action_score"}
    with PolicyClient(target) as client:
        nowhere = client.act(np.array([-1.4, 1.4]), deadline_s=10.0)  # where no demonstrator went
        with pytest.raises(InvalidRequest, match=r"^OBS_OUT_OF_RANGE: "):
            client.act(np.array([60.0, -60.0]), deadline_s=10.0)  # degrees for radians, say
    assert bool(nowhere.scores["state_score"].warns)


def test_lom_act_plays_the_served_policy_and_reports(target: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    played = command("lom-act", "--target", target, "--env", "lom/Fork-v0", "--episodes", 5, "--json", report)
    assert played.returncode == 0, played.stderr
    numbers = json.loads(report.read_text())
    assert numbers["episodes"] == 5
    assert numbers["return_mean"] == pytest.approx(np.mean(numbers["returns"]))
    assert 0 <= numbers["success_rate"] <= 1
    assert 0 < numbers["latency_p50_us"] <= numbers["latency_p99_us"]
    again = command("lom-act", "--target", target, "--env", "lom/Fork-v0", "--episodes", 5, "--json", report)
    assert again.returncode == 0
    assert json.loads(report.read_text())["returns"] == numbers["returns"]  # seeded: the same episodes again


def test_lom_act_refuses_another_environment(target: str) -> None:
    played = command("lom-act", "--target", target, "--env", "Pendulum-v1", "--episodes", 1)
    assert played.returncode != 0
    assert "the environment has 3" in played.stderr
    assert "Traceback" not in played.stderr


def test_an_unknown_policy_is_named(target: str) -> None:
    with PolicyClient(target, policy="spoon") as client, pytest.raises(PolicyNotFound):
        client.act(np.zeros(2), deadline_s=10.0)


def test_a_busy_port_is_one_clear_line(folder: Path, server: ServerProcess) -> None:
    second = start_server_process(folder / "bundle", listen=server.address)
    assert second.wait() != 0
    assert server.address in "\n".join(second.stderr)
    assert not any("Traceback" in line for line in second.stderr)


def test_a_run_is_no_bundle(folder: Path) -> None:
    refused = start_server_process(folder / "run")
    assert refused.wait() != 0
    assert refused.stderr == [
        "lom-serve: BUNDLE_NOT_FOUND: expected at least one POLICY/VERSION/ with a bundle, found none"
    ]


def test_a_client_keeps_to_its_contract_when_the_server_returns_with_another(folder: Path, tmp_path: Path) -> None:
    """Same port, same policy name, other action bounds: no action may reach the robot."""
    from tests.support.runs import save_untrained_run

    save_untrained_run(tmp_path / "run", action_low=(-2.0, -2.0), action_high=(2.0, 2.0))
    other = command("lom-export", tmp_path / "run", "--out", tmp_path / "bundle", "--name", "fork-v0")
    assert other.returncode == 0, other.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    with PolicyClient(f"grpc://{listen}") as client:
        with running_server(folder / "bundle", listen=listen):
            client.act(np.zeros(2), deadline_s=10.0)
        with running_server(tmp_path / "bundle", listen=listen), pytest.raises(ContractMismatch):
            answer_when_reachable(client)


def answer_when_reachable(client: PolicyClient) -> None:
    from lom_client import DeadlineExceeded, ServerUnavailable

    for _ in range(200):
        try:
            client.act(np.zeros(2), deadline_s=1.0)
        except (ServerUnavailable, DeadlineExceeded):
            continue
        return


def test_sigterm_ends_a_server_cleanly(folder: Path) -> None:
    with running_server(folder / "bundle") as server:
        assert server.terminate() == 0
    assert [line for line in server.stderr if " INFO " not in line] == []
