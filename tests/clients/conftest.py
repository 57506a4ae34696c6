"""A server whose answers the test chooses, a real one, and clients."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pytest

from lom_client import ClientConfig, PolicyClient
from tests.clients.blocking_client import BlockingClient
from tests.support.bundles import write_test_bundle
from tests.support.fake_policy_server import FakePolicyServer
from tests.support.servers import running_server

AnyClient: TypeAlias = PolicyClient | BlockingClient


class Connect(Protocol):
    """Makes a client of one kind."""

    def __call__(self, target: str, *, config: ClientConfig = ..., **arguments: Any) -> AnyClient: ...


def _connect(kind: str, target: str, *, config: ClientConfig = ClientConfig(), **arguments: Any) -> AnyClient:  # noqa: B008
    make = BlockingClient if "async" in kind else PolicyClient
    return make(target, config=replace(config, use_stream="stream" in kind), **arguments)


def threads() -> set[threading.Thread]:
    """Those that are alive, but the one that gRPC keeps for all event loops of the process."""
    return {thread for thread in threading.enumerate() if "poll" not in thread.name}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle."""
    path = tmp_path_factory.mktemp("bundles") / "toy"
    write_test_bundle(path)
    return path


@pytest.fixture(scope="module")
def target(bundle: Path) -> Iterator[str]:
    """A real server of it."""
    with running_server(bundle) as server:
        yield f"grpc://{server.address}"


@pytest.fixture
def server() -> Iterator[FakePolicyServer]:
    with FakePolicyServer() as server:
        yield server


@pytest.fixture
def client(server: FakePolicyServer) -> Iterator[PolicyClient]:
    with PolicyClient(server.target) as client:
        yield client


@pytest.fixture(params=["call", "stream", "async call", "async stream"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every way to ask that a promise holds for alike."""
    kind: str = request.param
    return kind


@pytest.fixture
def connect(kind: str) -> Connect:
    return partial(_connect, kind)


@pytest.fixture
def any_client(server: FakePolicyServer, connect: Connect) -> Iterator[AnyClient]:
    with connect(server.target) as client:
        yield client
