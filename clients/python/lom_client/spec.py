"""What a served policy takes and gives, as checked on arrival."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lom_api.v1 import policy_pb2
from lom_client.errors import BadReply, ContractMismatch

GREEDY_MODE = "greedy_mode"

_MAX_NAME_CHARS = 64


@dataclass(frozen=True, eq=False)
class Space:
    """An array of numbers in environment units.

    **Shapes**: `shape` of one row, without the batch axis; `low`, `high` float32[width], flattened, ±inf where
    unbounded.
    """

    name: str
    shape: tuple[int, ...]
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
    inputs: tuple[Space, ...]
    action: Space
    variants: tuple[str, ...]
    default_variant: str
    bundle_digest: str
    contract_hash: str
    num_components: int
    max_batch_rows: int
    execution_provider: str

    @property
    def observation(self) -> Space:
        """The only input.

        Raises:
            ContractMismatch: SEVERAL_INPUTS, there is no such thing as the observation.
        """
        if len(self.inputs) != 1:
            names = ", ".join(space.name for space in self.inputs)
            raise ContractMismatch("SEVERAL_INPUTS", f"expected a policy with one input, got one with {names}")
        return self.inputs[0]


def read_spec(message: policy_pb2.PolicySpec) -> PolicySpec:
    """Message to checked spec.

    Raises:
        BadReply: BAD_SPEC, the spec contradicts itself, or describes spaces that this client cannot speak
            (it knows float32 arrays as inputs and one float32 vector as action).
    """
    names = [space.name for space in message.inputs]
    if not names or len(set(names)) != len(names):
        raise _bad_spec("expected one input or more, each name once")
    for field in ("policy", "bundle_digest", "contract_hash"):
        if not getattr(message, field):
            raise _bad_spec(f"{field} is empty")
    # They appear in messages and reports of this client.
    if not all(map(_is_name, (message.policy, *names, *message.variants))):
        raise _bad_spec(f"expected printable names of 1 to {_MAX_NAME_CHARS} characters")
    if message.max_batch_rows < 1:
        raise _bad_spec("max_batch_rows is 0")
    if message.default_variant not in message.variants:
        raise _bad_spec("default_variant is not among the variants")
    if GREEDY_MODE in message.variants and message.num_components < 1:
        raise _bad_spec(f"{GREEDY_MODE} without components")
    action = _read_space(message.action, "action")
    if len(action.shape) != 1:
        raise _bad_spec(f"action: expected one dimension, got {len(action.shape)}")
    return PolicySpec(
        policy=message.policy,
        version=message.version,
        inputs=tuple(_read_space(space, "input") for space in message.inputs),
        action=action,
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
    shape = tuple(message.shape)
    if not shape or min(shape) < 1:
        raise _bad_spec(f"{role}: expected dimensions of 1 or more, got {list(shape)[:8]}")
    width = math.prod(shape)
    if len(message.low) != width or len(message.high) != width:
        raise _bad_spec(f"{role}: expected {width} bounds, got {len(message.low)} low and {len(message.high)} high")
    low = np.array(message.low, dtype=np.float32)
    high = np.array(message.high, dtype=np.float32)
    # NaN fails this comparison too.
    if not (low <= high).all():
        raise _bad_spec(f"{role}: a lower bound is not below its upper bound")
    low.setflags(write=False)
    high.setflags(write=False)
    return Space(name=message.name, shape=shape, low=low, high=high)


def _is_name(text: str) -> bool:
    return 1 <= len(text) <= _MAX_NAME_CHARS and text.isprintable()


def _bad_spec(detail: str) -> BadReply:
    return BadReply("BAD_SPEC", detail)
