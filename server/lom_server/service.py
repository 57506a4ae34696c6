"""What the server promises, without a transport: find the policy, check the rows, have them answered.

Works on dataclasses and numpy arrays, so that every edge, and a caller in the same process, meets the same checks.
"""

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

from lom_api.reasons import Reason
from lom_bundle import EXPLAIN_SUFFIX, Manifest, SpaceSpec
from lom_server.batcher import Answer, Array, Lane, MicroBatcher, Priority, Rows, Ticket
from lom_server.errors import PolicyError, quoted

LARGEST_VERSION = 2**31 - 1
EXPLANATION_OUTPUTS = ("hyper_q", "mixing_weights", "component_means", "component_log_stds")
_FORCED_MODE = "forced_mode"
_NOISE = "noise"
_POLICY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MOST_NAMES_LISTED = 8
_SMALLEST_NORMAL = np.finfo(np.float32).tiny
# Sensors and environments miss a float32 bound by rounding.
_BOUND_TOLERANCE = 1e-5
_CLOCKS_APART_NS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ActRequest:
    """One caller's rows. The options from `explain` to `hysteresis_width` want a variant that chooses a mode.

    Attributes:
        policy: which policy is asked.
        inputs: (name, float32[B, ...]) pairs, raw environment units.
        version: 0 asks for the policy's default version.
        variant: empty asks for the policy's default.
        contract_hash: refused where it is given and differs from the policy's.
        explain: also answer what every component would have meant.
        mode: act by this component, whether it is supported or not.
        sampling_seed: add noise as large as the component's spread to the action; a row's noise depends on the seed and
            its place only.
        previous_mode: int32[B], -1 where there is none: a mode to keep unless another's hyper-Q is more than
            `hysteresis_width` higher. Not kept where the support mask would not allow it.
        priority: who goes first when the engine is short.
        client: who asks, for fairness.
        source: whose observations follow one another, in a recording; empty for the client's.
        ticket: told when the request begins to run.
    """

    policy: str
    inputs: Sequence[tuple[str, Array]]
    version: int = 0
    variant: str = ""
    contract_hash: str = ""
    explain: bool = False
    mode: int | None = None
    sampling_seed: int | None = None
    previous_mode: Array | None = None
    hysteresis_width: float = 0.0
    priority: Priority = Priority.LIVE
    client: str = ""
    source: str = ""
    ticket: Ticket | None = None

    @property
    def has_mode_options(self) -> bool:
        """Whether the request asks for more than the policy's own choice."""
        return (
            self.explain
            or self.mode is not None
            or self.sampling_seed is not None
            or self.previous_mode is not None
            or self.hysteresis_width != 0
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A number per row, float32[B], and whether it is worth a warning, bool[B]: above the threshold, or NaN."""

    values: Array
    threshold: float
    warns: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class ActReply:
    """One caller's answers.

    Attributes:
        action: float32[B, A], environment units, finite and inside the action space.
        mode: int32[B], the component that acted; None where the variant has none.
        margin: float32[B], best minus second-best hyper-Q; None where the variant has none.
        scores: by name, what the bundle can warn by.
        explanation: by name, `EXPLANATION_OUTPUTS`; empty where nobody asked.
        is_clamped: an action of the graph had to be cut to the action space.
        queue_ns, inference_ns, batch_rows: as `Answer`.
    """

    action: Array
    mode: Array | None
    margin: Array | None
    scores: Mapping[str, Score]
    explanation: Mapping[str, Array]
    is_clamped: bool
    policy: str
    version: int
    variant: str
    bundle_digest: str
    queue_ns: int
    inference_ns: int
    batch_rows: int


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """One version of a policy that passed its self-check.

    Attributes:
        name: under which it is asked for; the manifest's own may differ.
        lanes: where the batcher takes rows, by graph: a variant's name, and with `EXPLAIN_SUFFIX` where it has such a
            graph.
        provider: the execution provider that answers.
    """

    name: str
    version: int
    manifest: Manifest
    bundle_digest: str
    lanes: Mapping[str, Lane]
    provider: str
    max_batch_rows: int

    @cached_property
    def contract_hash(self) -> str:
        """The manifest's, computed once."""
        return self.manifest.contract_hash

    @cached_property
    def action_bounds(self) -> tuple[Array, Array]:
        """Low and high, float32[A]."""
        return _bounds(self.manifest.action.low), _bounds(self.manifest.action.high)

    @cached_property
    def input_bounds(self) -> Mapping[str, tuple[Array, Array]]:
        """Low and high by input, in its shape and with a tolerance; inputs without any bound are left out."""
        bounds = {}
        for space in self.manifest.inputs:
            low, high = _bounds(space.low), _bounds(space.high)
            if np.isfinite(low).any() or np.isfinite(high).any():
                low = low - _BOUND_TOLERANCE * np.maximum(1, np.abs(low))
                high = high + _BOUND_TOLERANCE * np.maximum(1, np.abs(high))
                bounds[space.name] = low.reshape(space.shape), high.reshape(space.shape)
        return bounds


@dataclass(frozen=True, kw_only=True)
class PolicyVersions:
    """The versions of one policy that can be asked for, and the one that answers whoever names none."""

    versions: Mapping[int, ServedPolicy]
    default_version: int


class Observer(Protocol):
    """Who is told of every request. Called on the event loop, in the path of every answer: must be quick."""

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        """`request` was answered; `total_ns` from its call of `act`."""
        ...

    def refused(self, policy: str, reason: Reason) -> None:
        """A request was not answered; `policy` is empty where no such policy is served."""
        ...


@dataclass(kw_only=True)
class _Unobserved:
    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        pass

    def refused(self, policy: str, reason: Reason) -> None:
        pass


@dataclass(kw_only=True)
class PolicyService:
    """Answers for the policies that were published to it.

    Threads: belongs to the batcher's event loop.
    """

    batcher: MicroBatcher
    observer: Observer = field(default_factory=_Unobserved)
    _policies: dict[str, PolicyVersions] = field(default_factory=dict, init=False)
    _missing: dict[str, Reason] = field(default_factory=dict, init=False)
    _is_draining: bool = field(default=False, init=False)

    def publish(self, name: str, policy: PolicyVersions) -> None:
        """Serves `policy` under `name` from now on; requests under way finish on the version that they started with."""
        self._missing.pop(name, None)
        self._policies[name] = policy

    def withdraw(self, name: str, reason: Reason | None = None) -> None:
        """Serves `name` no longer.

        Args:
            reason: MODEL_LOADING or MODEL_FAILED, where the policy belongs here although it cannot be asked now.
        """
        self._policies.pop(name, None)
        self._missing.pop(name, None)
        if reason is not None:
            self._missing[name] = reason

    def drain(self) -> None:
        """Refuses every later request with DRAINING; those already accepted are finished."""
        self._is_draining = True

    @property
    def policies(self) -> Mapping[str, PolicyVersions]:
        """What can be asked for, by name."""
        return self._policies

    @property
    def missing(self) -> Mapping[str, Reason]:
        """Policies that belong here and cannot be asked now, with the reason."""
        return self._missing

    async def act(self, request: ActRequest, deadline_ns: int) -> ActReply:
        """Answers one action for every row, before `deadline_ns` of the batcher's clock.

        Raises:
            PolicyError: with the reason; nothing ran for a request that contradicts the policy's contract.
        """
        start_ns = time.monotonic_ns()
        try:
            reply = await self._answer(request, deadline_ns)
        except PolicyError as error:
            self._count_refusal(request.policy, error.reason)
            raise
        except asyncio.CancelledError:
            # gRPC cancels when the caller's deadline passes, too; its clock and ours are not quite one.
            is_over = time.monotonic_ns() >= deadline_ns - _CLOCKS_APART_NS
            self._count_refusal(request.policy, Reason.DEADLINE_EXCEEDED if is_over else Reason.CANCELLED)
            raise
        except Exception:
            self._count_refusal(request.policy, Reason.INTERNAL_ERROR)
            raise
        self.observer.answered(request, reply, time.monotonic_ns() - start_ns)
        return reply

    @contextmanager
    def counting_refusals(self, policy: str = "") -> Iterator[None]:
        """For what an edge refuses before it calls `act`: the observer is told of it, too."""
        try:
            yield
        except PolicyError as error:
            self._count_refusal(policy, error.reason)
            raise

    def _count_refusal(self, policy: str, reason: Reason) -> None:
        self.observer.refused(policy if policy in self._policies else "", reason)

    def find(self, name: str, version: int = 0) -> ServedPolicy:
        """A version of the policy of that name; of the only policy where the name is empty.

        Args:
            version: 0 for the policy's default.

        Raises:
            PolicyError: DRAINING, MISSING_MODEL (the name is empty and there are several), BAD_MODEL_NAME,
                MODEL_NOT_FOUND, MODEL_LOADING, MODEL_FAILED, BAD_VERSION or VERSION_NOT_FOUND.
        """
        if self._is_draining:
            raise PolicyError(Reason.DRAINING, "the server is stopping and takes no new requests")
        if not name:
            if len(self._policies) > 1:
                raise PolicyError(
                    Reason.MISSING_MODEL, f"policy: expected the name of one of {len(self._policies)}, got none"
                )
            name = next(iter(self._policies or self._missing), "")
        policy = self._policies.get(name)
        if policy is None:
            raise self._not_served(name)
        served = policy.versions.get(version or policy.default_version)
        if served is not None:
            return served
        if not 0 < version <= LARGEST_VERSION:
            raise PolicyError(Reason.BAD_VERSION, f"version: expected 0 to {LARGEST_VERSION}, got {version}")
        raise PolicyError(
            Reason.VERSION_NOT_FOUND,
            f"version: expected one of {', '.join(map(str, sorted(policy.versions)[-_MOST_NAMES_LISTED:]))}, "
            f"got {version}",
        )

    def _not_served(self, name: str) -> PolicyError:
        if name and not _POLICY_NAME.fullmatch(name):
            return PolicyError(Reason.BAD_MODEL_NAME, f"policy: expected {_POLICY_NAME.pattern}, got {quoted(name)}")
        reason = self._missing.get(name)
        if reason is Reason.MODEL_FAILED:
            return PolicyError(reason, f"policy {quoted(name)} could not be loaded")
        if reason is Reason.MODEL_LOADING:
            return PolicyError(Reason.MODEL_LOADING, "the policy is still being checked", retry_after_ms=1000)
        return PolicyError(Reason.MODEL_NOT_FOUND, f"policy {quoted(name)} is not served here")

    async def _answer(self, request: ActRequest, deadline_ns: int) -> ActReply:
        if not request.policy:
            raise PolicyError(Reason.MISSING_MODEL, "policy: expected a name, got none")
        policy = self.find(request.policy, request.version)
        variant = _checked_variant(policy, request)
        rows = _checked_rows(policy, request.inputs)
        if request.has_mode_options:
            answer = await self._submit_with_options(policy, variant, request, rows, deadline_ns)
        else:
            answer = await self._submit(policy.lanes[variant], request, rows, deadline_ns)
        action, is_clamped = _checked_action(policy, answer.rows["action"])
        return ActReply(
            action=action,
            mode=answer.rows.get("mode"),
            margin=answer.rows.get("margin"),
            scores=_scores(policy.manifest, variant, answer.rows),
            explanation={name: answer.rows[name] for name in EXPLANATION_OUTPUTS} if request.explain else {},
            is_clamped=is_clamped,
            policy=policy.name,
            version=policy.version,
            variant=variant,
            bundle_digest=policy.bundle_digest,
            queue_ns=answer.queue_ns,
            inference_ns=answer.inference_ns,
            batch_rows=answer.batch_rows,
        )

    async def _submit(self, lane: Lane, request: ActRequest, rows: Rows, deadline_ns: int) -> Answer:
        return await self.batcher.submit(
            lane, rows, deadline_ns, client=request.client, priority=request.priority, ticket=request.ticket
        )

    async def _submit_with_options(
        self, policy: ServedPolicy, variant: str, request: ActRequest, rows: Rows, deadline_ns: int
    ) -> Answer:
        lane = policy.lanes.get(variant + EXPLAIN_SUFFIX)
        if lane is None:
            raise PolicyError(
                Reason.BAD_OPTION,
                f"variant {quoted(variant)}: expected none of explain, mode, sampling_seed and hysteresis, "
                "which it has no graph for",
            )
        count = len(next(iter(rows.values())))
        _check_mode_options(request, policy.manifest.num_components, count)
        noise = np.zeros((count, *policy.manifest.action.shape), np.float32)
        if request.sampling_seed is not None:
            np.random.Generator(np.random.Philox(key=request.sampling_seed)).standard_normal(
                dtype=np.float32, out=noise
            )
        forced = np.full(count, -1 if request.mode is None else request.mode, np.int32)
        answer = await self._submit(lane, request, {**rows, _FORCED_MODE: forced, _NOISE: noise}, deadline_ns)
        if request.previous_mode is None:
            return answer
        kept = _kept_modes(answer.rows, request.previous_mode, request.hysteresis_width, policy.manifest)
        if (kept < 0).all():
            return answer
        # Near a switch only: the graph itself answers what the kept mode does, so that no rule of it is repeated here.
        second = await self._submit(lane, request, {**rows, _FORCED_MODE: kept, _NOISE: noise}, deadline_ns)
        return Answer(
            rows=second.rows,
            queue_ns=answer.queue_ns + second.queue_ns,
            inference_ns=answer.inference_ns + second.inference_ns,
            batch_rows=second.batch_rows,
        )


def _checked_variant(policy: ServedPolicy, request: ActRequest) -> str:
    """The variant to run, once the contract is the one that the caller means."""
    if request.contract_hash and request.contract_hash != policy.contract_hash:
        raise PolicyError(
            Reason.CONTRACT_MISMATCH,
            f"contract_hash: expected {policy.contract_hash[:12]}, got {quoted(request.contract_hash[:12])}",
        )
    variants = policy.manifest.variants
    variant = request.variant or policy.manifest.default_variant
    if variant not in variants:
        raise PolicyError(
            Reason.UNKNOWN_VARIANT, f"variant: expected one of {_listed(variants)}, got {quoted(variant)}"
        )
    return variant


def _checked_rows(policy: ServedPolicy, inputs: Sequence[tuple[str, Array]]) -> Rows:
    """The inputs by name, once they are exactly what the bundle's spaces ask for."""
    spaces = policy.manifest.inputs
    rows = dict(inputs)
    if len(rows) != len(inputs):
        ((twice, _),) = Counter(name for name, _ in inputs).most_common(1)
        raise PolicyError(Reason.DUPLICATE_INPUT, f"input {quoted(twice)}: expected it once")
    for name in rows:
        if not any(name == space.name for space in spaces):
            expected = _listed([space.name for space in spaces])
            raise PolicyError(Reason.UNKNOWN_INPUT, f"input {quoted(name)}: expected one of {expected}")
    count = -1
    for space in spaces:
        array = rows.get(space.name)
        if array is None:
            raise PolicyError(Reason.MISSING_INPUT, f"input {quoted(space.name)}: expected it, got none")
        if array.dtype != np.float32:
            raise _wrong(Reason.BAD_DTYPE, space.name, "float32", str(array.dtype))
        if array.ndim != len(space.shape) + 1:
            raise _wrong(Reason.BAD_RANK, space.name, f"{len(space.shape) + 1} dimensions", str(array.ndim))
        if array.shape[1:] != space.shape:
            raise _wrong(Reason.BAD_SHAPE, space.name, f"{list(space.shape)} per row", str(list(array.shape[1:])))
        if count < 0:
            count = len(array)
        if len(array) != count:
            raise _wrong(Reason.BATCH_MISMATCH, space.name, f"{count} rows, as in the first input", str(len(array)))
        if count == 0:
            raise _wrong(Reason.EMPTY_BATCH, space.name, "1 row or more", "0")
        if count > policy.max_batch_rows:
            raise _wrong(Reason.BATCH_TOO_LARGE, space.name, f"at most {policy.max_batch_rows} rows", str(count))
        if not np.isfinite(array).all():
            index = int(np.flatnonzero(~np.isfinite(array))[0])
            raise PolicyError(
                Reason.NON_FINITE, f"input {quoted(space.name)}: expected finite values, got none at flat index {index}"
            )
        if space.name in policy.input_bounds:
            _check_range(space, array, *policy.input_bounds[space.name])
        rows[space.name] = _without_subnormals(array)
    return rows


def _check_range(space: SpaceSpec, array: Array, low: Array, high: Array) -> None:
    outside = (array < low) | (array > high)
    if outside.any():
        index = int(np.flatnonzero(outside)[0])
        element = index % len(space.low)
        raise PolicyError(
            Reason.OBS_OUT_OF_RANGE,
            f"input {quoted(space.name)}: expected {space.low[element]:g} to {space.high[element]:g} "
            f"at flat index {index}, "
            f"got {array.flat[index]:g}",
        )


def _check_mode_options(request: ActRequest, num_components: int, count: int) -> None:
    if request.mode is not None and not 0 <= request.mode < num_components:
        raise PolicyError(Reason.BAD_OPTION, f"mode: expected 0 to {num_components - 1}, got {request.mode}")
    width = request.hysteresis_width
    if not 0 <= width < math.inf:
        raise PolicyError(Reason.BAD_OPTION, f"hysteresis width: expected a finite number of 0 or more, got {width:g}")
    previous = request.previous_mode
    if previous is None:
        if width:
            raise PolicyError(Reason.BAD_OPTION, "hysteresis: expected a previous mode beside its width, got none")
        return
    if request.mode is not None:
        raise PolicyError(Reason.BAD_OPTION, "hysteresis: expected no forced mode beside it, got one")
    if previous.dtype != np.int32 or previous.shape != (count,):
        raise PolicyError(
            Reason.BAD_OPTION,
            f"previous mode: expected int32[{count}], got {previous.dtype}{list(previous.shape)}",
        )
    if (previous < -1).any() or (previous >= num_components).any():
        raise PolicyError(Reason.BAD_OPTION, f"previous mode: expected -1 to {num_components - 1} in every row")


def _kept_modes(rows: Rows, previous: Array, width: float, manifest: Manifest) -> Array:
    """int32[B]: the previous mode where it is to be kept, else -1."""
    row = np.arange(len(previous))
    safe_previous = np.maximum(previous, 0)
    gain = rows["hyper_q"][row, rows["mode"]] - rows["hyper_q"][row, safe_previous]
    is_allowed = rows["mixing_weights"][row, safe_previous] >= manifest.min_mixing_weight
    is_kept = (previous >= 0) & (previous != rows["mode"]) & is_allowed & (gain <= width)
    kept: Array = np.where(is_kept, previous, -1).astype(np.int32)
    return kept


def _checked_action(policy: ServedPolicy, action: Array) -> tuple[Array, bool]:
    if not np.isfinite(action).all():
        row = int(np.argwhere(~np.isfinite(action))[0, 0])
        raise PolicyError(Reason.NON_FINITE_ACTION, f"row {row}: the policy's action is not finite")
    low, high = policy.action_bounds
    if (action >= low).all() and (action <= high).all():
        return action, False
    return np.clip(action, low, high), True


def _scores(manifest: Manifest, variant: str, rows: Rows) -> dict[str, Score]:
    scores = {}
    for name, warning in manifest.warnings.items():
        threshold = warning.thresholds.get(variant)
        if threshold is not None and name in rows:
            values = rows[name]
            scores[name] = Score(values=values, threshold=threshold, warns=~(values <= threshold))
    return scores


def _bounds(values: Sequence[float]) -> Array:
    return np.array(values, dtype=np.float32)


def _without_subnormals(array: Array) -> Array:
    """Zeros for subnormal numbers, with which a processor multiplies some hundred times slower.

    onnxruntime's own flush-to-zero works only on the thread that created the first session of the process.
    """
    subnormal = (np.abs(array) < _SMALLEST_NORMAL) & (array != 0)
    return np.where(subnormal, np.float32(0), array) if subnormal.any() else array


def _wrong(reason: Reason, name: str, expected: str, got: str) -> PolicyError:
    return PolicyError(reason, f"input {quoted(name)}: expected {expected}, got {got}")


def _listed(names: "Mapping[str, object] | Sequence[str]") -> str:
    return ", ".join(quoted(name) for name in list(names)[:_MOST_NAMES_LISTED])
