"""A server whose answers the test chooses, and a client of it."""

from collections.abc import Iterator

import pytest

from lom_client import PolicyClient
from tests.support.fake_policy_server import FakePolicyServer


@pytest.fixture
def server() -> Iterator[FakePolicyServer]:
    with FakePolicyServer() as server:
        yield server


@pytest.fixture
def client(server: FakePolicyServer) -> Iterator[PolicyClient]:
    with PolicyClient(server.target) as client:
        yield client
