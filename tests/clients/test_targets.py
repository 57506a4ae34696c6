"""A target names one server in one way."""

import pytest

from lom_client import PolicyClient
from lom_client.targets import Scheme, Target, parse_target


@pytest.mark.parametrize(
    ("text", "scheme", "address", "is_private"),
    [
        ("grpc://127.0.0.1:8001", Scheme.GRPC, "dns:///127.0.0.1:8001", True),
        ("grpc://127.8.9.1:8001", Scheme.GRPC, "dns:///127.8.9.1:8001", True),
        ("grpc://localhost:8001", Scheme.GRPC, "dns:///localhost:8001", True),
        ("grpc://[::1]:65535", Scheme.GRPC, "dns:///[::1]:65535", True),
        ("grpc://[fe80::1]:65535", Scheme.GRPC, "dns:///[fe80::1]:65535", False),
        ("grpc://10.0.0.1:8001", Scheme.GRPC, "dns:///10.0.0.1:8001", False),
        ("grpc://robot-7.cell.example:1", Scheme.GRPC, "dns:///robot-7.cell.example:1", False),
        ("grpc://localhost.example:1", Scheme.GRPC, "dns:///localhost.example:1", False),
        ("grpcs://robot-7.cell.example:1", Scheme.GRPCS, "dns:///robot-7.cell.example:1", True),
        ("unix:/run/lom.sock", Scheme.UNIX, "unix:/run/lom.sock", True),
        ("unix:/run/a b%20c?#", Scheme.UNIX, "unix:/run/a%20b%2520c%3F%23", True),
        ("inproc:bundles/fork", Scheme.INPROC, "bundles/fork", True),
        ("inproc:/srv/a:b", Scheme.INPROC, "/srv/a:b", True),
    ],
)
def test_a_target_is_understood(text: str, scheme: Scheme, address: str, is_private: bool) -> None:
    assert parse_target(text) == Target(scheme=scheme, address=address, is_private=is_private)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:8001",
        "localhost:8001",
        "http://127.0.0.1:8001",
        "dns:///127.0.0.1:8001",
        "grpc://127.0.0.1",
        "grpc://:8001",
        "grpc://127.0.0.1:0",
        "grpc://127.0.0.1:65536",
        "grpc://127.0.0.1:x",
        "grpc://127.0.0.1:8001/",
        "grpcs://127.0.0.1:8001/policy",
        "grpc://127.0.0.1:8001?x=1",
        "grpc://127.0.0.1:8001#x",
        "grpcs://user@127.0.0.1:8001",
        "grpc://127.0.0.1:8001,127.0.0.2:8001",
        "grpc://a b:8001",
        "grpc://[::1:8001",
        "grpc://127.0.0.1:8001\n",
        " grpc://127.0.0.1:8001",
        "unix:run/lom.sock",
        "unix://run/lom.sock",
        "unix:///run/lom.sock",
        "unix:/run/",
        "unix:/run/lom\n.sock",
        "unix:/" + "x" * 107,
        "unix:",
        "inproc:",
        "inproc:bundle\n",
        "",
    ],
)
def test_any_other_target_is_refused_with_the_forms_that_work(text: str) -> None:
    with pytest.raises(ValueError, match="must be grpc://HOST:PORT, grpcs://HOST:PORT, unix:/PATH or inproc:BUNDLE"):
        PolicyClient(text)
