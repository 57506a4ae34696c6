"""`lom_server.server` in process, and the processes of a whole `lom-serve` with all of its listeners."""

import asyncio
import os
import shutil
import signal
import socket
import stat
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from lom_api.codec import pack_array
from lom_api.v1 import admin_pb2, admin_pb2_grpc, policy_pb2, policy_pb2_grpc
from lom_server.config import ServerConfig
from lom_server.errors import StartError
from lom_server.server import serve
from tests.support.bundles import Flaws, write_test_bundle
from tests.support.processes import is_running, workers_of
from tests.support.servers import PATIENCE_S, ServerProcess, running_server, wait_until

WORKERS = 2
CONNECTIONS = 8
ACT_TOKEN, ADMIN_TOKEN, LATER_TOKEN = "a" * 16, "b" * 16, "c" * 16
MIB = 1024 * 1024


@dataclass(kw_only=True)
class Server:
    """A `lom-serve` process with its listeners."""

    process: ServerProcess
    repository: Path
    tokens: Path
    admin: str
    metrics: str

    def workers(self) -> set[int]:
        return workers_of(self.process.process.pid)

    def act(self, *, token: str = ACT_TOKEN, policy: str = "toy") -> policy_pb2.ActReply:
        """Over a connection of its own."""
        with connection(self.process.address) as channel:
            return policy_pb2_grpc.PolicyServiceStub(channel).Act(
                request(policy), timeout=PATIENCE_S, metadata=credentials(token)
            )

    @contextmanager
    def operator(self) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
        with connection(self.admin) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    def load(self, policy: str, version: int = 0, *, promote: bool = False) -> admin_pb2.PolicyState:
        with self.operator() as stub:
            return stub.LoadPolicy(
                admin_pb2.LoadPolicyRequest(policy=policy, version=version, promote=promote),
                timeout=PATIENCE_S,
                metadata=credentials(ADMIN_TOKEN),
            )

    def measured(self, metric: str) -> float:
        """The value of one metric, with its labels."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=PATIENCE_S) as page:
            for line in page.read().decode().splitlines():
                name, _, value = line.rpartition(" ")
                if name == metric:
                    return float(value)
        return 0.0


@contextmanager
def connection(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


def raw_call(channel: grpc.Channel, method: str) -> Any:
    """A method without a serialiser."""
    return channel.unary_unary(f"/{method}")


def reason_of(call: Any) -> str:
    """Why it failed."""
    return str(call.exception().details()).partition(":")[0]


def request(policy: str) -> policy_pb2.ActRequest:
    observation = np.array([[0.1, 0.3, 0.2]], dtype=np.float32)
    return policy_pb2.ActRequest(policy=policy, inputs=[pack_array(observation, "observation")])


def credentials(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


def write_tokens(path: Path, act_token: str) -> None:
    path.write_text(f"act robot {act_token}\nadmin operator {ADMIN_TOKEN}\n")
    path.chmod(0o600)


def resident_bytes(process: int) -> int:
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves `toy` in version 2 of 1 and 2, with tokens, to robots, operators and scrapers."""
    folder = tmp_path_factory.mktemp("server")
    write_test_bundle(folder / "models" / "toy" / "1")
    write_test_bundle(folder / "models" / "toy" / "2", flaws=Flaws(action_offset=0.25))
    write_tokens(folder / "tokens", ACT_TOKEN)
    admin = f"unix:{folder}/admin.sock"
    with running_server(
        *(folder / "models", "--workers", str(WORKERS), "--max-batch-rows", "16"),
        *("--admin-listen", admin, "--metrics-listen", "127.0.0.1:0", "--tokens", str(folder / "tokens")),
    ) as process:
        metrics = process.stdout[0].split(" metrics=")[1].split()[0]
        yield Server(
            process=process, repository=folder / "models", tokens=folder / "tokens", admin=admin, metrics=metrics
        )


def test_the_admin_socket_is_its_owners_alone(server: Server) -> None:
    mode = os.stat(server.admin.removeprefix("unix:")).st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_robots_cannot_reach_the_admin_service(server: Server) -> None:
    with connection(server.process.address) as channel:
        for method in (
            *(f"lom_api.v1.AdminService/{name}" for name in ("ListPolicies", "LoadPolicy", "UnloadPolicy")),
            *(f"lom_api.v1.AdminService/{name}" for name in ("PromotePolicy", "RollBackPolicy")),
        ):
            with pytest.raises(grpc.RpcError) as refusal:
                raw_call(channel, method)(b"", timeout=PATIENCE_S, metadata=credentials(ADMIN_TOKEN))
            assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_robots_token_is_none_of_an_operator(server: Server) -> None:
    with server.operator() as stub:
        for metadata, code, reason in (
            (
                credentials(ACT_TOKEN),
                grpc.StatusCode.PERMISSION_DENIED,
                "ROLE_REQUIRED: expected a token of role admin",
            ),
            (credentials("x" * 16), grpc.StatusCode.UNAUTHENTICATED, "AUTH_REQUIRED: "),
            ((), grpc.StatusCode.UNAUTHENTICATED, "AUTH_REQUIRED: "),
        ):
            with pytest.raises(grpc.RpcError) as refusal:
                stub.ListPolicies(admin_pb2.ListPoliciesRequest(), timeout=PATIENCE_S, metadata=metadata)
            assert refusal.value.code() is code
            assert str(refusal.value.details()).startswith(reason)


