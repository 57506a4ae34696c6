"""What an operator can choose about a server; everything else is in the bundle."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Provider = Literal["auto", "cpu", "cuda"]
Placement = Literal["auto", "inline", "thread"]


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The choices of one server, checked as a whole.

    Raises:
        ValueError: a field is outside its range, or two fields contradict each other; names the field.
    """

    bundle: Path
    """Folder of the bundle to serve."""

    trusted_keys: tuple[Path, ...] = ()
    """PEM public keys (Ed25519); when given, an unsigned or otherwise signed bundle is refused.
    Repeat the option for more keys."""

    listen: str = "127.0.0.1:8001"
    """HOST:PORT to listen on; IPv6 hosts in brackets; port 0 lets the system choose one.
    Anything but a loopback host also needs `insecure`."""

    insecure: bool = False
    """Accept plaintext on an address that other machines can reach.
    Whoever reaches it can ask for actions and read observations under way."""

    max_batch_rows: int = 1024
    """Largest request and largest batch, in rows (1 to 65536). More rows use the processor better and make
    everyone else in the batch wait longer. Wide observations lower it, to keep messages within 4 MiB."""

    max_queue_rows: int = 4096
    """Rows that may wait for the engine (`max_batch_rows` to 1048576); a request beyond them is refused at once.
    More rows ride out longer bursts and let answers grow older."""

    default_deadline_s: float = 1.0
    """Seconds granted to a request that brings no deadline (above 0, at most `max_deadline_s`)."""

    max_deadline_s: float = 10.0
    """Seconds to which longer deadlines are cut (above 0, at most 3600): no request holds its place for longer."""

    grace_s: float = 10.0
    """Seconds (0 to 3600) that accepted requests get to finish after SIGTERM; what is left then is cancelled."""

    provider: Provider = "auto"
    """Where graphs run. `cuda` and `cpu` are demands: the server refuses to start on anything else.
    `auto` takes CUDA where it works and the processor elsewhere."""

    intra_op_threads: int = 1
    """Threads inside one run of a graph (1 to 256). One is fastest below about 8 rows and leaves the cores to gRPC;
    two or more pay from about 64 rows."""

    allow_spinning: bool = False
    """Let those threads spin while idle: faster with more than one thread, at the price of whole cores."""

    inference: Placement = "auto"
    """Where a batch runs. `inline`: on the event loop, no hand-over, and everything else waits meanwhile.
    `thread`: in the engine thread, tens of microseconds dearer. `auto`: inline where the warm-up measured
    well under a millisecond."""

    def __post_init__(self) -> None:
        host, _ = self.host_and_port
        if not self.insecure and not _is_loopback(host):
            raise ValueError(
                f"listen: {self.listen!r} is plaintext that other machines reach; add --insecure to accept"
            )
        _check_range("max_batch_rows", self.max_batch_rows, 1, 65536)
        _check_range("max_queue_rows", self.max_queue_rows, self.max_batch_rows, 1048576)
        _check_range("max_deadline_s", self.max_deadline_s, 1e-3, 3600)
        _check_range("default_deadline_s", self.default_deadline_s, 1e-3, self.max_deadline_s)
        _check_range("grace_s", self.grace_s, 0, 3600)
        _check_range("intra_op_threads", self.intra_op_threads, 1, 256)
        _check_choice("provider", self.provider, Provider)
        _check_choice("inference", self.inference, Placement)

    @property
    def host_and_port(self) -> tuple[str, int]:
        """`listen` in its two parts; the host without brackets."""
        host, separator, port = self.listen.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            separator = ""  # an IPv6 address without brackets: where would the port start?
        if not separator or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"listen: expected HOST:PORT with a port of 0 to 65535, got {self.listen!r}")
        return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # written so that NaN is outside
        raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value:g}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")
