"""The C++ client's probe programs, as `make test-cpp` builds them: a client, and a control loop, driven over pipes."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar

from tests.support.servers import wait_until

PATIENCE_S = 20.0
BUILD = os.environ.get("LOM_CPP_BUILD", "")
"""Folder that CMake built into; empty where nobody asked for these tests."""

Json: TypeAlias = dict[str, Any]
_Item = TypeVar("_Item")


def program(name: str) -> str:
    """Path of a program of `clients/cpp`."""
    return str(Path(BUILD).resolve() / ("examples" if name.startswith("joint") else "tests") / name)


class ActProbe:
    """A C++ `PolicyClient`."""

    def __init__(self, target: str, **config: Any) -> None:
        self._process = subprocess.Popen(
            [program("act_probe"), target, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def act(self, *rows: Any, **options: Any) -> Json:
        """What `PolicyClient::act` answers."""
        said: Json = self._ask({"rows": [list(row) for row in rows]} | options)
        return said

    def close_client(self) -> None:
        """Closes the client, not the process."""
        self._ask("close")

    def refusal(self) -> str:
        """Why the client could not be made."""
        assert self._process.stdout is not None
        refused: str = json.loads(self._process.stdout.readline())["refused"]
        assert self._process.wait(PATIENCE_S) == 1
        return refused

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE_S) in (0, 1)
        self._process.stdout.close()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class LoopProbe:
    """A C++ `ControlLoop` at its own rate.

    Attributes:
        actions: of the ticks so far.
        events: told so far.
        end: the sum, once the loop was closed.
        lines: everything else that was said.
    """

    def __init__(self, target: str, **config: Any) -> None:
        self.config = config
        self.actions: list[Json] = []
        self.events: list[Json] = []
        self.lines: list[Json] = []
        self.end: Json = {}
        self._process = subprocess.Popen(
            [program("loop_probe"), target, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def last(self) -> Json:
        """The newest action; before the first one, nothing."""
        return self.actions[-1] if self.actions else {}

    def wait_for(self, source: str, *, patience_s: float = PATIENCE_S) -> Json:
        """The first action from now on that comes from `source`."""
        begin = len(self.actions)

        def found() -> list[Json]:
            return [action for action in self.actions[begin:] if action["source"] == source]

        wait_until(lambda: bool(found()), f"an action of source {source}", patience_s=patience_s)
        return found()[0]

    def wait_ticks(self, number: int) -> list[Json]:
        """The next actions."""
        begin = len(self.actions)
        wait_until(lambda: len(self.actions) >= begin + number, f"{number} ticks")
        return self.actions[begin : begin + number]

    def say(self, line: str) -> None:
        """To the operator's side of the loop."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def rearm(self) -> str:
        """What `ControlLoop::rearm` answers."""
        before = len(self.lines)
        self.say("rearm")
        wait_until(lambda: len(self.lines) > before, "an answer to rearm")
        refused: str = self.lines[-1]["rearm"]
        return refused

    def finish(self) -> Json:
        """Closes the loop; the sum."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE_S) == 0, self.lines
        self._reader.join(PATIENCE_S)
        return self.end

    def kill(self) -> None:
        """Whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "event" in said:
                self.events.append(said)
            elif "tick" in said:
                self.actions.append(said)
            elif "end" in said:
                self.end = said
            else:
                self.lines.append(said)


@contextmanager
def running_loop(target: str, **config: Any) -> Iterator[LoopProbe]:
    """A loop, ended and judged: every tick answered, soundly; nothing stale, late, reordered or used twice."""
    probe = LoopProbe(target, **config)
    try:
        yield probe
        end = probe.finish()
    finally:
        probe.kill()
    if not config.get("quiet"):
        judge(probe)
    ticks = end["end"]["ticks"]
    assert ticks == sum(end["end"]["sources"].values())
    assert ticks - end["end"]["fresh"] == sum(end["end"]["misses"].values())
    assert end["end"]["aged"] == end["end"]["fresh"]
    assert end["after_close"]["reason"] in ("LOOP_CLOSED", "OPERATOR_STOP")
    assert end["close_s"] < 2.0  # 0.2 s by contract; a busy machine is no fault of ours


def judge(probe: LoopProbe) -> None:
    """One sound action a tick. Tick n observes n * 1e-5, so that a fresh action says which observation it answers."""
    period_s = probe.config["period_s"]
    max_age_s = probe.config.get("max_age_s", 2 * period_s)
    waits = probe.config.get("deadline_s", 1) > 0
    assert [action["tick"] for action in probe.actions] == list(range(1, len(probe.actions) + 1))
    last_used = 0
    for action in probe.actions:
        assert all(isinstance(value, float | int) and -1 <= value <= 1 for value in action["values"])
        assert (action["source"] == "fresh") == (action["level"] == "nominal") == (action["reason"] == "")
        if action["source"] != "fresh":
            continue
        assert 0 <= action["age_s"] <= max_age_s
        used = round(action["values"][0] * 1e5)
        assert last_used < used <= action["tick"]
        assert used == action["tick"] or not waits
        last_used = used


def count(items: Iterable[_Item], found: Callable[[_Item], bool]) -> int:
    """How many of them are so."""
    return sum(map(found, items))
