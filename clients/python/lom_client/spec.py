"""What a served policy takes and gives, as checked on arrival."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lom_api.v1 import policy_pb2
from lom_client.errors import BadReply

GREEDY_MODE = "greedy_mode"


@dataclass(frozen=True, eq=False)
class Space:
    """A vector of numbers in environment units. **Shapes**: `low`, `high` float32[width]; ±inf where unbounded."""

    name: str
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @property
    def width(self) -> int:
        """Numbers in one row."""
        return len(self.low)


@dataclass(frozen=True, eq=False)
class PolicySpec:
    """The contract of one served policy; `contract_hash` stands for its spaces on every call."""

    policy: str
    version: int
    observation: Space
    action: Space
    variants: tuple[str, ...]
    default_variant: str
    bundle_digest: str
    contract_hash: str
    num_components: int
    max_batch_rows: int
    execution_provider: str


def read_spec(message: policy_pb2.PolicySpec) -> PolicySpec:
    """Message to checked spec.

    Raises:
        BadReply: BAD_SPEC, the spec contradicts itself, or describes spaces that this client cannot speak
            (it knows one observation vector and one action vector, both float32).
    """
    if len(message.inputs) != 1:
        raise _bad_spec(f"expected exactly one input, got {len(message.inputs)}")
    for field in ("policy", "bundle_digest", "contract_hash"):
        if not getattr(message, field):
            raise _bad_spec(f"{field} is empty")
    if message.max_batch_rows < 1:
        raise _bad_spec("max_batch_rows is 0")
    if message.default_variant not in message.variants:
        raise _bad_spec("default_variant is not among the variants")
    if GREEDY_MODE in message.variants and message.num_components < 1:
        raise _bad_spec(f"{GREEDY_MODE} without components")
    return PolicySpec(
        policy=message.policy,
        version=message.version,
        observation=_read_space(message.inputs[0], "input"),
        action=_read_space(message.action, "action"),
        variants=tuple(message.variants),
        default_variant=message.default_variant,
        bundle_digest=message.bundle_digest,
        contract_hash=message.contract_hash,
        num_components=message.num_components,
        max_batch_rows=message.max_batch_rows,
        execution_provider=message.execution_provider,
    )


def _read_space(message: policy_pb2.Space, role: str) -> Space:
    if message.dtype != policy_pb2.DATA_TYPE_FLOAT32:
        raise _bad_spec(f"{role}: expected float32 (1), got {int(message.dtype)}")
    if len(message.shape) != 1 or message.shape[0] < 1:
        raise _bad_spec(f"{role}: expected one dimension of 1 or more, got {list(message.shape)[:8]}")
    width = message.shape[0]
    if len(message.low) != width or len(message.high) != width:
        raise _bad_spec(f"{role}: expected {width} bounds, got {len(message.low)} low and {len(message.high)} high")
    low = np.array(message.low, dtype=np.float32)
    high = np.array(message.high, dtype=np.float32)
    # NaN fails this comparison too.
    if not (low <= high).all():
        raise _bad_spec(f"{role}: a lower bound is not below its upper bound")
    low.setflags(write=False)
    high.setflags(write=False)
    return Space(name=message.name, low=low, high=high)


def _bad_spec(detail: str) -> BadReply:
    return BadReply("BAD_SPEC", detail)
