"""`lom-serve` as an operator meets it: real processes, their lines, their exit statuses."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lom_api.codec import pack_array
from lom_api.v1 import policy_pb2, policy_pb2_grpc
from tests.support.bundles import POLICY, Flaws, write_test_bundle
from tests.support.processes import children_of
from tests.support.servers import PATIENCE_S, ServerProcess, running_server, start_server_process, wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

SLOW_TO_PROVE = Flaws(burn_layers=300)
# Connects as soon as the port is open, so that nothing of a start is missed.
IMPATIENT = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 50),
]


def refused_start(bundle: Path, *options: str, listen: str = "127.0.0.1:0") -> tuple[int, str]:
    """Exit status and the one line on stderr of a server that must not start."""
    server = start_server_process(bundle, *options, listen=listen)
    code = server.wait()
    assert server.stdout == []
    assert len(server.stderr) == 1, server.stderr
    return code, server.stderr[0]


def complaints(server: ServerProcess) -> list[str]:
    """What the server logged beyond its notes on what it does."""
    return [line for line in server.stderr if " INFO " not in line]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def act(address: str, rows: int = 1) -> policy_pb2.ActReply:
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        return policy_pb2_grpc.PolicyServiceStub(channel).Act(
            policy_pb2.ActRequest(
                policy=POLICY, inputs=[pack_array(np.zeros((rows, 3), dtype=np.float32), "observation")]
            ),
            timeout=PATIENCE_S,
        )


def test_serves_says_so_in_one_line_and_drains_on_sigterm(toy_bundle: Path) -> None:
    with running_server(toy_bundle) as server:
        assert len(server.stdout) == 1
        line = server.stdout[0]
        assert line.startswith("lom-serve: SERVING policies=toy/1:")
        assert " provider=CPUExecutionProvider address=127.0.0.1:" in line
        assert not server.address.endswith(":0")
        reply = act(server.address)
        assert reply.bundle_digest.startswith(line.split("toy/1:")[1].split()[0])
        assert server.terminate() == 0
        assert complaints(server) == []


def test_not_serving_until_the_golden_rows_pass(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=SLOW_TO_PROVE)
    address = f"127.0.0.1:{free_port()}"
    server = start_server_process(tmp_path / "bundle", "--max-batch-rows", "8", listen=address)
    seen = []
    try:
        with grpc.insecure_channel(address, IMPATIENT) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S, wait_for_ready=True)
            while SERVING not in seen:
                seen.append(next(watch).status)
                if seen == [NOT_SERVING]:
                    assert server.stdout == []
                    with pytest.raises(grpc.RpcError) as refusal:
                        act(address)
                    assert str(refusal.value.details()).startswith("MODEL_LOADING: ")
            assert seen == [NOT_SERVING, SERVING]
            named = health.Check(health_pb2.HealthCheckRequest(service=POLICY), timeout=PATIENCE_S)
            assert named.status == SERVING
    finally:
        server.terminate()


def test_a_start_can_be_given_up(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=SLOW_TO_PROVE)
    address = f"127.0.0.1:{free_port()}"
    server = start_server_process(tmp_path / "bundle", listen=address)
    with grpc.insecure_channel(address, IMPATIENT) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        check = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S, wait_for_ready=True)
    assert check.status == NOT_SERVING
    assert server.terminate() == 0
    assert (server.stdout, complaints(server)) == ([], [])


def test_sigint_drains_too(toy_bundle: Path) -> None:
    with running_server(toy_bundle) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0


def test_a_watcher_does_not_hold_the_drain_up(toy_bundle: Path) -> None:
    with running_server(toy_bundle, "--grace-s", "3600") as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        assert server.wait() == 0


@pytest.mark.parametrize("inference", ["auto", "inline", "thread"])
def test_every_placement_answers(toy_bundle: Path, inference: str) -> None:
    with running_server(toy_bundle, "--inference", inference) as server:
        reply = act(server.address, rows=1000)
        assert list(reply.action.shape) == [1000, 2]


def test_no_bundle_there(tmp_path: Path) -> None:
    code, line = refused_start(tmp_path / "nowhere")
    assert code == 1
    assert line.startswith("lom-serve: BUNDLE_NOT_FOUND: ")


def test_a_folder_without_a_bundle(tmp_path: Path) -> None:
    code, line = refused_start(tmp_path)
    assert code == 1
    assert line == "lom-serve: BUNDLE_NOT_FOUND: expected at least one POLICY/VERSION/ with a bundle, found none"


def test_a_manifest_that_is_none(tmp_path: Path, toy_bundle: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    code, line = refused_start(tmp_path)
    assert code == 1
    assert line.startswith("lom-serve: BAD_MANIFEST: ")


def test_a_flipped_byte(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle")
    graph = tmp_path / "bundle" / "actor.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    code, line = refused_start(tmp_path / "bundle")
    assert code == 1
    assert line.startswith("lom-serve: DIGEST_MISMATCH: actor.onnx")


@pytest.mark.parametrize("flaws", [Flaws(wrong_golden=True), Flaws(nan_above=-0.5)], ids=["wrong", "NaN"])
def test_a_policy_that_fails_its_proof_is_never_served(tmp_path: Path, flaws: Flaws) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=flaws)
    code, line = refused_start(tmp_path / "bundle")
    assert code == 1
    assert line.startswith("lom-serve: SELF_TEST_FAILED: ")


def test_never_two_servers_on_one_port(toy_bundle: Path) -> None:
    with running_server(toy_bundle) as server:
        code, line = refused_start(toy_bundle, listen=server.address)
        assert code == 1
        assert line.startswith(f"lom-serve: ADDRESS_UNAVAILABLE: could not listen on {server.address}")
        act(server.address)


def test_a_stranger_on_the_port_is_no_server_of_ours(toy_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as stranger:
        code, line = refused_start(toy_bundle, listen=f"127.0.0.1:{stranger.getsockname()[1]}")
    assert code == 1
    assert line.startswith("lom-serve: ADDRESS_UNAVAILABLE: ")


def test_several_workers_share_one_port(toy_bundle: Path) -> None:
    with running_server(toy_bundle, "--workers", "2") as server:
        assert len(children_of(server.process.pid)) == 2
        for _ in range(8):  # connections of their own: the system spreads them
            act(server.address)
        assert server.terminate() == 0
    assert complaints(server) == []


def test_plaintext_for_other_machines_needs_consent(toy_bundle: Path) -> None:
    code, line = refused_start(toy_bundle, listen="0.0.0.0:0")
    assert code == 2
    assert "--insecure" in line
    with running_server(toy_bundle, "--insecure", listen="0.0.0.0:0"):
        pass


@pytest.mark.parametrize(
    "options",
    [("--max-batch-rows", "0"), ("--grace-s", "-1"), ("--max-queue-rows", "10"), ("--default-deadline-s", "nan")],
)
def test_a_value_out_of_range_is_one_line(toy_bundle: Path, options: tuple[str, str]) -> None:
    code, line = refused_start(toy_bundle, *options)
    assert code == 2
    assert line.startswith(f"lom-serve: {options[0]}: expected ")


@pytest.mark.parametrize("options", [("--no-such-option",), ("--max-batch-rows", "many"), ("--provider", "tpu")])
def test_a_command_line_that_cannot_be_meant(toy_bundle: Path, options: tuple[str, ...]) -> None:
    server = start_server_process(toy_bundle, *options)
    assert server.wait() == 2
    assert server.stdout == []
    assert options[0] in "\n".join(server.stderr)
    assert "Traceback" not in "\n".join(server.stderr)


def processor_seconds(server: ServerProcess) -> float:
    """Of the server's workers."""
    ticks = 0
    for worker in children_of(server.process.pid):
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs procfs to see the engine at work")
@pytest.mark.parametrize("second_signal", [None, signal.SIGTERM])
def test_signals_while_a_request_is_being_answered(tmp_path: Path, second_signal: signal.Signals | None) -> None:
    # 1024 rows keep the engine busy for about a second.
    write_test_bundle(tmp_path / "bundle", flaws=Flaws(burn_layers=100))
    with (
        running_server(tmp_path / "bundle", "--max-deadline-s", "120") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        idle_s = processor_seconds(server)
        observation = pack_array(np.zeros((1024, 3), dtype=np.float32), "observation")
        call = policy_pb2_grpc.PolicyServiceStub(channel).Act.future(
            policy_pb2.ActRequest(policy=POLICY, inputs=[observation]), timeout=60
        )
        wait_until(lambda: processor_seconds(server) > idle_s + 0.2, "the engine to be at work")
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        next(watch)
        server.process.send_signal(signal.SIGTERM)
        if second_signal is None:
            assert list(call.result().action.shape) == [1024, 2]
            assert server.wait() == 0
        else:
            assert next(watch).status == NOT_SERVING
            server.process.send_signal(second_signal)
            assert server.wait() == 128 + second_signal
            with pytest.raises(grpc.RpcError) as error:
                call.result()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_worker_maps_neither_torch_nor_onnx(toy_bundle: Path) -> None:
    with running_server(toy_bundle) as server:
        act(server.address)
        (worker,) = children_of(server.process.pid)
        libraries = Path(f"/proc/{worker}/maps").read_text()
    assert "/onnxruntime/" in libraries
    assert "/torch/" not in libraries
    assert "/onnx/" not in libraries


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("lom_server.worker", {"torch", "onnx", "lom", "lom_export", "lom_client", "gymnasium"}),
        ("lom_server.main", {"torch", "onnx", "lom", "lom_export", "lom_client", "gymnasium", "onnxruntime"}),
    ],
)
def test_a_process_holds_only_what_it_needs(module: str, forbidden: set[str]) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {name.partition(".")[0] for name in json.loads(output)} & forbidden


def test_the_configuration_can_be_printed_and_read_again(toy_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lom_server.main"]
    first = subprocess.run(
        [*command, str(toy_bundle), "--workers", "3", "--print-config"], check=True, capture_output=True, text=True
    )
    (tmp_path / "lom-serve.toml").write_text(first.stdout)
    again = subprocess.run(
        [*command, "--config", str(tmp_path / "lom-serve.toml"), "--print-config"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "workers = 3  # cli" in first.stdout
    assert "workers = 3  # file" in again.stdout
    assert [line.split("#")[0] for line in again.stdout.splitlines() if "=" in line.split("#")[0]]
