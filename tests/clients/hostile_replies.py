"""Replies that must not reach a robot: each is an honest one with one thing wrong."""

from typing import Any

import numpy as np

from lom_api.codec import pack_array
from lom_api.v1 import policy_pb2
from tests.support.fake_policy_server import Act, Context, honest_act, tampered


def _with_action(values: object, dtype: Any = np.float32) -> Act:
    return tampered(lambda reply: reply.action.CopyFrom(pack_array(np.array(values, dtype=dtype))))


def _with_mode(values: object, dtype: Any = np.int32) -> Act:
    return tampered(lambda reply: reply.mode.CopyFrom(pack_array(np.array(values, dtype=dtype))))


def _with_margin(values: object, dtype: Any = np.float32) -> Act:
    return tampered(lambda reply: reply.margin.CopyFrom(pack_array(np.array(values, dtype=dtype))))


def _with_field(name: str, value: object) -> Act:
    return tampered(lambda reply: setattr(reply, name, value))


def _with_action_field(name: str, value: object) -> Act:
    return tampered(lambda reply: setattr(reply.action, name, value))


def _with_action_shape(*shape: int) -> Act:
    def change(reply: policy_pb2.ActReply) -> None:
        reply.action.shape[:] = shape

    return tampered(change)


def actor_with_mode(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
    """What a server answers whose actor is a residual one."""
    request.variant = "greedy_mode"
    reply = honest_act(request, context)
    reply.variant = "actor"
    return reply


def _with_scores(*scores: policy_pb2.Score) -> Act:
    return tampered(lambda reply: reply.scores.extend(scores))


def _score(
    values: object, *, dtype: Any = np.float32, name: str = "state_score", threshold: float = 1.0
) -> policy_pb2.Score:
    return policy_pb2.Score(name=name, values=pack_array(np.array(values, dtype=dtype)), threshold=threshold)


EXPLANATION_AXES = {"hyper_q": (), "mixing_weights": (), "component_means": (2,), "component_log_stds": (2,)}
"""What follows rows and components in each field."""


def _explained(field: str, values: object, dtype: Any = np.float32) -> Act:
    tensor = pack_array(np.array(values, dtype=dtype))
    return tampered(lambda reply: getattr(reply.explanation, field).CopyFrom(tensor))


def _other_bundle_without_components(reply: policy_pb2.ActReply) -> None:
    reply.bundle_digest = "e" * 64
    for name, axes in EXPLANATION_AXES.items():
        getattr(reply.explanation, name).CopyFrom(pack_array(np.zeros((1, 0, *axes), np.float32)))


# As below, for a request that asks for an explanation.
HOSTILE_EXPLANATIONS: dict[str, tuple[Act, str]] = {
    "none": (tampered(lambda reply: reply.ClearField("explanation")), "WRONG_FIELDS"),
    "empty": (tampered(lambda reply: reply.explanation.Clear()), "UNKNOWN_DTYPE"),
    "no weights": (tampered(lambda reply: reply.explanation.ClearField("mixing_weights")), "UNKNOWN_DTYPE"),
    "too few components": (_explained("hyper_q", [[0, 0]]), "BAD_SHAPE"),
    "two rows for one": (_explained("mixing_weights", [[0, 0, 0]] * 2), "BAD_SHAPE"),
    "means too wide": (_explained("component_means", [[[0, 0, 0]] * 3]), "BAD_SHAPE"),
    "means of rank 2": (_explained("component_means", [[0, 0, 0]]), "BAD_SHAPE"),
    "hyper-Q of integers": (_explained("hyper_q", [[0, 0, 0]], np.int32), "BAD_DTYPE"),
    "NaN log-std": (_explained("component_log_stds", [[[np.nan, 0]] * 3]), "BAD_EXPLANATION"),
    "infinite hyper-Q": (_explained("hyper_q", [[0, np.inf, 0]]), "BAD_EXPLANATION"),
    "no components": (tampered(_other_bundle_without_components), "BAD_MODE"),
}

# For one row; the request asks for greedy_mode. The reason that the client must give comes second.
HOSTILE_REPLIES: dict[str, tuple[Act, str]] = {
    "empty message": (lambda *_: policy_pb2.ActReply(), "WRONG_SEQUENCE"),
    "random bytes": (lambda *_: b"\xff\xfe\x00garbage", "MALFORMED_MESSAGE"),
    "score of integers": (_with_scores(_score([1], dtype=np.int32)), "BAD_DTYPE"),
    "score of too many rows": (_with_scores(_score([1.0, 2.0])), "BAD_SHAPE"),
    "score without values": (_with_scores(policy_pb2.Score(name="state_score", threshold=1.0)), "UNKNOWN_DTYPE"),
    "score twice": (_with_scores(_score([1.0]), _score([2.0])), "BAD_SCORES"),
    "a hundred scores": (_with_scores(*(_score([1.0], name=str(n)) for n in range(100))), "BAD_SCORES"),
    "score with a NaN threshold": (_with_scores(_score([1.0], threshold=float("nan"))), "BAD_SCORES"),
    "sequence before": (tampered(lambda reply: setattr(reply, "sequence", reply.sequence - 1)), "WRONG_SEQUENCE"),
    "sequence after": (tampered(lambda reply: setattr(reply, "sequence", reply.sequence + 1)), "WRONG_SEQUENCE"),
    "sequence largest": (_with_field("sequence", 2**64 - 1), "WRONG_SEQUENCE"),
    "other policy": (_with_field("policy", "other"), "WRONG_POLICY"),
    "no policy": (_with_field("policy", ""), "WRONG_POLICY"),
    "other variant": (_with_field("variant", "actor"), "WRONG_VARIANT"),
    "no variant": (_with_field("variant", ""), "WRONG_VARIANT"),
    "no digest": (_with_field("bundle_digest", ""), "MISSING_DIGEST"),
    "no action": (tampered(lambda reply: reply.ClearField("action")), "UNKNOWN_DTYPE"),
    "action of integers": (_with_action([[0, 0]], np.int32), "BAD_DTYPE"),
    "action of unknown dtype": (_with_action_field("dtype", 99), "UNKNOWN_DTYPE"),
    "action of no dtype": (_with_action_field("dtype", 0), "UNKNOWN_DTYPE"),
    "action too narrow": (_with_action([[0]]), "BAD_SHAPE"),
    "action too wide": (_with_action([[0, 0, 0]]), "BAD_SHAPE"),
    "action without rows": (_with_action([0, 0]), "BAD_SHAPE"),
    "action of rank 3": (_with_action([[[0, 0]]]), "BAD_SHAPE"),
    "two rows for one": (_with_action([[0, 0], [0, 0]]), "BAD_SHAPE"),
    "no rows": (_with_action(np.zeros((0, 2))), "BAD_SHAPE"),
    "transposed": (_with_action([[0], [0]]), "BAD_SHAPE"),
    "action scalar": (_with_action_shape(), "BAD_RANK"),
    "negative dimension": (_with_action_shape(-1, -2), "BAD_DIM"),
    "overflowing dimension": (_with_action_shape(2**62, 4), "SHAPE_OVERFLOW"),
    "rank 9": (_with_action_shape(*([1] * 8), 2), "BAD_RANK"),
    "too few bytes": (_with_action_field("data", b"\0" * 7), "SIZE_MISMATCH"),
    "too many bytes": (_with_action_field("data", b"\0" * 9), "SIZE_MISMATCH"),
    "NaN first": (_with_action([[np.nan, 0]]), "NON_FINITE_ACTION"),
    "NaN last": (_with_action([[0, np.nan]]), "NON_FINITE_ACTION"),
    "infinite": (_with_action([[np.inf, 0]]), "NON_FINITE_ACTION"),
    "minus infinite": (_with_action([[0, -np.inf]]), "NON_FINITE_ACTION"),
    "above": (_with_action([[0, 1.001]]), "ACTION_OUT_OF_BOUNDS"),
    "below": (_with_action([[-1.001, 0]]), "ACTION_OUT_OF_BOUNDS"),
    "far above": (_with_action([[3e38, 0]]), "ACTION_OUT_OF_BOUNDS"),
    "no mode": (tampered(lambda reply: reply.ClearField("mode")), "WRONG_FIELDS"),
    "no margin": (tampered(lambda reply: reply.ClearField("margin")), "WRONG_FIELDS"),
    "mode of floats": (_with_mode([0], np.float32), "BAD_DTYPE"),
    "two modes": (_with_mode([0, 0]), "BAD_SHAPE"),
    "explanation unasked": (_explained("hyper_q", [[0, 0, 0]]), "WRONG_FIELDS"),
    "mode negative": (_with_mode([-1]), "BAD_MODE"),
    "mode too large": (_with_mode([3]), "BAD_MODE"),
    "margin of integers": (_with_margin([0], np.int32), "BAD_DTYPE"),
    "margin of rank 2": (_with_margin([[0]]), "BAD_SHAPE"),
    "margin infinite": (_with_margin([np.inf]), "BAD_MARGIN"),
    "margin negative": (_with_margin([-0.1]), "BAD_MARGIN"),
}
