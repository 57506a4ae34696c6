"""How the connection to a server behaves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """How a connection is watched, renewed, limited and secured.

    The defaults notice a frozen server in about a second and renew a lost connection within half a second.

    Raises:
        ValueError: a value is outside the range that its field names, or two contradict each other. Files are read when
            a client is made.
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
    tls_ca: Path | None = None
    """PEM certificates of the authorities that a `grpcs://` server may be certified by; None for the public ones that
    gRPC brings along."""
    tls_certificate: Path | None = None
    """PEM certificate chain that this client shows to a `grpcs://` server that asks for one; needs `tls_key`."""
    tls_key: Path | None = None
    """PEM private key of `tls_certificate`."""
    token_file: Path | None = None
    """File with a bearer token alone, or with a server's line `ROLE NAME TOKEN`; mode 0600 or 0400. Refused on the way
    to another machine without TLS."""
    use_stream: bool = False
    """Send every `act` over one stream that is kept open, which saves each the cost of a call by itself: about 0.2 ms.
    The stream is one robot's: an action takes the place of an earlier one that has not begun to be worked on, which
    then fails with `Superseded`. Without meaning for a policy in this process, which no connection leads to."""
    trace_headers: Callable[[], Mapping[str, str]] | None = None
    """Called for every call, and once for a stream; what it returns travels along, so that the server's spans continue
    the caller's. With OpenTelemetry: a function that injects into an empty dict and returns it. Must be quick, and must
    not raise."""

    def __post_init__(self) -> None:
        for name in ("keepalive_time_s", "keepalive_timeout_s"):
            _require_within(name, getattr(self, name), 0.1, 3600.0)
        _require_within("max_reconnect_backoff_s", self.max_reconnect_backoff_s, 0.01, 3600.0)
        _require_within(
            "initial_reconnect_backoff_s", self.initial_reconnect_backoff_s, 0.01, self.max_reconnect_backoff_s
        )
        _require_within("max_message_bytes", self.max_message_bytes, 1024, 64 * 1024 * 1024)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be given together, got one without the other")

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


def _require_within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
