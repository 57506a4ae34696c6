"""No reply of a hostile or broken server passes for an action."""

import numpy as np
import pytest

from lom_api.codec import pack_array
from lom_api.v1 import policy_pb2
from lom_client import BadReply, ClientConfig, PolicyClient
from lom_client.actions import Score
from tests.clients.hostile_replies import ACTOR_WITH_MODE, HOSTILE_REPLIES
from tests.support.fake_policy_server import FakePolicyServer, tampered


@pytest.mark.parametrize("name", HOSTILE_REPLIES)
def test_a_hostile_reply_is_refused_with_its_reason(server: FakePolicyServer, client: PolicyClient, name: str) -> None:
    server.act, reason = HOSTILE_REPLIES[name]
    with pytest.raises(BadReply) as caught:
        client.act([0.1, 0.2, 0.3], deadline_s=10)
    assert caught.value.reason == reason


def test_the_actor_may_not_claim_a_mode(server: FakePolicyServer, client: PolicyClient) -> None:
    server.act = ACTOR_WITH_MODE
    with pytest.raises(BadReply) as caught:
        client.act([0.1, 0.2, 0.3], deadline_s=10, variant="actor")
    assert caught.value.reason == "WRONG_FIELDS"


def test_a_reply_beyond_the_size_limit_is_refused(server: FakePolicyServer) -> None:
    server.act = tampered(lambda reply: setattr(reply, "bundle_digest", "d" * 5000))
    config = ClientConfig(max_message_bytes=1024)
    with PolicyClient(server.target, config=config) as client, pytest.raises(BadReply) as caught:
        client.act([0.1, 0.2, 0.3], deadline_s=10)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


def test_rounding_at_a_bound_is_removed(server: FakePolicyServer, client: PolicyClient) -> None:
    just_outside = np.array([[1.000001, -1.000001]], dtype=np.float32)
    server.act = tampered(lambda reply: reply.action.CopyFrom(pack_array(just_outside)))
    answer = client.act([0.1, 0.2, 0.3], deadline_s=10)
    np.testing.assert_array_equal(answer.actions, [1, -1])


def test_a_mode_without_runner_up_has_margin_nan(server: FakePolicyServer, client: PolicyClient) -> None:
    server.act = tampered(lambda reply: reply.margin.CopyFrom(pack_array(np.array([np.nan], dtype=np.float32))))
    answer = client.act([0.1, 0.2, 0.3], deadline_s=10)
    assert answer.margin is not None
    assert np.isnan(answer.margin)


def test_another_bundle_may_have_more_components(server: FakePolicyServer, client: PolicyClient) -> None:
    def change(reply: policy_pb2.ActReply) -> None:
        reply.bundle_digest = "e" * 64
        reply.mode.CopyFrom(pack_array(np.array([7], dtype=np.int32)))

    server.act = tampered(change)
    assert client.act([0.1, 0.2, 0.3], deadline_s=10).mode == 7


def test_a_score_warns_above_its_threshold_and_at_nan() -> None:
    score = Score(values=np.array([0.5, 1.0, 1.5, np.nan], np.float32), threshold=1.0)
    assert score.warns.tolist() == [False, False, True, True]
