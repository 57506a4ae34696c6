"""One connection to one served policy."""

import itertools
import threading
import time
from typing import Self, TypeVar

import grpc
from google.protobuf.message import Message
from numpy.typing import ArrayLike

from lom_api.codec import pack_array
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2, policy_pb2_grpc
from lom_client.actions import Actions, read_reply
from lom_client.config import ClientConfig, grpc_target
from lom_client.errors import ClientClosed, DeadlineExceeded, InvalidRequest, error_from_status
from lom_client.observations import observation_rows
from lom_client.spec import PolicySpec, read_spec

MAX_DEADLINE_S = 3600.0

_Request = TypeVar("_Request", bound=Message)
_Reply = TypeVar("_Reply", bound=Message)


class PolicyClient:
    """Asks a policy server for actions: each call is answered, or fails with a `PolicyError`, before its deadline.

    The client agrees with the server on one contract (the policy's spaces), at its first call, and keeps to it for
    life: a policy with other spaces is refused with `ContractMismatch`, also after a restart of the server. It never
    repeats a call by itself. A lost connection is renewed in the background; until then calls fail at once.

    **Threads**: every method may be called from any thread, concurrently. Constructing does no I/O. `act` and
    `get_spec` block up to their deadline; `spec` and `close` do not block.
    """

    def __init__(self, target: str, *, policy: str | None = None, config: ClientConfig | None = None) -> None:
        """Prepares a connection; the first call opens it.

        Args:
            target: `grpc://HOST:PORT`.
            policy: name of the policy; None for the only one that the server has.
            config: how the connection behaves.

        Raises:
            ValueError: `target` is not of that form.
        """
        config = config or ClientConfig()
        self._channel = grpc.insecure_channel(grpc_target(target), options=config.channel_options())
        self._stub = policy_pb2_grpc.PolicyServiceStub(self._channel)
        self._policy = policy or ""
        self._spec: PolicySpec | None = None
        self._spec_lock = threading.Lock()
        self._sequences = itertools.count(1)
        self._closed = False

    @property
    def spec(self) -> PolicySpec | None:
        """The contract, or None before the first call that reached the server."""
        return self._spec

    def get_spec(self, *, deadline_s: float) -> PolicySpec:
        """The contract; asks the server only if no call did so before.

        Args:
            deadline_s: seconds from now, above 0 and at most 3600.

        Raises:
            ValueError: `deadline_s` is out of range.
            PolicyError: the server did not answer with a sound spec in time.
        """
        return self._get_spec(_over_at(deadline_s))

    def act(self, observations: ArrayLike, *, deadline_s: float, variant: str | None = None) -> Actions:
        """One action for each observation, finite and inside the action space.

        Args:
            observations: one row `[O]` or rows `[B, O]` in environment units; float64 is rounded to float32.
            deadline_s: seconds from now, above 0 and at most 3600, for everything: connecting, the contract (first
                call only) and the answer. An answer that comes later is dropped.
            variant: one of the spec's variants; None for the spec's default.

        Raises:
            ValueError: `deadline_s` is out of range; nothing was sent.
            InvalidRequest: the observations or the variant do not fit the contract; see `observation_rows`.
            PolicyError: any other failure, by class.
        """
        over_at = _over_at(deadline_s)
        spec = self._get_spec(over_at)
        chosen = spec.default_variant if variant is None else variant
        if chosen not in spec.variants:
            raise InvalidRequest(
                Reason.UNKNOWN_VARIANT, f"expected one of {', '.join(spec.variants)}, got {str(variant)[:64]!r}"
            )
        rows, leading = observation_rows(observations, spec)
        request = policy_pb2.ActRequest(
            policy=spec.policy,
            variant=chosen,
            inputs=[pack_array(rows, spec.observation.name)],
            sequence=next(self._sequences),
            contract_hash=spec.contract_hash,
        )
        sent_at = time.monotonic()
        reply = self._call(self._stub.Act, request, over_at)
        round_trip_s = time.monotonic() - sent_at
        return read_reply(reply, request, spec, leading, round_trip_s)

    def close(self) -> None:
        """Ends the connection and every call in flight, each with `ClientClosed`. May be called twice."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_spec(self, over_at: float) -> PolicySpec:
        if self._spec is not None:
            return self._spec
        request = policy_pb2.GetPolicySpecRequest(policy=self._policy)
        spec = read_spec(self._call(self._stub.GetPolicySpec, request, over_at))
        with self._spec_lock:
            # Two first calls may have asked at once; the contract is whichever came first, for both.
            self._spec = self._spec or spec
            return self._spec

    def _call(
        self, method: "grpc.UnaryUnaryMultiCallable[_Request, _Reply]", request: _Request, over_at: float
    ) -> _Reply:
        """One call, given up at `over_at` by our own clock: gRPC's blocking call returns milliseconds late."""
        remaining_s = over_at - time.monotonic()
        if remaining_s <= 0:
            raise _out_of_time()
        over = threading.Event()
        try:
            call = method.future(request, timeout=remaining_s)
        except ValueError:  # so says gRPC of a closed channel
            raise _client_closed() from None
        try:
            call.add_done_callback(lambda _: over.set())
            answered = over.wait(over_at - time.monotonic())
        finally:
            if not over.is_set():
                call.cancel()
        if not answered or time.monotonic() > over_at:
            raise _out_of_time()
        code = call.code()
        if code is grpc.StatusCode.OK:
            return call.result()
        if self._closed:
            raise _client_closed()
        raise error_from_status(code, call.details() or "")


def _over_at(deadline_s: float) -> float:
    # Written so that NaN fails as well.
    if not 0 < deadline_s <= MAX_DEADLINE_S:
        raise ValueError(f"deadline_s must be above 0 and at most {MAX_DEADLINE_S}, got {deadline_s}")
    return time.monotonic() + deadline_s


def _out_of_time() -> DeadlineExceeded:
    return DeadlineExceeded(Reason.DEADLINE_EXCEEDED, "no answer before the deadline")


def _client_closed() -> ClientClosed:
    return ClientClosed("CLIENT_CLOSED", "this client was closed")
