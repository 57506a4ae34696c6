"""What a variant cannot do is not asked of a server; what it can travels as it was meant."""

from typing import Any, cast

import numpy as np
import pytest

from lom_api.codec import unpack_tensor
from lom_api.v1 import policy_pb2
from lom_client import InvalidRequest
from tests.clients.conftest import AnyClient
from tests.support.fake_policy_server import FakePolicyServer

ROWS = [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]


def test_options_travel(server: FakePolicyServer, any_client: AnyClient) -> None:
    any_client.act(ROWS, deadline_s=10)
    any_client.act(
        ROWS, deadline_s=10, explain=True, mode=cast(int, np.int64(1)), sampling_seed=2**64 - 1, batch_priority=True
    )
    any_client.act(ROWS, deadline_s=10, previous_mode=[2, -1], hysteresis_width=0.25)
    plain, forced, steady = server.requests
    assert not plain.explain
    assert not any(plain.HasField(name) for name in ("mode", "sampling_seed", "hysteresis"))
    assert plain.priority == policy_pb2.PRIORITY_LIVE
    assert (forced.explain, forced.mode, forced.sampling_seed) == (True, 1, 2**64 - 1)
    assert forced.priority == policy_pb2.PRIORITY_BATCH
    assert unpack_tensor(steady.hysteresis.previous_mode).tolist() == [2, -1]
    assert steady.hysteresis.width == 0.25


def test_zero_is_a_seed_and_a_mode(server: FakePolicyServer, any_client: AnyClient) -> None:
    assert any_client.act(ROWS[0], deadline_s=10, mode=0, sampling_seed=0).mode == 0
    request = server.requests[-1]
    assert (request.HasField("mode"), request.HasField("sampling_seed")) == (True, True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"mode": -1}, "mode: expected 0 to 2147483647, got -1"),
    ({"mode": 2**31}, "mode: expected 0 to"),
    ({"mode": 1.0}, "mode: expected an integer, got '1.0'"),
    ({"mode": "x" * 1000}, "mode: expected an integer, got 'xxx"),
    ({"sampling_seed": -1}, "sampling_seed: expected 0 to 18446744073709551615"),
    ({"sampling_seed": 2**64}, "sampling_seed: expected"),
    ({"hysteresis_width": 0.5}, "expected previous_mode beside it"),
    ({"previous_mode": [0, 0], "mode": 1}, "expected no forced mode beside it"),
    ({"previous_mode": 0}, "expected integers of shape [2]"),
    ({"previous_mode": [0, 0, 0]}, "expected integers of shape [2]"),
    ({"previous_mode": [0.0, 1.0]}, "got float64 of shape [2]"),
    ({"previous_mode": [True, False]}, "got bool"),
    ({"previous_mode": [[0], [0, 0]]}, "expected an array of integers"),
    ({"previous_mode": [0, -2]}, "expected -1 to"),
    ({"previous_mode": [0, 2**31]}, "expected -1 to"),
    ({"previous_mode": [0, 0], "hysteresis_width": -0.1}, "hysteresis_width: expected a finite number of 0 or more"),
    ({"previous_mode": [0, 0], "hysteresis_width": float("nan")}, "hysteresis_width: expected"),
    ({"previous_mode": [0, 0], "hysteresis_width": 1e39}, "hysteresis_width: expected"),
    ({"variant": "actor", "hysteresis_width": 0.1}, "expected previous_mode beside it"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_meant_is_never_sent(
    server: FakePolicyServer, any_client: AnyClient, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        any_client.act(ROWS, deadline_s=10, **options)
    assert caught.value.reason == "BAD_OPTION"
    assert words in caught.value.detail
    assert server.requests == []
