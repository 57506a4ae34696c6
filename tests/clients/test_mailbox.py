"""One slot: the newest message whole, or none."""

import os
import subprocess
import sys
import threading
import time
import zlib

import pytest

from lom_client.mailbox import OUTCOME_BYTES, Mailboxes, Slot
from tests.support.servers import wait_until


def make_slot(size: int = 1 << 16) -> tuple[Slot, bytearray]:
    memory = bytearray(size)
    return Slot(memoryview(memory)), memory


def test_the_newest_message_is_taken_once() -> None:
    slot, _ = make_slot()
    assert slot.take() is None
    slot.put(b"first")
    slot.put(b"second, and longer")
    assert slot.take() == b"second, and longer"
    assert slot.take() is None
    slot.put(b"")
    assert slot.take() == b""


def test_what_does_not_fit_is_refused_and_the_slot_keeps_what_it_has() -> None:
    slot, _ = make_slot(48)
    slot.put(b"x" * slot.capacity)
    with pytest.raises(ValueError, match="at most 32 bytes, got 33"):
        slot.put(b"x" * 33)
    assert slot.take() == b"x" * 32


def test_half_a_message_is_none() -> None:
    slot, memory = make_slot()
    slot.put(b"message")
    for position in (0, 8, 12, 16, 20):  # version, length, checksum, body
        spoilt = memory[position]
        memory[position] ^= 0xFF
        assert slot.take() is None
        memory[position] = spoilt
    assert slot.take() == b"message"


def test_a_slot_whose_writer_died_over_it_is_written_again() -> None:
    slot, memory = make_slot()
    slot.put(b"before")
    memory[0] += 1  # odd: a message is being written
    assert slot.take() is None
    slot.put(b"after")
    assert slot.take() == b"after"


def test_no_reader_ever_sees_two_messages_mixed() -> None:
    slot, memory = make_slot()
    reader = Slot(memoryview(memory))
    over = threading.Event()
    failures: list[bytes] = []
    taken = 0

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            body = bytes([number % 251]) * (number * 37 % 20_000)
            slot.put(zlib.crc32(body).to_bytes(4, "little") + body)

    writer = threading.Thread(target=write)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writer.start()
        give_up_at = time.monotonic() + 20
        while taken < 300 and time.monotonic() < give_up_at:
            message = reader.take()
            if message is not None:
                taken += 1
                if zlib.crc32(message[4:]) != int.from_bytes(message[:4], "little"):
                    failures.append(message)
    finally:
        over.set()
        writer.join()
        sys.setswitchinterval(interval)
    assert not failures
    assert taken == 300


ECHO = """
import sys, time
from lom_client.mailbox import Mailboxes
mailboxes = Mailboxes(*map(int, sys.argv[1:]))
while True:
    mailboxes.question_bell.wait(time.monotonic_ns() + 10**9)
    question = mailboxes.questions.take()
    if question is not None:
        mailboxes.answers.put(question[::-1])
        mailboxes.outcome_bell.ring()
"""


def test_another_process_answers_through_the_same_memory() -> None:
    mailboxes = Mailboxes.create()
    process = subprocess.Popen([sys.executable, "-c", ECHO, *map(str, mailboxes.fds)], pass_fds=mailboxes.fds)
    try:
        for number in range(200):
            mailboxes.questions.put(b"question %d" % number)
            mailboxes.question_bell.ring()
            expected = (b"question %d" % number)[::-1]
            while (answer := mailboxes.answers.take()) is None:
                assert process.poll() is None
                mailboxes.outcome_bell.wait(time.monotonic_ns() + 100_000_000)
            assert answer == expected
    finally:
        process.kill()
        process.wait()


def test_a_bell_is_heard_now_and_next_and_never_for_long() -> None:
    bell = Mailboxes.create().question_bell
    far_off = time.monotonic_ns() + 60 * 10**9
    bell.ring()
    bell.ring()
    bell.wait(far_off)  # rung before
    ringing = threading.Timer(0.01, bell.ring)
    ringing.start()
    bell.wait(far_off)
    ringing.join()
    for ahead_ns in (-1, 0, 300_000, 5_000_000):
        until_ns = time.monotonic_ns() + ahead_ns
        while time.monotonic_ns() < until_ns:
            bell.wait(until_ns)


def test_descriptors_are_closed_with_the_last_reference() -> None:
    def open_descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_descriptors()
    mailboxes = [Mailboxes.create() for _ in range(20)]
    assert open_descriptors() >= before + 60
    assert mailboxes[0].answers.capacity == OUTCOME_BYTES - 16
    mailboxes.clear()
    wait_until(lambda: open_descriptors() <= before, "the descriptors to be closed")
