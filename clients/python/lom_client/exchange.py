"""What is asked of a policy, and until when: the part of a call that needs no connection, the same for every client."""

import threading
import time
from dataclasses import dataclass

from lom_api.codec import pack_array
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_client.errors import BadReply, DeadlineExceeded
from lom_client.observations import Observations, observation_rows
from lom_client.options import ActOptions
from lom_client.spec import PolicySpec, read_spec

MAX_DEADLINE_S = 3600.0
LARGEST_VERSION = 2**31 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A request that fits the contract, and the axes before the last ones in the caller's observations."""

    request: policy_pb2.ActRequest
    leading: tuple[int, ...]


class PolicyExchange:
    """One policy's contract, as agreed on at the first call, and the requests that fit it.

    **Threads**: every method may be called from any thread; none does I/O.
    """

    def __init__(self, policy: str | None, version: int | None) -> None:
        """`version` None leaves the choice to the server. Raises ValueError where it is out of range."""
        if version is not None and not 1 <= version <= LARGEST_VERSION:
            raise ValueError(f"version must be between 1 and {LARGEST_VERSION}, got {version}")
        self._policy = policy or ""
        self._version = version or 0
        self._spec: PolicySpec | None = None
        self._spec_lock = threading.Lock()

    @property
    def spec(self) -> PolicySpec | None:
        """The contract, or None before it was agreed on."""
        return self._spec

    def spec_request(self) -> policy_pb2.GetPolicySpecRequest:
        """Asks for the contract."""
        return policy_pb2.GetPolicySpecRequest(policy=self._policy, version=self._version)

    def agree(self, message: policy_pb2.PolicySpec) -> PolicySpec:
        """The contract from now on: that of `message`, unless there is one already.

        Raises:
            BadReply: BAD_SPEC; WRONG_POLICY or WRONG_VERSION, it is not of what was asked for.
        """
        spec = read_spec(message)
        if self._policy and spec.policy != self._policy:
            raise BadReply("WRONG_POLICY", "the spec is of another policy than the one asked for")
        if self._version and spec.version != self._version:
            raise BadReply("WRONG_VERSION", f"expected {self._version}, got {spec.version}")
        with self._spec_lock:
            # Two first calls may have asked at once; the contract is whichever came first, for both.
            self._spec = self._spec or spec
            return self._spec

    def question(self, spec: PolicySpec, observations: Observations, options: ActOptions) -> Question:
        """What is to be sent; its sequence number is the transport's to give.

        Raises:
            InvalidRequest: the observations or the options do not fit the contract.
        """
        rows, leading = observation_rows(observations, spec)
        request = policy_pb2.ActRequest(
            policy=spec.policy,
            version=self._version,
            inputs=[pack_array(array, name) for name, array in rows.items()],
            contract_hash=spec.contract_hash,
        )
        options.write_into(request, spec, leading)
        return Question(request=request, leading=leading)


def deadline_at(deadline_s: float) -> float:
    """The monotonic instant `deadline_s` from now.

    Raises:
        ValueError: it is out of range.
    """
    # Written so that NaN fails as well.
    if not 0 < deadline_s <= MAX_DEADLINE_S:
        raise ValueError(f"deadline_s must be above 0 and at most {MAX_DEADLINE_S}, got {deadline_s}")
    return time.monotonic() + deadline_s


def remaining_s(over_at: float) -> float:
    """Seconds until `over_at`.

    Raises:
        DeadlineExceeded: there are none.
    """
    remaining = over_at - time.monotonic()
    if remaining <= 0:
        raise out_of_time()
    return remaining


def out_of_time() -> DeadlineExceeded:
    """The deadline has passed on this side."""
    return DeadlineExceeded(Reason.DEADLINE_EXCEEDED, "no answer before the deadline")
