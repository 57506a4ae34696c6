"""No reply of a hostile or broken server passes for an action."""

from typing import Any

import numpy as np
import pytest

from lom_api.codec import pack_array
from lom_api.v1 import policy_pb2
from lom_client import BadReply, ClientConfig, PolicyClient
from lom_client.actions import Score
from tests.clients.conftest import AnyClient, Connect
from tests.clients.hostile_replies import EXPLANATION_AXES, HOSTILE_EXPLANATIONS, HOSTILE_REPLIES, actor_with_mode
from tests.support.fake_policy_server import Context, FakePolicyServer, tampered


@pytest.mark.parametrize("name", HOSTILE_REPLIES)
def test_a_hostile_reply_is_refused_with_its_reason(server: FakePolicyServer, any_client: AnyClient, name: str) -> None:
    server.act, reason = HOSTILE_REPLIES[name]
    with pytest.raises(BadReply) as caught:
        any_client.act([0.1, 0.2, 0.3], deadline_s=10)
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", HOSTILE_EXPLANATIONS)
def test_a_hostile_explanation_is_refused_with_its_reason(
    server: FakePolicyServer, any_client: AnyClient, name: str
) -> None:
    server.act, reason = HOSTILE_EXPLANATIONS[name]
    with pytest.raises(BadReply) as caught:
        any_client.act([0.1, 0.2, 0.3], deadline_s=10, explain=True)
    assert caught.value.reason == reason


def test_an_actor_may_act_by_a_mode(server: FakePolicyServer, any_client: AnyClient) -> None:
    server.act = actor_with_mode
    answer = any_client.act([0.1, 0.2, 0.3], deadline_s=10, variant="actor", explain=True)
    assert answer.mode is not None
    assert (answer.variant, int(answer.mode)) == ("actor", 2)
    assert answer.margin == pytest.approx(0.1)
    assert answer.explanation is not None