def test_loads_swaps_and_restarts_are_measured(server: Server) -> None:
    metrics = [
        'lom_loads_total{result="OK"}',
        'lom_loads_total{result="BUNDLE_INCOMPLETE"}',
        "lom_swaps_total",
        "lom_worker_restarts_total",
    ]
    before = [server.measured(metric) for metric in metrics]
    server.load("toy", 1)  # beside the other: no swap
    server.load("toy", 1, promote=True)
    server.load("toy", 2, promote=True)
    write_test_bundle(server.repository / "bad" / "1", policy="bad")
    (server.repository / "bad" / "1" / "golden.npz").unlink()
    with pytest.raises(grpc.RpcError, match="BUNDLE_INCOMPLETE: "):
        server.load("bad")
    victim = min(server.workers())
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in server.workers() and len(server.workers()) == WORKERS, "the worker is replaced")
    after = [server.measured(metric) for metric in metrics]
    assert [now - then for now, then in zip(after, before, strict=True)] == [3, 1, 2, 1]
    wait_until(lambda: server.measured("lom_workers") == WORKERS, "all workers are measured")
    asked = 'lom_requests_total{code="OK",policy="toy"}'
    answered = server.measured(asked)
    for _ in range(CONNECTIONS):
        server.act()
    wait_until(lambda: server.measured(asked) == answered + CONNECTIONS, "answers of every worker are counted")


def test_a_worker_that_is_stopped_does_not_hold_a_scrape_up(server: Server) -> None:
    victim = min(server.workers())
    os.kill(victim, signal.SIGSTOP)
    try:
        assert server.measured("lom_workers") == WORKERS
    finally:
        os.kill(victim, signal.SIGCONT)


def test_sighup_has_every_worker_read_the_tokens_again(server: Server) -> None:
    def accepted(token: str) -> set[bool]:
        """What connections, which the system spreads over the workers, find."""
        answers = set()
        for _ in range(CONNECTIONS):
            try:
                server.act(token=token)
                answers.add(True)
            except grpc.RpcError:
                answers.add(False)
        return answers

    assert accepted(LATER_TOKEN) == {False}
    write_tokens(server.tokens, LATER_TOKEN)
    try:
        server.process.process.send_signal(signal.SIGHUP)
        wait_until(lambda: accepted(ACT_TOKEN) == {False}, "the old token is unknown")
        assert accepted(LATER_TOKEN) == {True}
    finally:
        write_tokens(server.tokens, ACT_TOKEN)
        server.process.process.send_signal(signal.SIGHUP)
    wait_until(lambda: accepted(ACT_TOKEN) == {True}, "the first tokens are known again")


@contextmanager
def asking(server: Server, answers: dict[str, int]) -> Iterator[None]:
    """Asks without a pause meanwhile; counts digests, and what was no answer."""
    done = threading.Event()

    def ask() -> None:
        with connection(server.process.address) as channel:
            stub = policy_pb2_grpc.PolicyServiceStub(channel)
            while not done.is_set():
                try:
                    reply = stub.Act(request("toy"), timeout=PATIENCE_S, metadata=credentials(ACT_TOKEN))
                    answer = reply.bundle_digest
                except grpc.RpcError as error:
                    answer = str(error.details())
                answers[answer] = answers.get(answer, 0) + 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def grown_bytes(server: Server, work: Callable[[], None]) -> Mapping[int, int]:
    """How much more memory each process holds after `work`; negative where it holds less."""
    processes = {server.process.process.pid, *server.workers()}
    before = {process: resident_bytes(process) for process in processes}
    work()
    return {process: resident_bytes(process) - before[process] for process in processes}


