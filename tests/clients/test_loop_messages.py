"""What goes through a mailbox comes out again to the bit."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from lom_client.levels import Refusal
from lom_client.loop_messages import (
    Answer,
    Question,
    UnusableObservationError,
    pack_observation,
    pack_refusal,
    pack_reply,
    unpack_observation,
    unpack_refusal,
    unpack_reply,
)

QUESTION = Question(
    sequence=3,
    generation=1,
    observed_ns=10**15,
    over_ns=10**15 + 1,
    source="a source of ünusual name",
    variant=None,
    previous_mode=-1,
    hysteresis_width=0.1,
    observation=b"\x00\xff",
)


@pytest.mark.parametrize("question", [QUESTION, dataclasses.replace(QUESTION, variant="actor", observation=b"")])
def test_questions(question: Question) -> None:
    assert Question.from_bytes(question.to_bytes()) == question


@pytest.mark.parametrize(
    "observation",
    [
        np.array([0.1, 0.2, 0.3]),
        np.array([0.1, 0.2], np.float32)[::-1],
        np.arange(6, dtype=np.int16).reshape(2, 3).T,
        np.array([1.5], ">f8"),
        {"image": np.zeros((2, 3, 1), np.uint8), "joints": np.array([0.1, -0.0])},
    ],
)
def test_observations_keep_their_dtype_shape_and_bits(observation: Any) -> None:
    again = unpack_observation(pack_observation(observation))
    for given, got in zip(
        observation.values() if isinstance(observation, dict) else [observation],
        again.values() if isinstance(again, dict) else [again],
        strict=True,
    ):
        assert isinstance(got, np.ndarray)
        assert (got.dtype, got.shape) == (given.dtype, given.shape)
        assert got.tobytes() == given.tobytes()


def test_equal_bytes_are_equal_observations() -> None:
    assert pack_observation([0.1, 0.2]) == pack_observation(np.array([0.1, 0.2]))
    others: list[Any] = [[0.1, 0.2000001], np.array([0.1, 0.2], np.float32), [[0.1, 0.2]], {"o": [0.1, 0.2]}]
    for other in others:
        assert pack_observation([0.1, 0.2]) != pack_observation(other)


class Explosive:
    def __array__(self, *_args: object, **_kwargs: object) -> Any:
        raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("observation", "reason", "detail"),
    [
        ([0.0, np.nan], "NON_FINITE", "observation[1]"),
        ({"joints": [0.0], "goal": [[0.0], [np.inf]]}, "NON_FINITE", "goal[1, 0]"),
        ("text", "BAD_DTYPE", "observation: expected real numbers"),
        (None, "BAD_DTYPE", "observation"),
        ([1 + 2j], "BAD_DTYPE", "complex128"),
        ([[0, 0], [0]], "BAD_SHAPE", "observation"),
        (Explosive(), "BAD_SHAPE", "observation"),
        ({"goal": Explosive()}, "BAD_SHAPE", "observation"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(observation: Any, reason: str, detail: str) -> None:
    with pytest.raises(UnusableObservationError) as caught:
        pack_observation(observation)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_replies_and_refusals() -> None:
    reply = Answer(
        sequence=1,
        observed_ns=10**15,
        generation=2,
        action=(0.1, float(np.float32(0.1)), -0.0, 5e-324),
        bundle_digest="d" * 64,
        contract_hash="c",
        warns=True,
        version=3,
        mode=2,
        variant="greedy_mode",
        margin=0.1,
    )
    again = unpack_reply(pack_reply(reply))
    assert again == reply
    assert [value.hex() for value in again.action] == [value.hex() for value in reply.action]
    refusal = Refusal(sequence=1, generation=2, reason="QUEUE_FULL")
    assert unpack_refusal(pack_refusal(refusal, "wörds")) == (refusal, "wörds")
