"""Which server a target names."""

import ipaddress
import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import quote, urlsplit

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_LONGEST_SOCKET_PATH = 107  # bytes of sun_path in Linux, without its final zero


class Scheme(StrEnum):
    """How a server is reached."""

    GRPC = "grpc"
    """TCP, in the clear."""
    GRPCS = "grpcs"
    """TCP under TLS."""
    UNIX = "unix"
    """A socket in this machine's file system."""
    INPROC = "inproc"
    """No connection at all: the policy is served by this process."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server's address.

    Attributes:
        address: in gRPC's own notation; for `INPROC` the path of a bundle.
        is_private: whether nobody on the way can read along: under TLS, or within this machine.
    """

    scheme: Scheme
    address: str
    is_private: bool


def parse_target(text: str) -> Target:
    """A target from `grpc://HOST:PORT`, `grpcs://HOST:PORT`, `unix:/PATH` or `inproc:BUNDLE`.

    Raises:
        ValueError: anything else, with the forms that work.
    """
    scheme, _, rest = text.partition(":")
    target = None
    if scheme == Scheme.UNIX:
        target = _unix_target(rest)
    elif scheme == Scheme.INPROC and rest and text.isprintable():
        target = Target(scheme=Scheme.INPROC, address=rest, is_private=True)
    elif scheme in (Scheme.GRPC, Scheme.GRPCS):
        target = _tcp_target(Scheme(scheme), text)
    if target is None:
        raise ValueError(
            "target must be grpc://HOST:PORT, grpcs://HOST:PORT, unix:/PATH or inproc:BUNDLE, "
            f"for example grpc://127.0.0.1:8001, got {text!r}"
        )
    return target


def _unix_target(path: str) -> Target | None:
    is_sound = path.startswith("/") and not path.startswith("//") and not path.endswith("/") and path.isprintable()
    if not is_sound or len(path.encode()) > _LONGEST_SOCKET_PATH:
        return None
    return Target(scheme=Scheme.UNIX, address=f"unix:{quote(path)}", is_private=True)


def _tcp_target(scheme: Scheme, text: str) -> Target | None:
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        return None
    if not host or not port:
        return None
    is_ipv6 = _IPV6.fullmatch(host) is not None
    if not is_ipv6 and not _HOST.fullmatch(host):
        return None
    address = f"[{host}]:{port}" if is_ipv6 else f"{host}:{port}"
    # Rebuilding the URL and comparing refuses paths, queries, users and everything that urlsplit drops in silence.
    if text.lower() != f"{scheme}://{address}":
        return None
    return Target(
        scheme=scheme, address=f"dns:///{address}", is_private=scheme is Scheme.GRPCS or _is_this_machine(host)
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
