"""`lom_server.config`: what may be chosen."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from lom_server.config import (
    ConfigError,
    ServerConfig,
    from_plain,
    host_and_port,
    is_reachable_from_elsewhere,
    is_unix,
)

TLS = {"tls_certificate": Path("server.pem"), "tls_key": Path("server.key")}
MUTUAL_TLS = TLS | {"tls_client_ca": Path("clients.pem")}
TOKENS = {"tokens": Path("tokens")}


def config(**choices: Any) -> ServerConfig:
    return ServerConfig(models=Path("models"), **choices)


def refusal(**choices: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        config(**choices)
    assert str(error.value) == f"{error.value.field}: {error.value.detail}"
    return error.value


def test_the_defaults_are_valid_loopback_and_offer_nothing_but_actions() -> None:
    defaults = config()
    assert defaults.host_and_port == ("127.0.0.1", 8001)
    assert (defaults.admin_listen, defaults.metrics_listen, defaults.reflection) == ("", "", False)


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
    assert not is_reachable_from_elsewhere(listen)


@pytest.mark.parametrize("listen", ["0.0.0.0:8001", "[::]:8001", "192.168.1.5:8001", "robot.example:8001"])
@pytest.mark.parametrize(
    ("guard", "is_served"),
    [
        ({}, False),
        (TOKENS, False),
        (TLS, False),
        (TLS | TOKENS, True),
        (MUTUAL_TLS, True),
        (MUTUAL_TLS | TOKENS, True),
    ],
    ids=["nothing", "tokens", "TLS", "TLS and tokens", "mutual TLS", "mutual TLS and tokens"],
)
def test_other_machines_need_tls_and_a_credential_or_consent(
    listen: str, guard: dict[str, Any], is_served: bool
) -> None:
    if is_served:
        config(listen=listen, **guard)
    else:
        error = refusal(listen=listen, **guard)
        assert error.field == "listen"
        assert "--insecure" in error.detail
        assert ("plaintext" in error.detail) == ("tls_key" not in guard)
    config(listen=listen, insecure=True, **guard)


@pytest.mark.parametrize(
    "listen",
    ["", "8001", "127.0.0.1", ":8001", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:-1", "127.0.0.1:65536", "::1:8001",
     "127.0.0.1:٣"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="listen: expected HOST:PORT"):
        config(listen=listen, insecure=True)


def test_a_unix_socket_is_guarded_by_its_file_and_has_one_worker() -> None:
    listen = "unix:/run/lom/act.sock"
    assert is_unix(config(listen=listen, admin_listen="unix:/run/lom/admin.sock").listen)
    assert not is_reachable_from_elsewhere(listen)
    assert refusal(listen=listen, workers=2).field == "workers"
    with pytest.raises(ConfigError, match="listen: expected HOST:PORT"):
        _ = config(listen=listen).host_and_port


@pytest.mark.parametrize("path", ["", "act.sock", "//", "/run/lom/", f"/{'x' * 107}", f"/{'é' * 54}"])
@pytest.mark.parametrize("field", ["listen", "admin_listen"])
def test_a_socket_path_that_no_socket_can_have_is_refused(field: str, path: str) -> None:
    error = refusal(**{field: f"unix:{path}"})
    assert error.field == field
    assert "at most 107 bytes" in error.detail


def test_the_longest_socket_path_is_accepted() -> None:
    config(listen=f"unix:/{'x' * 106}")


def test_the_admin_service_is_a_socket_file_or_asks_for_tokens() -> None:
    config(admin_listen="unix:/run/lom/admin.sock")
    assert refusal(admin_listen="127.0.0.1:8003").field == "admin_listen"
    config(admin_listen="127.0.0.1:8003", **TOKENS)
    # insecure accepts plaintext; nothing accepts an admin service that anyone may use.
    assert refusal(admin_listen="10.0.0.1:8003", insecure=True).field == "admin_listen"
    assert refusal(admin_listen="10.0.0.1:8003", **TOKENS).field == "admin_listen"
    config(admin_listen="10.0.0.1:8003", **TOKENS, **TLS)
    config(admin_listen="10.0.0.1:8003", **TOKENS, insecure=True)


def test_metrics_hold_nothing_private_and_may_be_reached() -> None:
    config(metrics_listen="0.0.0.0:8002")
    assert refusal(metrics_listen="unix:/run/lom/metrics.sock").field == "metrics_listen"
    assert refusal(metrics_listen="8002").field == "metrics_listen"


@pytest.mark.parametrize("field", ["admin_listen", "metrics_listen"])
def test_no_two_listeners_share_an_address(field: str) -> None:
    assert refusal(listen="127.0.0.1:8001", **{field: "127.0.0.1:8001"}, **TOKENS).field == field
    config(listen="127.0.0.1:0", **{field: "127.0.0.1:0"}, **TOKENS)


def test_a_certificate_and_its_key_come_together() -> None:
    assert refusal(tls_certificate=Path("server.pem")).field == "tls_key"
    assert refusal(tls_key=Path("server.key")).field == "tls_certificate"
    assert refusal(tls_client_ca=Path("clients.pem")).field == "tls_client_ca"


def test_reflection_stays_on_this_machine() -> None:
    config(reflection=True)
    config(reflection=True, listen="unix:/run/lom/act.sock")
    assert refusal(reflection=True, listen="0.0.0.0:8001", insecure=True).field == "reflection"


def test_a_fallback_needs_something_to_fall_back_from() -> None:
    assert refusal(allow_provider_fallback=True).field == "allow_provider_fallback"
    assert refusal(allow_provider_fallback=True, provider="cpu").field == "allow_provider_fallback"
    config(allow_provider_fallback=True, provider="cuda", load_memory_mb=0)


def test_cuda_cannot_be_loaded_under_a_limit_of_address_space() -> None:
    assert refusal(provider="cuda").field == "load_memory_mb"
    config(provider="cuda", load_memory_mb=0)


def test_pins_are_versions_by_policy() -> None:
    assert config(pin=("fork=3", "hopper-v4=2147483647")).pinned_versions == {"fork": 3, "hopper-v4": 2147483647}
    assert config().pinned_versions == {}


@pytest.mark.parametrize(
    "pins",
    [("fork",), ("fork=",), ("=1",), ("fork=0",), ("fork=01",), ("fork=-1",), ("fork=٣",), ("fork=2147483648",),
     ("Fork=1",), ("../fork=1",), ("fork=1\n",), ("fork=1", "fork=2")],
)  # fmt: skip
def test_a_pin_that_is_none_is_refused(pins: tuple[str, ...]) -> None:
    assert refusal(pin=pins).field == "pin"


@pytest.mark.parametrize(
    ("field", "lowest", "highest", "below", "above"),
    [
        ("max_batch_rows", 1, 4096, 0, 65537),
        ("max_queue_rows", 1024, 1048576, 1023, 1048577),
        ("default_deadline_s", 0.001, 10.0, 0.0, 11.0),
        ("grace_s", 0.0, 3600.0, -1.0, float("inf")),
        ("intra_op_threads", 1, 256, 0, 257),
        ("workers", 1, 64, 0, 65),
        ("run_limit_s", 0.05, 600.0, 0.04, 601.0),
        ("load_limit_s", 1.0, 3600.0, 0.9, 3601.0),
        ("load_memory_mb", 256, 1048576, 255, 1048577),
        ("max_connections", 1, 65536, 0, 65537),
        ("max_streams_per_connection", 1, 65536, 0, 65537),
        ("max_concurrent_calls", 1, 65536, 0, 65537),
        ("max_requests_per_s", 0.0, 1e6, -1.0, 1e7),
        ("max_message_bytes", 65536, 67108864, 65535, 67108865),
        ("max_metadata_bytes", 1024, 65536, 1023, 65537),
        ("max_parameters", 0, 1024, -1, 1025),
        ("handshake_timeout_s", 0.1, 60.0, 0.0, 61.0),
        ("stream_idle_s", 0.1, 3600.0, 0.0, 3601.0),
        ("slow_reader_s", 0.05, 600.0, 0.0, 601.0),
        ("max_connection_idle_s", 1.0, 86400.0, 0.5, 86401.0),
        ("max_connection_age_s", 1.0, 604800.0, 0.5, 604801.0),
    ],
)
def test_a_value_has_a_range(field: str, lowest: float, highest: float, below: float, above: float) -> None:
    for value in (lowest, highest):
        config(**{field: value})
    for value in (below, above, float("nan")):
        error = refusal(**{field: value})
        assert error.field == field
        assert error.detail.startswith("expected ")


def test_every_number_has_a_range() -> None:
    for field in fields(ServerConfig):
        if type(field.default) in (int, float):
            assert refusal(**{field.name: 1e12}).field == field.name


def test_a_limit_is_told_in_full() -> None:
    assert refusal(max_message_bytes=67108865).detail == "expected 65536 to 67108864, got 67108865"


@pytest.mark.parametrize(
    ("field", "value"),
    [("provider", "tpu"), ("inference", "later"), ("versions", "newest"), ("log_format", "xml"), ("log_level", "all")],
)
def test_a_choice_that_is_none_is_refused_by_name(field: str, value: str) -> None:
    error = refusal(**{field: value})
    assert error.field == field
    assert error.detail.startswith("expected one of ")


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "a\x1b[2Jb", "a\udce9b"])
def test_no_text_can_forge_a_line_of_a_log_or_a_file(text: str) -> None:
    for choices in ({"trusted_keys": (Path(text),)}, {"tokens": Path(text)}, {"admin_listen": f"unix:/{text}"}):
        error = refusal(**choices)
        assert error.detail.isprintable()
        assert error.field in choices


def test_a_configuration_travels_as_one_line_of_json() -> None:
    sent = config(
        trusted_keys=(Path("a.pem"), Path("/keys/ü.pem")),
        pin=("fork=3",),
        listen="0.0.0.0:8001",
        grace_s=0.1,
        workers=2,
        **MUTUAL_TLS,
    )
    line = sent.to_json()
    assert "\n" not in line
    assert json.loads(line)["models"] == "models"
    assert ServerConfig.from_json(line) == sent
    assert ServerConfig.from_json(config().to_json()) == config()


def test_what_travels_is_checked_where_it_arrives() -> None:
    plain = json.loads(config().to_json())
    with pytest.raises(ConfigError, match="workers: expected 1 to 64, got 100"):
        ServerConfig.from_json(json.dumps(plain | {"workers": 100}))
    with pytest.raises(ConfigError, match="wrokers: expected a field"):
        ServerConfig.from_json(json.dumps(plain | {"wrokers": 1}))


@pytest.mark.parametrize(
    ("field", "plain", "value"),
    [
        ("models", "a", Path("a")),
        ("tokens", "a", Path("a")),
        ("tokens", "", None),
        ("tokens", None, None),
        ("trusted_keys", ["a", "b"], (Path("a"), Path("b"))),
        ("pin", [], ()),
        ("grace_s", 3, 3.0),
        ("workers", 3, 3),
        ("insecure", True, True),
        ("provider", "cpu", "cpu"),
    ],
)
def test_values_of_a_document_become_values_of_a_field(field: str, plain: object, value: object) -> None:
    made = from_plain(field, plain)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("field", "plain", "expected"),
    [
        ("models", 1, "a path"),
        ("tokens", ["a"], "a path"),
        ("trusted_keys", "a", "a list of texts"),
        ("pin", [1], "a list of texts"),
        ("grace_s", "3", "a number"),
        ("grace_s", True, "a number"),
        ("workers", 3.0, "an integer"),
        ("workers", True, "an integer"),
        ("insecure", 1, "true or false"),
        ("listen", 8001, "a text"),
        ("provider", 1, "one of auto, cpu, cuda"),
    ],
)
def test_a_value_of_another_type_is_refused(field: str, plain: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_plain(field, plain)
    assert error.value.field == field
    assert error.value.detail == f"expected {expected}, got {plain!r}"


def test_only_the_models_must_be_named() -> None:
    required = [field.name for field in fields(ServerConfig) if field.default is MISSING]
    assert required == ["models"]


def test_an_address_is_named_by_the_field_that_holds_it() -> None:
    with pytest.raises(ConfigError, match=r"^metrics_listen: expected HOST:PORT"):
        host_and_port("metrics_listen", "nowhere")
