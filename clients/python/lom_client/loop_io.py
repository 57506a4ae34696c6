"""Who asks the policy for a control loop: a thread, or a process of its own. The control thread itself does no I/O."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from lom_api.reasons import Reason
from lom_client.client import PolicyClient
from lom_client.config import ClientConfig
from lom_client.errors import Overloaded, PolicyError
from lom_client.levels import Refusal
from lom_client.loop_messages import Answer, Question, pack_refusal, pack_reply, unpack_observation
from lom_client.mailbox import Mailboxes
from lom_client.throttle import Throttle

_PATHS = ("tls_ca", "tls_certificate", "tls_key", "token_file")
_LOOK_AROUND_NS = 100_000_000
_SHORTEST_RESTART_PAUSE_S = 0.05
_LONGEST_RESTART_PAUSE_S = 2.0
# A thread cannot be ended from outside; a request that is under way keeps its own deadline.
_LONGEST_GOODBYE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class PolicyProcess:
    """As the arguments of `PolicyClient`, for a control loop that has its policy asked by a process of its own.

    gRPC and the control thread of one Python process take turns; above 100 Hz that is felt.
    """

    target: str
    policy: str | None = None
    version: int | None = None
    config: ClientConfig = field(default_factory=ClientConfig)

    def __post_init__(self) -> None:
        if self.config.trace_headers is not None:
            raise ValueError(
                "config.trace_headers: expected none, a function of this process is not to be had in another"
            )

    def connect(self) -> PolicyClient:
        """A client in this process. Raises ValueError as `PolicyClient` does."""
        return PolicyClient(self.target, policy=self.policy, version=self.version, config=self.config)

    def to_json(self) -> str:
        """As `from_json` reads it. Names the files of secrets, not their content."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote."""
        fields = json.loads(text)
        config: dict[str, Any] = fields.pop("config")
        for name in _PATHS:
            config[name] = None if config[name] is None else Path(config[name])
        return cls(config=ClientConfig(**config), **fields)


class LoopIo(Protocol):
    """Answers what is put into the mailboxes until it is closed."""

    mailboxes: Mailboxes

    def source_of(self, policy: PolicyClient | PolicyProcess) -> str:
        """What questions call `policy`. Raises TypeError where it cannot be asked this way."""
        ...

    def close(self) -> None:
        """Ends it within about 0.05 s."""
        ...


class ThreadIo:
    """Asks in a thread of this process."""

    def __init__(self) -> None:
        self.mailboxes = Mailboxes.create()
        self._clients: dict[str, PolicyClient] = {}
        self._is_closed = False
        self._thread = threading.Thread(
            target=answer_questions,
            args=(self.mailboxes, self._clients.__getitem__, lambda: self._is_closed),
            name="lom-control-loop",
            daemon=True,
        )
        self._thread.start()

    def source_of(self, policy: PolicyClient | PolicyProcess) -> str:
        """As `LoopIo.source_of`."""
        if isinstance(policy, PolicyProcess):
            raise TypeError("a loop that asks by a PolicyClient cannot switch to a PolicyProcess")
        source = str(id(policy))
        self._clients[source] = policy
        return source

    def close(self) -> None:
        """As `LoopIo.close`; a request under way ends the thread with its own deadline."""
        self._is_closed = True
        self.mailboxes.question_bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LONGEST_GOODBYE_S)


