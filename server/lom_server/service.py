"""What the server promises, without a transport: find the policy, check the rows, have them answered.

Works on dataclasses and numpy arrays, so that every edge, and a caller in the same process, meets the same checks.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lom_api.reasons import Reason
from lom_bundle import Manifest
from lom_server.batcher import Array, Lane, MicroBatcher, Rows
from lom_server.errors import PolicyError, quoted

SERVED_VERSION = 1
_LARGEST_VERSION = 2**31 - 1
_POLICY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MOST_NAMES_LISTED = 8
_SMALLEST_NORMAL = np.finfo(np.float32).tiny


@dataclass(frozen=True, kw_only=True, slots=True)
class ActRequest:
    """One caller's rows.

    Attributes:
        policy: which policy is asked.
        inputs: (name, float32[B, ...]) pairs, raw environment units.
        version: 0 lets the server choose.
        variant: empty asks for the policy's default.
        contract_hash: refused where it is given and differs from the policy's.
    """

    policy: str
    inputs: Sequence[tuple[str, Array]]
    version: int = 0
    variant: str = ""
    contract_hash: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A number per row, float32[B], and the threshold above which (or at NaN) it is worth a warning."""

    values: Array
    threshold: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ActReply:
    """One caller's answers.

    Attributes:
        action: float32[B, A], environment units, finite.
        mode: int32[B], the chosen component; None where the variant has none.
        margin: float32[B], best minus second-best hyper-Q; None where the variant has none.
        scores: by name, what the bundle can warn by.
        queue_ns, inference_ns, batch_rows: as `Answer`.
    """

    action: Array
    mode: Array | None
    margin: Array | None
    scores: Mapping[str, Score]
    policy: str
    version: int
    variant: str
    bundle_digest: str
    queue_ns: int
    inference_ns: int
    batch_rows: int


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """A policy that passed its self-check.

    Attributes:
        lanes: where the batcher takes each variant's rows.
        provider: the execution provider that answers.
    """

    manifest: Manifest
    bundle_digest: str
    lanes: Mapping[str, Lane]
    provider: str
    max_batch_rows: int
    version: int = SERVED_VERSION

    @cached_property
    def contract_hash(self) -> str:
        """The manifest's, computed once."""
        return self.manifest.contract_hash


class PolicyService:
    """Answers for the policies that were published to it.

    Threads: belongs to the batcher's event loop.
    """

    def __init__(self, batcher: MicroBatcher) -> None:
        self._batcher = batcher
        self._policies: dict[str, ServedPolicy] = {}
        self._is_draining = False

    def publish(self, policy: ServedPolicy) -> None:
        """Serves `policy` under its manifest's name from now on."""
        self._policies[policy.manifest.policy] = policy

    def drain(self) -> None:
        """Refuses every later request with DRAINING; those already accepted are finished."""
        self._is_draining = True

    async def act(self, request: ActRequest, deadline_ns: int) -> ActReply:
        """Answers one action for every row, before `deadline_ns` of the batcher's clock.

        Raises:
            PolicyError: with the reason; nothing ran for a request that contradicts the policy's contract.
        """
        if not request.policy:
            raise PolicyError(Reason.MISSING_MODEL, "policy: expected a name, got none")
        policy = self._find(request.policy)
        variant = _checked_identity(policy, request)
        rows = _checked_rows(policy, request.inputs)
        answer = await self._batcher.submit(policy.lanes[variant], rows, deadline_ns)
        action = answer.rows["action"]
        if not np.isfinite(action).all():
            row = int(np.argwhere(~np.isfinite(action))[0, 0])
            raise PolicyError(Reason.NON_FINITE_ACTION, f"row {row}: the policy's action is not finite")
        return ActReply(
            action=action,
            mode=answer.rows.get("mode"),
            margin=answer.rows.get("margin"),
            scores={
                name: Score(values=answer.rows[name], threshold=warning.thresholds[variant])
                for name, warning in policy.manifest.warnings.items()
                if name in answer.rows and variant in warning.thresholds
            },
            policy=policy.manifest.policy,
            version=policy.version,
            variant=variant,
            bundle_digest=policy.bundle_digest,
            queue_ns=answer.queue_ns,
            inference_ns=answer.inference_ns,
            batch_rows=answer.batch_rows,
        )

    def spec(self, policy: str) -> ServedPolicy:
        """The policy of that name; the only one where the name is empty.

        Raises:
            PolicyError: as `act`; MISSING_MODEL where the name is empty and there are several.
        """
        if not policy and len(self._policies) == 1:
            policy = next(iter(self._policies))
        if not policy and self._policies:
            raise PolicyError(
                Reason.MISSING_MODEL, f"policy: expected the name of one of {len(self._policies)}, got none"
            )
        return self._find(policy)

    def _find(self, name: str) -> ServedPolicy:
        if self._is_draining:
            raise PolicyError(Reason.DRAINING, "the server is stopping and takes no new requests")
        policy = self._policies.get(name)
        if policy is not None:
            return policy
        if name and not _POLICY_NAME.fullmatch(name):
            raise PolicyError(Reason.BAD_MODEL_NAME, f"policy: expected {_POLICY_NAME.pattern}, got {quoted(name)}")
        if not self._policies:
            raise PolicyError(Reason.MODEL_LOADING, "the policy is still being checked")
        raise PolicyError(Reason.MODEL_NOT_FOUND, f"policy {quoted(name)} is not served here")


def _checked_identity(policy: ServedPolicy, request: ActRequest) -> str:
    """The variant to run, once version and contract are the ones that the caller means."""
    if request.version and request.version != policy.version:
        if not 0 < request.version <= _LARGEST_VERSION:
            raise PolicyError(Reason.BAD_VERSION, f"version: expected 0 to {_LARGEST_VERSION}, got {request.version}")
        raise PolicyError(Reason.VERSION_NOT_FOUND, f"version: expected {policy.version}, got {request.version}")
    if request.contract_hash and request.contract_hash != policy.contract_hash:
        raise PolicyError(
            Reason.CONTRACT_MISMATCH,
            f"contract_hash: expected {policy.contract_hash[:12]}, got {quoted(request.contract_hash[:12])}",
        )
    variant = request.variant or policy.manifest.default_variant
    if variant not in policy.lanes:
        raise PolicyError(
            Reason.UNKNOWN_VARIANT, f"variant: expected one of {_listed(policy.lanes)}, got {quoted(variant)}"
        )
    return variant


def _checked_rows(policy: ServedPolicy, inputs: Sequence[tuple[str, Array]]) -> Rows:
    """The inputs by name, once they are exactly what the bundle's spaces ask for."""
    spaces = policy.manifest.inputs
    rows = dict(inputs)
    if len(rows) != len(inputs):
        names = [name for name, _ in inputs]
        twice = next(name for name in names if names.count(name) > 1)
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
        rows[space.name] = _without_subnormals(array)
    return rows


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
