"""The answer to one policy call, and the checks that stand between a reply and a robot."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lom_api.codec import Array, CodecError, unpack_tensor
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_client.errors import BadReply
from lom_client.spec import GREEDY_MODE, PolicySpec, Space

_MOST_SCORES = 16
# The policy clips in its own arithmetic; what it may miss a float32 bound by is rounding, not intent.
_BOUND_TOLERANCE = np.float32(1e-5)


@dataclass(frozen=True)
class Timings:
    """Where the time of one call went. **Units**: seconds; `batch_rows` counts other callers' rows too."""

    queue_s: float
    inference_s: float
    batch_rows: int
    round_trip_s: float


@dataclass(frozen=True, eq=False)
class Score:
    """A number that is large where a robot should be warned.

    **Shapes**: `values` float32 and `warns` bool, with the leading axes of the observations. `warns` is True where the
    value is not at or below `threshold`, NaN included.
    """

    values: NDArray[np.float32]
    threshold: float

    @property
    def warns(self) -> NDArray[np.bool_]:
        """Which rows are worth a warning."""
        return np.asarray(~(self.values <= self.threshold))


@dataclass(frozen=True, eq=False)
class Explanation:
    """What every component of the behaviour mixture would have meant.

    **Shapes**: with the leading axes of the observations, `hyper_q` and `mixing_weights` float32[..., M],
    `component_means` and `component_log_stds` float32[..., M, A].

    **Units**: means in environment units, log-stds of actions scaled to [-1, 1]. `hyper_q` is what the choice is made
    by, less the price of what is unlikely where the policy was trained with one.
    """

    hyper_q: NDArray[np.float32]
    mixing_weights: NDArray[np.float32]
    component_means: NDArray[np.float32]
    component_log_stds: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Actions:
    """Checked actions, ready for the environment.

    **Shapes**: for observations `[B, O]`: `actions` float32[B, A], `mode` int32[B], `margin` float32[B]; for one row
    `[O]`: `actions` float32[A] and scalars of shape `[]`. `mode` and `margin` are None for a variant that chooses no
    mode; `margin` is NaN where the chosen mode had no runner-up.

    `scores` holds what the bundle can warn by: `state_score` (is the observation like the training data?) and
    `action_score` (would the behaviour have acted like this?); empty where the bundle was not calibrated.

    `explanation` is None unless it was asked for. `is_clamped` says that the policy's own action had to be cut to the
    action space, which a sound bundle never needs.

    **Units**: environment units, finite and inside the action space without exception.
    """

    actions: NDArray[np.float32]
    variant: str
    mode: NDArray[np.int32] | None
    margin: NDArray[np.float32] | None
    policy: str
    version: int
    bundle_digest: str
    sequence: int
    timings: Timings
    scores: Mapping[str, Score]
    explanation: Explanation | None = None
    is_clamped: bool = False


def read_reply(
    reply: policy_pb2.ActReply,
    request: policy_pb2.ActRequest,
    spec: PolicySpec,
    leading: tuple[int, ...],
    round_trip_s: float,
) -> Actions:
    """Message to checked actions.

    Args:
        reply: what arrived.
        request: what it claims to answer.
        spec: the contract that both sides agreed on.
        leading: axes before the last one in the caller's observations, `(B,)` or `()`.
        round_trip_s: seconds from sending to receiving.

    Raises:
        BadReply: the reply answers another request, or carries anything that must not reach a robot.
    """
    if reply.sequence != request.sequence:
        raise BadReply("WRONG_SEQUENCE", f"expected {request.sequence}, got {reply.sequence}")
    if reply.policy != request.policy:
        raise BadReply("WRONG_POLICY", "the reply comes from another policy than the one asked for")
    if reply.variant != request.variant:
        raise BadReply("WRONG_VARIANT", f"expected {request.variant}, got another one")
    if request.version and reply.version != request.version:
        raise BadReply("WRONG_VERSION", f"expected {request.version}, got {reply.version}")
    if not reply.bundle_digest:
        raise BadReply("MISSING_DIGEST", "the reply does not name the bundle that answered")

    rows = request.inputs[0].shape[0]
    actions = _read_tensor(reply.action, "action", np.dtype(np.float32), (rows, spec.action.width))
    num_components = _num_components(reply, spec)
    mode, margin = _read_mode(reply, request, rows, num_components)
    return Actions(
        actions=_inside(spec.action, actions).reshape(*leading, spec.action.width),
        variant=reply.variant,
        mode=None if mode is None else mode.reshape(leading),
        margin=None if margin is None else margin.reshape(leading),
        policy=reply.policy,
        version=reply.version,
        bundle_digest=reply.bundle_digest,
        sequence=reply.sequence,
        timings=Timings(
            queue_s=reply.timings.queue_ns * 1e-9,
            inference_s=reply.timings.inference_ns * 1e-9,
            batch_rows=reply.timings.batch_rows,
            round_trip_s=round_trip_s,
        ),
        scores=_read_scores(reply, rows, leading),
        explanation=_read_explanation(reply, request, leading, spec.action.width, num_components),
        is_clamped=reply.is_clamped,
    )