class ProcessIo:
    """Asks in a process of its own, which is started anew, in the background, whenever it ends."""

    def __init__(self) -> None:
        self.mailboxes = Mailboxes.create()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_running, name="lom-control-loop-io", daemon=True)
        self._thread.start()

    def source_of(self, policy: PolicyClient | PolicyProcess) -> str:
        """As `LoopIo.source_of`."""
        if not isinstance(policy, PolicyProcess):
            raise TypeError("a loop that asks by a PolicyProcess cannot switch to a PolicyClient")
        return policy.to_json()

    def close(self) -> None:
        """As `LoopIo.close`."""
        with self._lock:
            self._is_closed.set()
            if self._process is not None:
                self._process.kill()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LONGEST_GOODBYE_S)

    def _keep_running(self) -> None:
        pause_s = _SHORTEST_RESTART_PAUSE_S
        while True:
            began_at = time.monotonic()
            with self._lock:
                if self._is_closed.is_set():
                    return
                self._process = self._start()
            self._process.wait()
            lived_s = time.monotonic() - began_at
            pause_s = (
                _SHORTEST_RESTART_PAUSE_S
                if lived_s > _LONGEST_RESTART_PAUSE_S
                else min(2 * pause_s, _LONGEST_RESTART_PAUSE_S)
            )
            self._is_closed.wait(pause_s)

    def _start(self) -> "subprocess.Popen[bytes]":
        fds = self.mailboxes.fds
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "lom_client.policy_process", str(os.getpid()), *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            # A key that interrupts the robot's program is for the program to handle.
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )


def answer_questions(
    mailboxes: Mailboxes, client_of: Callable[[str], PolicyClient], is_over: Callable[[], bool]
) -> None:
    """Asks for the newest question there is, one at a time, each once; returns soon after `is_over`.

    What became too old while another one was asked is left out: the newest wins.
    """
    throttle = Throttle()
    while not is_over():
        message = mailboxes.questions.take()
        if message is None:
            mailboxes.question_bell.wait(time.monotonic_ns() + _LOOK_AROUND_NS)
            continue
        question = Question.from_bytes(message)
        outcome = _outcome(question, client_of, throttle)
        if isinstance(outcome, Answer):
            mailboxes.answers.put(pack_reply(outcome))
        else:
            refusal, detail = outcome
            mailboxes.refusals.put(pack_refusal(refusal, detail))
        mailboxes.outcome_bell.ring()


def _outcome(
    question: Question, client_of: Callable[[str], PolicyClient], throttle: Throttle
) -> Answer | tuple[Refusal, str]:
    now = time.monotonic()
    budget_s = question.over_ns * 1e-9 - now
    if budget_s <= 0:
        return _refused(question, Reason.DEADLINE_EXCEEDED)
    if not throttle.lets_ask(now):
        return _refused(question, "THROTTLED")
    try:
        client = client_of(question.source)
        hysteresis: dict[str, Any] = {}
        if question.hysteresis_width:
            hysteresis = {"previous_mode": question.previous_mode, "hysteresis_width": question.hysteresis_width}
        answer = client.act(
            unpack_observation(question.observation), deadline_s=budget_s, variant=question.variant, **hysteresis
        )
    except Overloaded as error:
        throttle.was_refused(time.monotonic(), error.retry_after_s)
        return _refused(question, error.reason, error.detail)
    except PolicyError as error:
        throttle.was_answered()
        return _refused(question, error.reason, error.detail)
    except Exception:  # a defect of ours must cost one tick, not the thread that feeds the robot
        return _refused(question, "CLIENT_DEFECT")
    throttle.was_answered()
    if answer.actions.ndim != 1 or client.spec is None:
        return _refused(question, Reason.BAD_SHAPE, "observation: expected one row")
    margin = math.nan if answer.margin is None else float(answer.margin)
    return Answer(
        sequence=question.sequence,
        observed_ns=question.observed_ns,
        generation=question.generation,
        action=tuple(map(float, answer.actions)),
        bundle_digest=answer.bundle_digest,
        contract_hash=client.spec.contract_hash,
        warns=any(bool(score.warns) for score in answer.scores.values()),
        version=answer.version,
        mode=-1 if answer.mode is None else int(answer.mode),
        variant=answer.variant,
        margin=None if math.isnan(margin) else margin,
    )


def _refused(question: Question, reason: str, detail: str = "") -> tuple[Refusal, str]:
    return Refusal(sequence=question.sequence, generation=question.generation, reason=str(reason)), detail
