"""A policy without a socket: the edge's own handlers, on a loop in a thread, until it is closed."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import grpc
import numpy as np
import pytest

from lom_api.codec import pack_array, unpack_tensor
from lom_api.v1 import policy_pb2
from lom_client.transport import Transport
from lom_server.inproc import InProcessServer, connect
from tests.support import bundles
from tests.support.servers import PATIENCE_S, wait_until

OK = grpc.StatusCode.OK
ROWS = bundles.golden_observations()[:3]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inproc") / "toy"
    bundles.write_test_bundle(path)
    return path


@pytest.fixture
def server(bundle: Path) -> Iterator[InProcessServer]:
    server = connect(str(bundle))
    yield server
    server.close()


def act_message(**fields: object) -> bytes:
    request = policy_pb2.ActRequest(policy=bundles.POLICY, inputs=[pack_array(ROWS, "observation")], sequence=5)
    request.MergeFrom(policy_pb2.ActRequest(**fields))  # type: ignore[arg-type]
    return request.SerializeToString()


def test_it_answers_what_can_be_computed_on_paper(server: InProcessServer) -> None:
    code, message, content = server.call("Act", act_message(), 10).result(PATIENCE_S)
    assert (code, message) == (OK, "")
    reply = policy_pb2.ActReply.FromString(content)
    np.testing.assert_array_equal(unpack_tensor(reply.action), bundles.greedy_action(ROWS))
    assert (reply.policy, reply.version, reply.sequence) == (bundles.POLICY, 1, 5)


def test_it_is_what_a_client_takes_for_a_transport(server: InProcessServer) -> None:
    transport: Transport = server
    code, _, content = transport.call("GetPolicySpec", b"", 10).result(PATIENCE_S)
    assert code is OK
    assert policy_pb2.PolicySpec.FromString(content).policy == bundles.POLICY


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (b"\xff\xfe", grpc.StatusCode.INTERNAL, "BAD_MESSAGE: "),
        (act_message(variant="expert"), grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_VARIANT: "),
        (act_message(version=2), grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND: "),
    ],
)
def test_a_refusal_is_the_status_that_a_socket_would_carry(
    server: InProcessServer, message: bytes, code: grpc.StatusCode, reason: str
) -> None:
    answer = server.call("Act", message, 10).result(PATIENCE_S)
    assert answer[0] is code
    assert answer[1].startswith(reason)
    assert answer[2] == b""


def test_a_deadline_that_is_over_is_not_run(server: InProcessServer) -> None:
    code, message, _ = server.call("Act", act_message(), 0).result(PATIENCE_S)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert message.startswith("DEADLINE_EXCEEDED: ")


def test_threads_share_it_and_get_their_own_rows(server: InProcessServer) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (200, bundles.OBSERVATION_DIM)).astype(np.float32)
    calls = [
        server.call(
            "Act",
            policy_pb2.ActRequest(
                policy=bundles.POLICY, inputs=[pack_array(row[None], "observation")]
            ).SerializeToString(),
            10,
        )
        for row in rows
    ]
    replies = [policy_pb2.ActReply.FromString(call.result(PATIENCE_S)[2]) for call in calls]
    answers = np.concatenate([unpack_tensor(reply.action) for reply in replies])
    np.testing.assert_array_equal(answers, bundles.greedy_action(rows))
    assert max(reply.timings.batch_rows for reply in replies) > 1


def test_closing_cancels_what_is_under_way_and_all_that_comes_later(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    bundles.write_test_bundle(tmp_path / "slow", flaws=bundles.Flaws(burn_layers=20))
    server = connect(str(tmp_path / "slow"))
    calls = [server.call("Act", act_message(), 60) for _ in range(200)]
    began_at = time.monotonic()
    server.close()
    outcomes = [call.cancelled() or call.result(PATIENCE_S)[0] for call in calls]
    assert time.monotonic() - began_at < PATIENCE_S
    assert set(outcomes) <= {True, OK, grpc.StatusCode.UNAVAILABLE}
    server.close()
    with pytest.raises(CancelledError):
        server.call("Act", act_message(), 10).result(PATIENCE_S)
    wait_until(lambda: set(threading.enumerate()) <= before, "every thread to end")


def test_a_call_that_is_taken_back_is_not_answered(server: InProcessServer) -> None:
    call = server.call("Act", act_message(), 10)
    call.cancel()
    code, _, _ = server.call("Act", act_message(), 10).result(PATIENCE_S)
    assert code is OK


@pytest.mark.parametrize(
    ("flaws", "reason"),
    [
        (bundles.Flaws(wrong_golden=True), "SELF_TEST_FAILED"),
        (bundles.Flaws(name_of_observation_in_graph="obs"), "BAD_GRAPH"),
    ],
)
def test_a_bundle_that_does_not_prove_itself_is_refused_in_one_line(
    tmp_path: Path, flaws: bundles.Flaws, reason: str
) -> None:
    bundles.write_test_bundle(tmp_path / "bad", flaws=flaws)
    with pytest.raises(ValueError, match=f"inproc: {reason}: ") as caught:
        connect(str(tmp_path / "bad"))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_path_that_cannot_be_meant_is_refused_in_one_line() -> None:
    for path in ("", "/dev/null", "nowhere", "a\nb"):
        with pytest.raises(ValueError, match="expected"):
            connect(path)
