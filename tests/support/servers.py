"""Real `lom-serve` processes for tests: on a port of their own, waited for by condition, always stopped."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 30.0

_SERVING_LINE = re.compile(r"^lom-serve: SERVING .*\baddress=(?P<address>\S+)$")


def wait_until(condition: Callable[[], bool], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Returns as soon as `condition()` holds.

    Raises:
        AssertionError: it did not hold within `patience_s`; names `what`.
    """
    give_up_at = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited {patience_s:g} s in vain: {what}"
        time.sleep(0.005)


@dataclass(kw_only=True)
class ServerProcess:
    """A `lom-serve` process.

    Attributes:
        address: HOST:PORT once it is SERVING.
        stdout, stderr: the lines so far.
    """

    process: subprocess.Popen[str]
    address: str = ""
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)

    def wait(self, *, patience_s: float = PATIENCE_S) -> int:
        """The exit status, once the process has ended and all its lines are in."""
        code = self.process.wait(patience_s)
        for reader in self._readers:
            reader.join(patience_s)
        return code

    def terminate(self, *, patience_s: float = PATIENCE_S) -> int:
        """SIGTERM, then the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait(patience_s=patience_s)

    def __post_init__(self) -> None:
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.stdout.append(line.rstrip("\n"))
            self.lines.put(self.stdout[-1])
        self.lines.put(None)

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line.rstrip("\n"))


def start_server_process(
    bundle: str | os.PathLike[str], *options: str, listen: str = "127.0.0.1:0", program: tuple[str, ...] = ()
) -> ServerProcess:
    """Starts `lom-serve BUNDLE --listen LISTEN OPTIONS...` and returns at once.

    `program` replaces `python -m lom_server.main`. Whoever calls ends the process; `running_server` does both.
    """
    command = [*(program or (sys.executable, "-m", "lom_server.main")), str(Path(bundle)), "--listen", listen, *options]
    return ServerProcess(process=subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))


@contextmanager
def running_server(
    bundle: str | os.PathLike[str],
    *options: str,
    listen: str = "127.0.0.1:0",
    program: tuple[str, ...] = (),
    patience_s: float = PATIENCE_S,
) -> Iterator[ServerProcess]:
    """A `lom-serve` process on `bundle` that says it is SERVING; killed at the end where it still runs.

    Raises:
        AssertionError: it ended, or did not serve within `patience_s`; carries its stderr.
    """
    server = start_server_process(bundle, *options, listen=listen, program=program)
    try:
        give_up_at = time.monotonic() + patience_s
        while not server.address:
            try:
                line = server.lines.get(timeout=max(0.0, give_up_at - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"not SERVING after {patience_s:g} s: {server.stderr}") from None
            if line is None:
                raise AssertionError(f"ended with {server.wait()} before SERVING: {server.stderr}")
            serving = _SERVING_LINE.match(line)
            if serving:
                server.address = serving["address"]
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()
