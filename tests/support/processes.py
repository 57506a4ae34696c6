"""What a test may know of processes that it did not start itself."""

import os
from pathlib import Path


def children_of(pid: int) -> set[int]:
    """Processes that `pid` started and that it has not yet waited for."""
    processes = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return {process for process in processes if _status(process)[1:2] == [str(pid)]}


def workers_of(supervisor: int) -> set[int]:
    """Workers of a server, without those that have gone."""
    return {child for child in children_of(supervisor) if "lom_server.worker" in command_of(child)}


def is_running(pid: int) -> bool:
    """Whether `pid` exists and is no zombie."""
    return _status(pid)[:1] not in ([], ["Z"])


def command_of(pid: int) -> str:
    """The command line of `pid`; empty where it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def policy_processes(pid: int | None = None) -> list[int]:
    """Children of `pid`, by default of this process, that ask policies for control loops."""
    children = children_of(os.getpid() if pid is None else pid)
    return [child for child in children if "lom_client.policy_process" in command_of(child) and is_running(child)]


def _status(pid: int) -> list[str]:
    """State, parent and what follows them in `/proc/PID/stat`; empty where `pid` has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
