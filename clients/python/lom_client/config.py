"""Where the server is and how the connection to it behaves."""

import math
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a connection is watched, renewed and limited.

    The defaults notice a frozen server in about a second and renew a lost connection within half a second.

    Raises:
        ValueError: a value is outside the range that its field names.
    """

    keepalive_time_s: float = 1.0
    """Silence after which the connection is probed, 0.1 to 3600 s. Shorter notices a dead server sooner; a server
    that forbids such frequent probes closes the connection."""
    keepalive_timeout_s: float = 0.5
    """Time a probe may stay unanswered before the connection counts as dead, 0.1 to 3600 s."""
    initial_reconnect_backoff_s: float = 0.05
    """Pause before the second attempt to connect, 0.01 s to `max_reconnect_backoff_s`. Shorter finds a restarted
    server sooner and costs more attempts."""
    max_reconnect_backoff_s: float = 0.5
    """Longest pause between two attempts to connect, up to 3600 s."""
    max_message_bytes: int = 4 * 1024 * 1024
    """Largest message sent or received, 1 KiB to 64 MiB. It bounds what a hostile server can make this process
    allocate."""

    def __post_init__(self) -> None:
        for name in ("keepalive_time_s", "keepalive_timeout_s"):
            _require_within(name, getattr(self, name), 0.1, 3600.0)
        _require_within("max_reconnect_backoff_s", self.max_reconnect_backoff_s, 0.01, 3600.0)
        _require_within(
            "initial_reconnect_backoff_s", self.initial_reconnect_backoff_s, 0.01, self.max_reconnect_backoff_s
        )
        _require_within("max_message_bytes", self.max_message_bytes, 1024, 64 * 1024 * 1024)

    def channel_options(self) -> list[tuple[str, int]]:
        """gRPC's names for these choices. A wrong name is ignored in silence, so a test proves each one's effect."""
        timeout_ms = _milliseconds(self.keepalive_timeout_s)
        max_backoff_ms = _milliseconds(self.max_reconnect_backoff_s)
        return [
            ("grpc.keepalive_time_ms", _milliseconds(self.keepalive_time_s)),
            ("grpc.keepalive_timeout_ms", timeout_ms),
            # Without this one, keepalive does not notice a server that was stopped but keeps its sockets.
            ("grpc.http2.ping_timeout_ms", timeout_ms),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.initial_reconnect_backoff_ms", _milliseconds(self.initial_reconnect_backoff_s)),
            ("grpc.min_reconnect_backoff_ms", min(200, max_backoff_ms)),
            ("grpc.max_reconnect_backoff_ms", max_backoff_ms),
            # Channels otherwise share connections, and with them the backoff that another client ran into.
            ("grpc.use_local_subchannel_pool", 1),
            # A retried action is a stale action.
            ("grpc.enable_retries", 0),
            # The environment must not be able to route a robot's commands through a proxy.
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
        ]


def grpc_target(target: str) -> str:
    """`grpc://host:port` in gRPC's own notation.

    Raises:
        ValueError: anything else, with the form that works.
    """
    fault = ValueError(f"target must be grpc://HOST:PORT, for example grpc://127.0.0.1:8001, got {target!r}")
    try:
        url = urlsplit(target)
        host, port = url.hostname, url.port
    except ValueError:
        raise fault from None
    if url.scheme != "grpc" or not host or not port:
        raise fault
    is_ipv6 = _IPV6.fullmatch(host) is not None
    if not is_ipv6 and not _HOST.fullmatch(host):
        raise fault
    address = f"[{host}]:{port}" if is_ipv6 else f"{host}:{port}"
    # Rebuilding the URL and comparing refuses paths, queries, users and everything that urlsplit drops in silence.
    if target.lower() != f"grpc://{address}":
        raise fault
    return f"dns:///{address}"


def _require_within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
