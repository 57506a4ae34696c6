"""What an operator can choose about a server; everything else is in the bundle."""

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

Provider = Literal["auto", "cpu", "cuda"]
Placement = Literal["auto", "inline", "thread"]
Versions = Literal["latest", "all"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
PlainValue: TypeAlias = "bool | int | float | str | list[str] | None"

UNIX_SCHEME = "unix:"

_PIN = re.compile(r"([a-z0-9][a-z0-9_-]{0,63})=([1-9][0-9]{0,9})")
_LARGEST_VERSION = 2**31 - 1
_LONGEST_SOCKET_PATH = 107  # bytes of sun_path in Linux, without its final zero


class ConfigError(ValueError):
    """A choice that a server cannot be started with.

    Attributes:
        field: the field of `ServerConfig` at fault.
        detail: what was expected, what was got.
    """

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The choices of one server, checked as a whole.

    Raises:
        ConfigError: a field is outside its range, or two fields contradict each other; names the field.
    """

    models: Path
    """Folder of a bundle, served as version 1 of its policy, or of a repository POLICY/VERSION/ of bundles."""

    versions: Versions = "latest"
    """Which versions of a repository's policies are loaded at the start: only the newest, or all of them.
    Each one costs memory and time to prove."""

    pin: tuple[str, ...] = ()
    """POLICY=VERSION: serve this version by default instead of the newest one."""

    trusted_keys: tuple[Path, ...] = ()
    """PEM public key (Ed25519); where any is given, an unsigned or otherwise signed bundle is refused."""

    listen: str = "127.0.0.1:8001"
    """HOST:PORT to listen on, or unix:/PATH; IPv6 hosts in brackets; port 0 lets the system choose one.
    A host that other machines reach also needs TLS with `tokens` or `tls_client_ca`, or else `insecure`."""

    admin_listen: str = ""
    """unix:/PATH or HOST:PORT of the admin service, which loads, unloads and promotes; empty for none.
    On a Unix socket the file's mode (0600) is the guard; HOST:PORT needs `tokens`."""

    metrics_listen: str = ""
    """HOST:PORT of the metrics (HTTP), empty for none. Whoever reaches it reads the names of policies, rates and
    latencies; no observation, action or token is among them. That is why an address that other machines reach needs
    no further consent."""

    insecure: bool = False
    """Accept an address that other machines reach without TLS, or without knowing who they are.
    Whoever reaches it can ask for actions and, without TLS, read observations and tokens under way."""

    tls_certificate: Path | None = None
    """PEM certificate chain of the server, for every HOST:PORT of `listen` and `admin_listen`; needs `tls_key`."""

    tls_key: Path | None = None
    """PEM private key of `tls_certificate`."""

    tls_client_ca: Path | None = None
    """PEM certificates of the authorities that sign clients; when given, every client must show a certificate."""

    tokens: Path | None = None
    """File of bearer tokens, mode 0600, one `ROLE NAME TOKEN` a line with the role `act` or `admin`; when given,
    every call but a health check must carry one."""

    workers: int = 1
    """Serving processes that share the port (1 to 64). More use more cores and keep serving while one is replaced;
    each holds every graph in memory and counts its own limits. A Unix socket has one."""

    max_batch_rows: int = 1024
    """Largest request and largest batch, in rows (1 to 65536). More rows use the processor better and make
    everyone else in the batch wait longer. Wide observations lower it, to keep messages within
    `max_message_bytes`."""

    max_queue_rows: int = 4096
    """Rows that may wait for the engine (`max_batch_rows` to 1048576); a request beyond them is refused at once.
    More rows ride out longer bursts and let answers grow older."""

    default_deadline_s: float = 1.0
    """Seconds granted to a request that brings no deadline (0.001 to `max_deadline_s`)."""

    max_deadline_s: float = 10.0
    """Seconds to which longer deadlines are cut (0.001 to 3600): no request holds its place for longer."""

    grace_s: float = 10.0
    """Seconds (0 to 3600) that accepted requests get to finish after SIGTERM; what is left then is cancelled."""

    provider: Provider = "auto"
    """Where graphs run. `cuda` and `cpu` are demands: the server refuses to start on anything else.
    `auto` takes CUDA where it works and the processor elsewhere."""

    allow_provider_fallback: bool = False
    """Let the processor serve where the demanded `cuda` fails. The policy's specification names the provider that
    answers; its answers come later than those of a GPU would where batches are large."""

    intra_op_threads: int = 1
    """Threads inside one run of a graph (1 to 256). One is fastest below about 8 rows and leaves the cores to gRPC;
    two or more pay from about 64 rows."""

    allow_spinning: bool = False
    """Let those threads spin while idle: faster with more than one thread, at the price of whole cores."""

    inference: Placement = "auto"
    """Where a batch runs. `inline`: on the event loop, no hand-over, and everything else waits meanwhile.
    `thread`: in the engine thread, tens of microseconds dearer. `auto`: inline where the warm-up measured
    well under a millisecond."""

    run_limit_s: float = 2.0
    """Seconds (0.05 to 600) after which a run of a graph is stopped and its worker replaced. Shorter frees the engine
    sooner from a graph that hangs; a sound run that takes longer is lost with it."""

    load_limit_s: float = 30.0
    """Seconds (1 to 3600) that a new bundle gets to prove itself in a process of its own, before it is refused.
    Large graphs and many golden rows need more."""

    load_memory_mb: int = 4096
    """MiB of address space (256 to 1048576; 0 for no limit) of the process in which a new bundle proves itself: a
    graph that asks for more is refused and the server lives on. Must be 0 with `provider` cuda, which reserves
    address space far beyond any useful limit; under a limit, `auto` proves a bundle on the processor."""

    max_connections: int = 256
    """Connections of one worker (1 to 65536). More admit more robots, and a flood that takes more file descriptors:
    the process needs four for each."""

    max_streams_per_connection: int = 64
    """Calls under way on one connection (1 to 65536); more of them wait at the client."""

    max_concurrent_calls: int = 1024
    """Calls under way in one worker (1 to 65536); one beyond them is refused at once."""

    max_requests_per_s: float = 0.0
    """Requests a second that one worker takes from one client (0 to 1000000; 0 for no limit). A limit keeps one client
    from crowding out the others and from copying a policy by asking it often."""

    max_message_bytes: int = 4 * 1024 * 1024
    """Largest message in bytes (65536 to 67108864). A bundle whose requests cannot be that large gets a smaller
    limit. It bounds what a hostile client can make the server allocate."""

    max_metadata_bytes: int = 8192
    """Largest metadata of one call in bytes (1024 to 65536)."""

    max_parameters: int = 32
    """Parameters of one Open Inference Protocol request (0 to 1024)."""

    handshake_timeout_s: float = 2.0
    """Seconds (0.1 to 60) that a new connection has for TLS and HTTP/2 before it is closed. Shorter frees the slots
    that silent connections hold; far-away clients may need longer."""

    stream_idle_s: float = 5.0
    """Seconds (0.1 to 3600) that an action stream may bring no request before it is ended."""

    slow_reader_s: float = 2.0
    """Seconds (0.05 to 600) that a stream's replies may wait for their reader before the stream is ended."""

    max_connection_idle_s: float = 600.0
    """Seconds (1 to 86400) without a call after which a connection is closed."""

    max_connection_age_s: float = 1800.0
    """Seconds (1 to 604800) after which a connection is closed once its calls have ended, so that clients spread over
    new servers and show their certificates again."""

    reflection: bool = False
    """Tell callers which services and messages there are, for tools; refused on an address that other machines
    reach."""

    log_format: LogFormat = "text"
    """`text` for people, `json` for machines: one object a line."""

    log_level: LogLevel = "info"
    """The least that is worth a line in the log."""

    traces: bool = False
    """Report a span for every call; where to is OpenTelemetry's own OTEL_* environment variables' to say."""

    record: Path | None = None
    """Folder into which every answer is recorded, with its observation, as Minari datasets; none by default.
    Recordings hold what robots see, which may be personal data: folders get mode 0700, files 0600. They are finished
    when the server stops, within `grace_s`, or by the next start. Needs lom[record]."""

    record_max_mb: int = 1024
    """MiB (1 to 1048576) that all recordings in that folder may take; what reaches them ends the recording, while the
    server goes on. Making a dataset needs up to as much again for a while."""

    def __post_init__(self) -> None:
        _check_texts(self)
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_range("max_batch_rows", self.max_batch_rows, 1, 65536)
        _check_range("max_queue_rows", self.max_queue_rows, self.max_batch_rows, 1048576)
        _check_range("max_deadline_s", self.max_deadline_s, 1e-3, 3600)
        _check_range("default_deadline_s", self.default_deadline_s, 1e-3, self.max_deadline_s)
        for name, (low, high) in _RANGES.items():
            _check_range(name, getattr(self, name), low, high)
        if self.load_memory_mb:
            _check_range("load_memory_mb", self.load_memory_mb, 256, 1048576)
        self._check_provider()
        self._check_pins()
        self._check_tls()
        self._check_addresses()
        self._check_exposure()

    @property
    def host_and_port(self) -> tuple[str, int]:
        """`listen` in its two parts, where it is HOST:PORT; the host without brackets."""
        return host_and_port("listen", self.listen)

    @property
    def pinned_versions(self) -> dict[str, int]:
        """`pin` as policy -> version."""
        return {policy: int(version) for policy, _, version in (entry.partition("=") for entry in self.pin)}

    def to_plain(self) -> dict[str, PlainValue]:
        """Every field by name, in numbers, texts and lists, as JSON and TOML have them."""
        return {field.name: _to_plain(getattr(self, field.name)) for field in fields(self)}

    def to_json(self) -> str:
        """One line from which `from_json` makes an equal configuration in another process."""
        return json.dumps(self.to_plain(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "ServerConfig":
        """The configuration that `to_json` wrote.

        Raises:
            ConfigError: as the constructor; also for a value of the wrong type, or an unknown field.
        """
        plain: Mapping[str, object] = json.loads(text)
        unknown = plain.keys() - FIELD_TYPES.keys()
        if unknown:
            raise ConfigError(min(unknown), "expected a field of the server's configuration")
        return cls(**{name: from_plain(name, value) for name, value in plain.items()})

    def _check_provider(self) -> None:
        if self.allow_provider_fallback and self.provider != "cuda":
            raise ConfigError(
                "allow_provider_fallback", f"expected provider cuda, which alone can fall back, got {self.provider}"
            )
        if self.load_memory_mb and self.provider == "cuda":
            raise ConfigError(
                "load_memory_mb",
                f"expected 0 with provider cuda, which reserves address space without use, got {self.load_memory_mb}",
            )

    def _check_pins(self) -> None:
        for entry in self.pin:
            match = _PIN.fullmatch(entry)
            if match is None or int(match[2]) > _LARGEST_VERSION:
                raise ConfigError("pin", f"expected POLICY=VERSION with a version of 1 to 2147483647, got {entry!r}")
        if len(self.pinned_versions) != len(self.pin):
            raise ConfigError("pin", f"expected each policy once, got {', '.join(self.pin)}")

    def _check_tls(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ConfigError(missing, "expected a certificate and its key together, got one without the other")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ConfigError("tls_client_ca", "expected tls_certificate and tls_key with it, got neither")

    def _check_addresses(self) -> None:
        addresses = {"listen": self.listen} | {
            name: address for name in ("admin_listen", "metrics_listen") if (address := getattr(self, name))
        }
        for name, address in addresses.items():
            if is_unix(address) and name != "metrics_listen":
                _check_socket_path(name, address)
            else:
                host_and_port(name, address)
        _check_distinct(addresses)
        if self.workers > 1 and is_unix(self.listen):
            raise ConfigError("workers", f"expected 1 on a Unix socket, which nothing can share, got {self.workers}")
        if self.admin_listen and not is_unix(self.admin_listen) and self.tokens is None:
            raise ConfigError(
                "admin_listen", f"expected unix:/PATH, or tokens with HOST:PORT, got {self.admin_listen!r}"
            )

    def _check_exposure(self) -> None:
        for name in ("listen", "admin_listen"):
            address = getattr(self, name)
            if not address or self.insecure or not is_reachable_from_elsewhere(address):
                continue
            if self.tls_certificate is None:
                raise ConfigError(
                    name,
                    f"{address!r} is plaintext that other machines reach; give tls_certificate, or add --insecure",
                )
            if self.tokens is None and self.tls_client_ca is None:
                raise ConfigError(
                    name, f"{address!r} lets any machine in; give tokens or a tls_client_ca, or add --insecure"
                )
        if self.reflection and is_reachable_from_elsewhere(self.listen):
            raise ConfigError("reflection", f"expected an address of this machine alone, got {self.listen!r}")


_RANGES: Mapping[str, tuple[float, float]] = {
    "workers": (1, 64),
    "record_max_mb": (1, 1024 * 1024),
    "grace_s": (0, 3600),
    "intra_op_threads": (1, 256),
    "run_limit_s": (0.05, 600),
    "load_limit_s": (1, 3600),
    "max_connections": (1, 65536),
    "max_streams_per_connection": (1, 65536),
    "max_concurrent_calls": (1, 65536),
    "max_requests_per_s": (0, 1e6),
    "max_message_bytes": (64 * 1024, 64 * 1024 * 1024),
    "max_metadata_bytes": (1024, 64 * 1024),
    "max_parameters": (0, 1024),
    "handshake_timeout_s": (0.1, 60),
    "stream_idle_s": (0.1, 3600),
    "slow_reader_s": (0.05, 600),
    "max_connection_idle_s": (1, 24 * 3600),
    "max_connection_age_s": (1, 7 * 24 * 3600),
}

FIELD_TYPES: Mapping[str, Any] = get_type_hints(ServerConfig)
"""The type of every field by name, in the order of their declaration."""

_CHOICES: Mapping[str, Any] = {name: hint for name, hint in FIELD_TYPES.items() if get_origin(hint) is Literal}


def is_unix(address: str) -> bool:
    """Whether `address` names a Unix socket, `unix:/PATH`."""
    return address.startswith(UNIX_SCHEME)


def host_and_port(name: str, address: str) -> tuple[str, int]:
    """HOST:PORT in its two parts; the host without brackets.

    Raises:
        ConfigError: `address` is none; names the field `name`.
    """
    host, separator, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        separator = ""  # an IPv6 address without brackets: where would the port start?
    if not separator or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(name, f"expected HOST:PORT with a port of 0 to 65535, got {address!r}")
    return host, int(port)


def is_reachable_from_elsewhere(address: str) -> bool:
    """Whether other machines can reach `address`: a HOST:PORT that is not of the loopback interface."""
    if is_unix(address):
        return False
    host, _ = host_and_port("address", address)
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def from_plain(name: str, value: object) -> Any:
    """The value of the field `name` from its form in JSON or TOML.

    Raises:
        ConfigError: `value` is of another type.
    """
    hint = FIELD_TYPES[name]
    make, expected = _reader(hint)
    try:
        return make(value)
    except TypeError:
        raise ConfigError(name, f"expected {expected}, got {value!r}") from None


def _reader(hint: Any) -> tuple[Callable[[Any], Any], str]:
    """What makes a value of the type `hint`, raising TypeError for anything else, and how to say what it wants."""
    if get_origin(hint) is tuple:
        make, _ = _reader(get_args(hint)[0])
        return lambda values: tuple(make(value) for value in _of(list, values)), "a list of texts"
    if get_origin(hint) is Literal:
        return lambda value: _of(str, value), f"one of {', '.join(get_args(hint))}"
    if hint == Path | None:
        return lambda value: Path(_of(str, value)) if value else None, "a path"
    if hint is Path:
        return lambda value: Path(_of(str, value)), "a path"
    if hint is float:
        return lambda value: float(_of((int, float), value)), "a number"
    return lambda value: _of(hint, value), {bool: "true or false", int: "an integer", str: "a text"}[hint]


def _of(expected: Any, value: Any) -> Any:
    """`value`, where it is of a type that is expected; True and False are no numbers."""
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise TypeError
    return value


def _to_plain(value: Any) -> PlainValue:
    if isinstance(value, tuple):
        return [str(element) for element in value]
    plain: PlainValue = str(value) if isinstance(value, Path) else value
    return plain


def _check_texts(config: ServerConfig) -> None:
    """Paths, addresses and pins end up in logs, in configuration files and in system calls."""
    for field in fields(config):
        value = _to_plain(getattr(config, field.name))
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.isprintable():
                raise ConfigError(field.name, f"expected printable characters, got {text!a}")


def _check_socket_path(name: str, address: str) -> None:
    path = address.removeprefix(UNIX_SCHEME)
    if not path.startswith("/") or path.endswith("/") or len(path.encode()) > _LONGEST_SOCKET_PATH:
        raise ConfigError(
            name, f"expected unix: and an absolute path of at most {_LONGEST_SOCKET_PATH} bytes, got {address!r}"
        )


def _check_distinct(addresses: Mapping[str, str]) -> None:
    names: dict[str, str] = {}
    for name, address in addresses.items():
        if address in names and not address.endswith(":0"):
            raise ConfigError(name, f"expected another address than that of {names[address]}, got {address!r}")
        names[address] = name


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # written so that NaN is outside
        raise ConfigError(name, f"expected {low:.10g} to {high:.10g}, got {value:.10g}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(name, f"expected one of {', '.join(get_args(choices))}, got {value!r}")
