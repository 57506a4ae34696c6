"""`lom_server.config`: what may be chosen."""

from pathlib import Path
from typing import Any

import pytest

from lom_server.config import ServerConfig


def config(**choices: Any) -> ServerConfig:
    return ServerConfig(bundle=Path("bundle"), **choices)


def test_the_defaults_are_valid_and_loopback() -> None:
    assert config().host_and_port == ("127.0.0.1", 8001)


@pytest.mark.parametrize(
    ("listen", "host_and_port"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:8001", ("::1", 8001)),
        ("127.8.9.1:1", ("127.8.9.1", 1)),
    ],
)
def test_loopback_addresses_need_nothing_else(listen: str, host_and_port: tuple[str, int]) -> None:
    assert config(listen=listen).host_and_port == host_and_port


@pytest.mark.parametrize("listen", ["0.0.0.0:8001", "[::]:8001", "192.168.1.5:8001", "robot.example:8001"])
def test_other_addresses_need_insecure(listen: str) -> None:
    with pytest.raises(ValueError, match="--insecure"):
        config(listen=listen)
    config(listen=listen, insecure=True)


@pytest.mark.parametrize(
    "listen",
    ["", "8001", "127.0.0.1", ":8001", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:65536", "::1:8001",
     "127.0.0.1:٣"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(ValueError, match="listen: expected HOST:PORT"):
        config(listen=listen, insecure=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch_rows", 0),
        ("max_batch_rows", 65537),
        ("max_queue_rows", 1023),
        ("max_deadline_s", 0.0),
        ("max_deadline_s", float("nan")),
        ("default_deadline_s", 0.0),
        ("default_deadline_s", 11.0),
        ("grace_s", -1.0),
        ("grace_s", float("inf")),
        ("intra_op_threads", 0),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        config(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("provider", "tpu"), ("inference", "later")])
def test_a_choice_that_is_none_is_refused_by_name(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected one of"):
        config(**{field: value})
