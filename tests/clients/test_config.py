"""Each connection setting has its effect: gRPC ignores a wrong name in silence."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from lom_client import ClientConfig, PolicyClient, PolicyError
from tests.support.fake_policy_server import PATIENCE_S, FakePolicyServer


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keepalive_time_s", 0),
        ("keepalive_timeout_s", float("nan")),
        ("initial_reconnect_backoff_s", 0.6),
        ("max_reconnect_backoff_s", float("inf")),
        ("max_message_bytes", 0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        ClientConfig(**{field: value})


@pytest.mark.parametrize("field", ["tls_certificate", "tls_key"])
def test_a_certificate_and_its_key_come_together(field: str) -> None:
    with pytest.raises(ValueError, match="tls_certificate and tls_key must be given together"):
        ClientConfig(**cast(Any, {field: Path("file.pem")}))


def test_two_clients_share_no_connection() -> None:
    with FakePolicyServer() as server, PolicyClient(server.target) as one, PolicyClient(server.target) as other:
        for client in (one, other, one, other):
            client.act([0, 0, 0], deadline_s=10)
        assert len(set(server.peers)) == 2


def test_the_environment_cannot_route_calls_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with FakePolicyServer() as server, PolicyClient(server.target) as client:
        client.act([0, 0, 0], deadline_s=10)


@contextmanager
def attempts_to_connect(*, close: bool) -> Iterator[tuple[str, threading.Semaphore]]:
    """A peer that speaks no gRPC: closes each connection at once, or stays silent. Releases the semaphore for each."""
    attempts = threading.Semaphore(0)
    connections: list[socket.socket] = []

    def accept_all() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            attempts.release()
            connections.append(connection)
            if close:
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept_all)
        acceptor.start()
        try:
            yield f"grpc://127.0.0.1:{listener.getsockname()[1]}", attempts
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(PATIENCE_S)
            for connection in connections:
                connection.close()


def test_the_first_pauses_between_attempts_are_short() -> None:
    config = ClientConfig(max_reconnect_backoff_s=60.0)
    with attempts_to_connect(close=True) as (target, attempts), PolicyClient(target, config=config) as client:
        began_at = time.monotonic()
        with pytest.raises(PolicyError):
            client.get_spec(deadline_s=10)
        assert all(attempts.acquire(timeout=PATIENCE_S) for _ in range(3))
        assert time.monotonic() - began_at < 1.9  # gRPC's own pauses: 1 s and 1.6 s, give or take 20 %


def test_the_pauses_between_attempts_do_not_grow_past_their_limit() -> None:
    config = ClientConfig(initial_reconnect_backoff_s=0.1, max_reconnect_backoff_s=0.1)
    with attempts_to_connect(close=True) as (target, attempts), PolicyClient(target, config=config) as client:
        began_at = time.monotonic()
        with pytest.raises(PolicyError):
            client.get_spec(deadline_s=10)
        assert all(attempts.acquire(timeout=PATIENCE_S) for _ in range(10))
        assert time.monotonic() - began_at < 5  # growing by 1.6 each time, nine pauses take 11 s


def test_an_attempt_that_leads_nowhere_is_given_up_for_the_next() -> None:
    with attempts_to_connect(close=False) as (target, attempts), PolicyClient(target) as client:
        with pytest.raises(PolicyError):
            client.get_spec(deadline_s=0.5)
        assert all(attempts.acquire(timeout=10) for _ in range(3))  # gRPC's own patience with one attempt: 20 s