@pytest.mark.parametrize("options", [{"explain": True}, {"mode": 0}, {"sampling_seed": 0}, {"previous_mode": -1}])
def test_who_asks_about_modes_is_told_one(server: FakePolicyServer, any_client: AnyClient, options: Any) -> None:
    def silent(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        reply = actor_with_mode(request, context)
        reply.ClearField("mode")
        reply.ClearField("margin")
        return reply

    server.act = silent
    with pytest.raises(BadReply) as caught:
        any_client.act([0.1, 0.2, 0.3], deadline_s=10, variant="actor", **options)
    assert caught.value.reason == "WRONG_FIELDS"
    assert any_client.act([0.1, 0.2, 0.3], deadline_s=10, variant="actor").mode is None


def test_a_reply_beyond_the_size_limit_is_refused(server: FakePolicyServer, connect: Connect) -> None:
    server.act = tampered(lambda reply: setattr(reply, "bundle_digest", "d" * 5000))
    config = ClientConfig(max_message_bytes=1024)
    with connect(server.target, config=config) as client, pytest.raises(BadReply) as caught:
        client.act([0.1, 0.2, 0.3], deadline_s=10)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"


def test_rounding_at_a_bound_is_removed(server: FakePolicyServer, any_client: AnyClient) -> None:
    just_outside = np.array([[1.000001, -1.000001]], dtype=np.float32)
    server.act = tampered(lambda reply: reply.action.CopyFrom(pack_array(just_outside)))
    answer = any_client.act([0.1, 0.2, 0.3], deadline_s=10)
    np.testing.assert_array_equal(answer.actions, [1, -1])


def test_a_mode_without_runner_up_has_margin_nan(server: FakePolicyServer, any_client: AnyClient) -> None:
    server.act = tampered(lambda reply: reply.margin.CopyFrom(pack_array(np.array([np.nan], dtype=np.float32))))
    answer = any_client.act([0.1, 0.2, 0.3], deadline_s=10)
    assert answer.margin is not None
    assert np.isnan(answer.margin)


def test_another_bundle_may_have_more_components(server: FakePolicyServer, any_client: AnyClient) -> None:
    def change(reply: policy_pb2.ActReply) -> None:
        reply.bundle_digest = "e" * 64
        reply.mode.CopyFrom(pack_array(np.array([7], dtype=np.int32)))

    server.act = tampered(change)
    assert any_client.act([0.1, 0.2, 0.3], deadline_s=10).mode == 7


def test_a_score_warns_above_its_threshold_and_at_nan() -> None:
    score = Score(values=np.array([0.5, 1.0, 1.5, np.nan], np.float32), threshold=1.0)
    assert score.warns.tolist() == [False, False, True, True]


def test_an_explanation_has_the_axes_of_its_observations(any_client: AnyClient) -> None:
    for rows, leading in (([0.1, 0.2, 0.3], ()), ([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], (2,))):
        explanation = any_client.act(rows, deadline_s=10, explain=True).explanation
        assert explanation is not None
        np.testing.assert_array_equal(explanation.hyper_q, np.array(rows, np.float32))
        np.testing.assert_array_equal(explanation.mixing_weights, np.full((*leading, 3), 1 / 3, np.float32))
        assert explanation.component_means.shape == explanation.component_log_stds.shape == (*leading, 3, 2)
    assert any_client.act([0.1, 0.2, 0.3], deadline_s=10).explanation is None


def test_another_bundle_explains_as_many_components_as_it_has(server: FakePolicyServer, client: PolicyClient) -> None:
    def change(reply: policy_pb2.ActReply) -> None:
        reply.bundle_digest = "e" * 64
        reply.mode.CopyFrom(pack_array(np.array([4], dtype=np.int32)))
        for name, axes in EXPLANATION_AXES.items():
            getattr(reply.explanation, name).CopyFrom(pack_array(np.zeros((1, 5, *axes), np.float32)))

    server.act = tampered(change)
    explanation = client.act([0.1, 0.2, 0.3], deadline_s=10, explain=True).explanation
    assert explanation is not None
    assert explanation.component_means.shape == (5, 2)


def test_what_the_server_says_of_clamping_is_passed_on(server: FakePolicyServer, client: PolicyClient) -> None:
    assert not client.act([0.1, 0.2, 0.3], deadline_s=10).is_clamped
    server.act = tampered(lambda reply: setattr(reply, "is_clamped", True))
    assert client.act([0.1, 0.2, 0.3], deadline_s=10).is_clamped


def test_a_pinned_version_is_asked_for_and_no_other_one_answers(server: FakePolicyServer, connect: Connect) -> None:
    server.spec.version = 3
    server.act = tampered(lambda reply: setattr(reply, "version", 3))
    with connect(server.target, version=3) as client:
        assert client.act([0.1, 0.2, 0.3], deadline_s=10).version == 3
        assert server.requests[-1].version == 3
        server.act = tampered(lambda reply: setattr(reply, "version", 4))
        with pytest.raises(BadReply) as caught:
            client.act([0.1, 0.2, 0.3], deadline_s=10)
        assert caught.value.reason == "WRONG_VERSION"


def test_a_forced_mode_that_did_not_act_is_refused(server: FakePolicyServer, client: PolicyClient) -> None:
    assert client.act([0.1, 0.2, 0.3], deadline_s=10, mode=1).mode == 1
    server.act = tampered(lambda reply: reply.mode.CopyFrom(pack_array(np.array([2], dtype=np.int32))))
    with pytest.raises(BadReply) as caught:
        client.act([0.1, 0.2, 0.3], deadline_s=10, mode=1)
    assert caught.value.reason == "BAD_MODE"


@pytest.mark.parametrize(
    ("flags", "is_sound"), [([], True), ([False, True], True), ([True, True], False), ([True], False)]
)
def test_the_servers_warnings_agree_with_its_scores(
    server: FakePolicyServer, client: PolicyClient, flags: list[bool], is_sound: bool
) -> None:
    values = pack_array(np.array([0.5, 1.5], np.float32))
    score = policy_pb2.Score(name="state_score", values=values, threshold=1.0, warns=flags)
    server.act = tampered(lambda reply: reply.scores.append(score))
    if is_sound:
        answer = client.act(np.zeros((2, 3)), deadline_s=10)
        assert answer.scores["state_score"].warns.tolist() == [False, True]
        return
    with pytest.raises(BadReply) as caught:
        client.act(np.zeros((2, 3)), deadline_s=10)
    assert caught.value.reason == "BAD_SCORES"
