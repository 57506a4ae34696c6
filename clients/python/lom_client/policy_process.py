"""The process behind a `PolicyProcess`: `python -m lom_client.policy_process PARENT_PID MEMORY_FD BELL_FD BELL_FD`."""

import os
import sys
from functools import lru_cache

from lom_client.client import PolicyClient
from lom_client.loop_io import PolicyProcess, answer_questions
from lom_client.mailbox import Mailboxes

_MOST_POLICIES = 16


@lru_cache(_MOST_POLICIES)
def _client_of(source: str) -> PolicyClient:
    return PolicyProcess.from_json(source).connect()


def main(parent_pid: str, *fds: str) -> None:
    """Answers until the parent ends, however it ends."""
    answer_questions(Mailboxes(*map(int, fds)), _client_of, lambda: os.getppid() != int(parent_pid))


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Without gRPC's threads having their say: nobody is left to hear it.
    os._exit(0)