def _read_scores(reply: policy_pb2.ActReply, rows: int, leading: tuple[int, ...]) -> dict[str, Score]:
    if len(reply.scores) > _MOST_SCORES or len({score.name for score in reply.scores}) != len(reply.scores):
        raise BadReply("BAD_SCORES", f"expected at most {_MOST_SCORES} scores, each of them once")
    scores = {}
    for score in reply.scores:
        values = _read_tensor(score.values, "score", np.dtype(np.float32), (rows,))
        if not np.isfinite(score.threshold):
            raise BadReply("BAD_SCORES", "expected a finite threshold")
        read = Score(values=values.reshape(leading).copy(), threshold=score.threshold)
        if score.warns and list(score.warns) != read.warns.reshape(-1).tolist():
            raise BadReply("BAD_SCORES", "expected the rows that warn to be those above the threshold")
        scores[score.name] = read
    return scores


def _num_components(reply: policy_pb2.ActReply, spec: PolicySpec) -> int:
    """Components of the bundle that answered: one of the same contract may have another number of them."""
    if reply.bundle_digest == spec.bundle_digest:
        return spec.num_components
    if len(reply.explanation.hyper_q.shape) == 2:
        return reply.explanation.hyper_q.shape[1]
    return np.iinfo(np.int32).max


def _concerns_modes(request: policy_pb2.ActRequest) -> bool:
    """Whether only a variant that chooses a mode can answer."""
    return (
        request.explain
        or request.HasField("mode")
        or request.HasField("sampling_seed")
        or request.HasField("hysteresis")
    )


def _read_mode(
    reply: policy_pb2.ActReply, request: policy_pb2.ActRequest, rows: int, num_components: int
) -> tuple[NDArray[np.int32] | None, NDArray[np.float32] | None]:
    # Whether an actor has modes is the bundle's, and a bundle of the same contract may take its place.
    has_mode = reply.HasField("mode")
    must_have_mode = reply.variant == GREEDY_MODE or _concerns_modes(request)
    if reply.HasField("margin") != has_mode or (must_have_mode and not has_mode):
        raise BadReply("WRONG_FIELDS", "expected mode and margin together, and both where modes were asked about")
    if not has_mode:
        return None, None
    mode = _read_tensor(reply.mode, "mode", np.dtype(np.int32), (rows,))
    margin = _read_tensor(reply.margin, "margin", np.dtype(np.float32), (rows,))
    if (mode < 0).any() or (mode >= num_components).any():
        raise BadReply("BAD_MODE", f"expected components 0 to {num_components - 1}")
    if request.HasField("mode") and (mode != request.mode).any():
        raise BadReply("BAD_MODE", f"expected the component {request.mode} that was asked for")
    if np.isinf(margin).any() or (margin < 0).any():
        raise BadReply("BAD_MARGIN", "expected margins of 0 or more, or NaN")
    return mode.copy(), margin.copy()


def _read_explanation(
    reply: policy_pb2.ActReply,
    request: policy_pb2.ActRequest,
    leading: tuple[int, ...],
    action_width: int,
    num_components: int,
) -> Explanation | None:
    if reply.HasField("explanation") != request.explain:
        raise BadReply("WRONG_FIELDS", "an explanation belongs to a request that asks for it and to nothing else")
    if not request.explain:
        return None
    message = reply.explanation
    rows = request.inputs[0].shape[0]

    def read(role: str, tensor: policy_pb2.Tensor, *axes: int) -> NDArray[np.float32]:
        values = _read_tensor(tensor, role, np.dtype(np.float32), (rows, *axes))
        if not np.isfinite(values).all():
            raise BadReply("BAD_EXPLANATION", f"{role}: expected finite numbers")
        return values.reshape(*leading, *axes).copy()

    return Explanation(
        hyper_q=read("hyper_q", message.hyper_q, num_components),
        mixing_weights=read("mixing_weights", message.mixing_weights, num_components),
        component_means=read("component_means", message.component_means, num_components, action_width),
        component_log_stds=read("component_log_stds", message.component_log_stds, num_components, action_width),
    )


def _read_tensor(tensor: policy_pb2.Tensor, role: str, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
    try:
        array = unpack_tensor(tensor)
    except CodecError as error:
        raise BadReply(error.reason, f"{role}: {error.detail}") from None
    if array.dtype != dtype:
        raise BadReply(Reason.BAD_DTYPE, f"{role}: expected {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise BadReply(Reason.BAD_SHAPE, f"{role}: expected {list(shape)}, got {list(array.shape)}")
    return array


def _inside(space: Space, actions: Array) -> NDArray[np.float32]:
    """The actions, with rounding at the bounds removed."""
    if not np.isfinite(actions).all():
        raise BadReply(Reason.NON_FINITE_ACTION, "an action is NaN or infinite")
    low_limit = space.low - _BOUND_TOLERANCE * np.maximum(1, np.abs(space.low))
    high_limit = space.high + _BOUND_TOLERANCE * np.maximum(1, np.abs(space.high))
    outside = (actions < low_limit) | (actions > high_limit)
    if outside.any():
        row, column = (int(index) for index in np.argwhere(outside)[0])
        raise BadReply(
            "ACTION_OUT_OF_BOUNDS",
            f"action[{row}, {column}]: expected {space.low[column]} to {space.high[column]}, "
            f"got {actions[row, column]}",
        )
    inside: NDArray[np.float32] = np.clip(actions, space.low, space.high)
    return inside
