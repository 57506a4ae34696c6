"""One connection to one served policy."""

import itertools
import time
from concurrent.futures import CancelledError, Future
from typing import Self, TypeVar

from numpy.typing import ArrayLike

from lom_api.v1 import policy_pb2
from lom_client.actions import Actions, read_reply
from lom_client.config import ClientConfig
from lom_client.errors import PolicyError, client_closed
from lom_client.exchange import PolicyExchange, deadline_at, out_of_time, remaining_s
from lom_client.observations import Observations
from lom_client.options import ActOptions
from lom_client.spec import PolicySpec
from lom_client.transport import connect, reply_of

_Outcome = TypeVar("_Outcome")


class PolicyClient:
    """Asks a policy server for actions: each call is answered, or fails with a `PolicyError`, before its deadline.

    The client agrees with the server on one contract (the policy's spaces), at its first call, and keeps to it for
    life: a policy with other spaces is refused with `ContractMismatch`, also after a restart of the server. It never
    repeats a call by itself. A lost connection is renewed in the background; until then calls fail at once.

    **Threads**: every method may be called from any thread, concurrently. Constructing connects to nothing. `act` and
    `get_spec` block up to their deadline; `spec` and `close` do not block.
    """

    def __init__(
        self,
        target: str,
        *,
        policy: str | None = None,
        version: int | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        """Prepares a connection; the first call opens it.

        Args:
            target: `grpc://HOST:PORT`, `grpcs://HOST:PORT` for TLS, `unix:/PATH` of a socket, or `inproc:BUNDLE` for
                a policy in this process, which needs the server's package and is loaded now.
            policy: name of the policy; None for the only one that the server has.
            version: the one version to be acted by; None for whichever the server prefers at the time of each call.
            config: how the connection behaves.

        Raises:
            ValueError: `target` is not of that form or does not go with `config`, a file of `config` is not usable,
                `version` is out of range, or the bundle cannot be served.
        """
        self._exchange = PolicyExchange(policy, version)
        self._connection = connect(target, config or ClientConfig())
        self._sequences = itertools.count(1)
        self._is_closed = False

    @property
    def spec(self) -> PolicySpec | None:
        """The contract, or None before the first call that reached the server."""
        return self._exchange.spec

    def get_spec(self, *, deadline_s: float) -> PolicySpec:
        """The contract; asks the server only if no call did so before.

        Args:
            deadline_s: seconds from now, above 0 and at most 3600.

        Raises:
            ValueError: `deadline_s` is out of range.
            PolicyError: the server did not answer with a sound spec in time.
        """
        return self._get_spec(deadline_at(deadline_s))

    def act(
        self,
        observations: Observations,
        *,
        deadline_s: float,
        variant: str | None = None,
        explain: bool = False,
        mode: int | None = None,
        sampling_seed: int | None = None,
        previous_mode: ArrayLike | None = None,
        hysteresis_width: float = 0.0,
        batch_priority: bool = False,
    ) -> Actions:
        """One action for each observation, finite and inside the action space.

        The options from `explain` to `hysteresis_width` belong to variants that choose a mode: `greedy_mode`, and a
        residual `actor`. The server refuses them for others.

        Args:
            observations: one row or rows `[B, ...]` in environment units, of the policy's only input or by the names of
                its inputs; float64 is rounded to float32.
            deadline_s: seconds from now, above 0 and at most 3600, for everything: connecting, the contract (first
                call only) and the answer. An answer that comes later is dropped.
            variant: one of the spec's variants; None for the spec's default.
            explain: also answer what every component would have meant.
            mode: act by this component, whether the data supports it here or not.
            sampling_seed: sample from the chosen component (a residual actor: around its own action); the same seed
                and observations give the same actions.
            previous_mode: one mode for each row, -1 for none, which is kept unless another one's hyper-Q is more than
                `hysteresis_width` higher.
            hysteresis_width: hyper-Q units, 0 or more.
            batch_priority: nobody waits for this answer: it comes after everyone else's, and is refused first.

        Raises:
            ValueError: `deadline_s` is out of range; nothing was sent.
            InvalidRequest: the observations or the options do not fit the contract; see `observation_rows`.
            PolicyError: any other failure, by class.
        """
        over_at = deadline_at(deadline_s)
        spec = self._get_spec(over_at)
        options = ActOptions(
            variant=variant,
            explain=explain,
            mode=mode,
            sampling_seed=sampling_seed,
            previous_mode=previous_mode,
            hysteresis_width=hysteresis_width,
            batch_priority=batch_priority,
        )
        question = self._exchange.question(spec, observations, options)
        sent_at = time.monotonic()
        reply = self._ask(question.request, over_at)
        return read_reply(reply, question.request, spec, question.leading, time.monotonic() - sent_at)

    def close(self) -> None:
        """Ends the connection and every call in flight, each with `ClientClosed`. May be called twice."""
        self._is_closed = True
        self._connection.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_spec(self, over_at: float) -> PolicySpec:
        if self._exchange.spec is not None:
            return self._exchange.spec
        message = self._exchange.spec_request().SerializeToString()
        asked = self._connection.transport.call("GetPolicySpec", message, remaining_s(over_at))
        return self._exchange.agree(reply_of(self._outcome(asked, over_at), policy_pb2.PolicySpec))

    def _ask(self, request: policy_pb2.ActRequest, over_at: float) -> policy_pb2.ActReply:
        if self._connection.stream is not None:
            return self._outcome(self._connection.stream.act(request, over_at), over_at)
        request.sequence = next(self._sequences)
        asked = self._connection.transport.call("Act", request.SerializeToString(), remaining_s(over_at))
        return reply_of(self._outcome(asked, over_at), policy_pb2.ActReply)

    def _outcome(self, asked: Future[_Outcome], over_at: float) -> _Outcome:
        """What `asked` brings until `over_at` by our own clock: gRPC's blocking call returns milliseconds late."""
        try:
            outcome = asked.result(over_at - time.monotonic())
        except TimeoutError:
            raise out_of_time() from None
        except (PolicyError, CancelledError):
            if not self._is_closed:
                raise
        finally:
            asked.cancel()
        if self._is_closed:
            raise client_closed()
        if time.monotonic() > over_at:
            raise out_of_time()
        return outcome