def test_failed_loads_cost_no_answer_and_no_memory(server: Server) -> None:
    digest = server.act().bundle_digest
    names = [f"broken-{number}" for number in range(3)]
    for name in names:
        write_test_bundle(server.repository / name / "1", policy=name)
        (server.repository / name / "1" / "actor.onnx").unlink()

    def fail(times: int) -> None:
        with server.operator() as stub:
            for _ in range(times):
                loads = [
                    stub.LoadPolicy.future(
                        admin_pb2.LoadPolicyRequest(policy=name),
                        timeout=4 * PATIENCE_S,
                        metadata=credentials(ADMIN_TOKEN),
                    )
                    for name in names
                ]
                assert {reason_of(load) for load in loads} == {"BUNDLE_INCOMPLETE"}

    answers: dict[str, int] = {}
    with asking(server, answers):
        fail(2)  # what is imported and cached once
        grown = grown_bytes(server, lambda: fail(8))
    assert answers.keys() == {digest}
    for process, grown_by in grown.items():
        assert grown_by <= 0.02 * resident_bytes(process), f"{grown_by / MIB:.1f} MiB"


def test_versions_that_are_swapped_out_are_let_go_of(server: Server) -> None:
    def swap(first: int, last: int) -> None:
        for number in range(first, last):
            shutil.rmtree(server.repository / "swapped", ignore_errors=True)
            flaws = Flaws(burn_layers=1, action_offset=number / 100)  # three graphs of a megabyte each
            write_test_bundle(server.repository / "swapped" / "1", policy="swapped", flaws=flaws)
            server.load("swapped")

    swap(0, 3)
    grown = grown_bytes(server, lambda: swap(3, 13))
    assert all(grown_by < 12 * MIB for grown_by in grown.values()), grown


# Servers of their own.


def test_workers_do_not_outlive_their_supervisor(toy_bundle: Path) -> None:
    with running_server(toy_bundle, "--workers", str(WORKERS)) as server:
        workers = workers_of(server.process.pid)
        assert len(workers) == WORKERS
        server.process.kill()
        wait_until(lambda: not any(map(is_running, workers)), "the workers end")
        wait_until(lambda: can_be_bound(server.address), "the port is free")


def can_be_bound(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_server((host, int(port))).close()
    except OSError:
        return False
    return True


def test_a_second_sigterm_ends_a_drain_at_once(toy_bundle: Path, tmp_path: Path) -> None:
    admin = tmp_path / "admin.sock"
    with running_server(toy_bundle, "--grace-s", "3600", "--admin-listen", f"unix:{admin}") as server:
        (worker,) = workers_of(server.process.pid)
        os.kill(worker, signal.SIGSTOP)  # so that its drain takes for ever
        try:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not admin.exists(), "the drain has begun")
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(PATIENCE_S) == 128 + signal.SIGTERM
        finally:
            os.kill(worker, signal.SIGCONT)
        wait_until(lambda: not is_running(worker), "the worker follows")


@pytest.mark.parametrize("options", [("--tls-certificate", "tls", "--tls-key", "tls"), ("--tokens", "tls")])
def test_files_that_cannot_be_used_are_named_in_one_line(
    toy_bundle: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "tls").write_text("neither a certificate nor tokens\n")
    (tmp_path / "tls").chmod(0o600)
    config = {
        "tls_certificate": tmp_path / "tls" if "--tls-key" in options else None,
        "tls_key": tmp_path / "tls" if "--tls-key" in options else None,
        "tokens": tmp_path / "tls" if "--tokens" in options else None,
    }

    async def start() -> None:
        async with serve(ServerConfig(models=toy_bundle, listen="127.0.0.1:0", **config)):  # type: ignore[arg-type]
            raise AssertionError("it serves")

    with pytest.raises(StartError, match=r"^BAD_(CERTIFICATE|TOKENS): "):
        asyncio.run(start())


async def test_stopping_twice_is_stopping_once(toy_bundle: Path) -> None:
    async with serve(ServerConfig(models=toy_bundle, listen="127.0.0.1:0")) as server:
        assert all(await asyncio.gather(server.stop(), server.stop()))


async def test_two_servers_in_one_process_do_not_meet(toy_bundle: Path, tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", policy="other")
    async with (
        serve(ServerConfig(models=toy_bundle, listen="127.0.0.1:0")) as one,
        serve(ServerConfig(models=tmp_path / "bundle", listen="127.0.0.1:0")) as other,
    ):
        assert one.address != other.address
        assert list(one.supervisor.published) == ["toy"]
        assert list(other.supervisor.published) == ["other"]


async def test_a_listener_that_is_not_to_be_had_ends_what_was_started(toy_bundle: Path, tmp_path: Path) -> None:
    nowhere = ServerConfig(models=toy_bundle, listen="127.0.0.1:0", admin_listen=f"unix:{tmp_path}/no/such/folder")
    with pytest.raises(StartError, match=r"^ADDRESS_UNAVAILABLE: "):
        async with serve(nowhere):
            raise AssertionError("it serves")
    assert workers_of(os.getpid()) == set()
