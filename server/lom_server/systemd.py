"""Tells systemd how the server is (`Type=notify`): READY=1, WATCHDOG=1, STOPPING=1."""

import os
import socket


def notify(state: str) -> bool:
    """Sends `state` to the service manager that started this process.

    Never blocks and never raises: a service manager that does not listen must not stop a server.

    Returns:
        Whether a service manager was told; False where there is none.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = f"\0{address[1:]}"  # an abstract socket has no file
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)
            sender.sendto(state.encode(), address)
    except OSError:
        return False
    return True


def watchdog_interval_s() -> float | None:
    """Seconds between two WATCHDOG=1 that systemd expects of this process at most; None where it expects none."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not (microseconds.isascii() and microseconds.isdigit()) or int(microseconds) == 0:
        return None
    return int(microseconds) / 1e6
