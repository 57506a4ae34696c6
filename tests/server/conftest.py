"""A bundle and a real server that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.support.bundles import Flaws, write_test_bundle
from tests.support.servers import ServerProcess, running_server

NAN_ABOVE = 100.0
RAISE_ABOVE = 200.0
MAX_BATCH_ROWS = 16


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle."""
    path = tmp_path_factory.mktemp("bundles") / "toy"
    write_test_bundle(path)
    return path


@pytest.fixture(scope="session")
def flawed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose policy answers NaN above `NAN_ABOVE` and raises above `RAISE_ABOVE`."""
    path = tmp_path_factory.mktemp("bundles") / "flawed"
    write_test_bundle(path, flaws=Flaws(nan_above=NAN_ABOVE, raise_above=RAISE_ABOVE))
    with running_server(path, "--max-batch-rows", str(MAX_BATCH_ROWS)) as server:
        yield server


@pytest.fixture
def flawed_channel(flawed_server: ServerProcess) -> Iterator[grpc.Channel]:
    """A channel to `flawed_server`, with a connection of its own."""
    with grpc.insecure_channel(flawed_server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel
