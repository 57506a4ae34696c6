"""`PolicyClient` for programs that live on an event loop."""

import asyncio
import itertools
import time
from collections.abc import Awaitable
from typing import Self, TypeVar

import grpc
from numpy.typing import ArrayLike

from lom_api.v1 import policy_pb2
from lom_client.actions import Actions, read_reply
from lom_client.async_transport import connect_async
from lom_client.config import ClientConfig
from lom_client.errors import PolicyError, client_closed
from lom_client.exchange import PolicyExchange, deadline_at, out_of_time, remaining_s
from lom_client.observations import Observations
from lom_client.options import ActOptions
from lom_client.spec import PolicySpec
from lom_client.transport import reply_of

_Outcome = TypeVar("_Outcome")


class AsyncPolicyClient:
    """As `PolicyClient`: the same promises, options, checks and failures.

    **Threads**: belongs to the event loop that runs when it is made. Any number of calls may be under way. Making one
    for `inproc:BUNDLE` blocks the loop while the bundle is loaded.
    """

    def __init__(
        self,
        target: str,
        *,
        policy: str | None = None,
        version: int | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        """As `PolicyClient`.

        Raises:
            RuntimeError: no event loop is running.
            ValueError: as `PolicyClient`.
        """
        asyncio.get_running_loop()  # gRPC would bind itself to another one in silence
        self._exchange = PolicyExchange(policy, version)
        self._connection = connect_async(target, config or ClientConfig())
        self._sequences = itertools.count(1)
        self._is_closed = False

    @property
    def spec(self) -> PolicySpec | None:
        """As `PolicyClient.spec`."""
        return self._exchange.spec

    async def get_spec(self, *, deadline_s: float) -> PolicySpec:
        """As `PolicyClient.get_spec`."""
        return await self._get_spec(deadline_at(deadline_s))

    async def act(
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
        """As `PolicyClient.act`; cancelling it takes the call back."""
        over_at = deadline_at(deadline_s)
        spec = await self._get_spec(over_at)
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
        reply = await self._ask(question.request, over_at)
        return read_reply(reply, question.request, spec, question.leading, time.monotonic() - sent_at)

    async def close(self) -> None:
        """As `PolicyClient.close`."""
        self._is_closed = True
        await self._connection.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _get_spec(self, over_at: float) -> PolicySpec:
        if self._exchange.spec is not None:
            return self._exchange.spec
        message = self._exchange.spec_request().SerializeToString()
        asked = self._connection.transport.call("GetPolicySpec", message, remaining_s(over_at))
        return self._exchange.agree(reply_of(await self._outcome(asked, over_at), policy_pb2.PolicySpec))

    async def _ask(self, request: policy_pb2.ActRequest, over_at: float) -> policy_pb2.ActReply:
        if self._connection.stream is not None:
            return await self._outcome(self._connection.stream.act(request, over_at), over_at)
        request.sequence = next(self._sequences)
        asked = self._connection.transport.call("Act", request.SerializeToString(), remaining_s(over_at))
        return reply_of(await self._outcome(asked, over_at), policy_pb2.ActReply)

    async def _outcome(self, asked: Awaitable[_Outcome], over_at: float) -> _Outcome:
        try:
            async with asyncio.timeout(over_at - time.monotonic()):
                outcome = await asked
        except TimeoutError:
            raise out_of_time() from None
        except (PolicyError, grpc.aio.UsageError, asyncio.CancelledError):
            task = asyncio.current_task()
            # Closing cancels what is under way; but who is cancelled himself has to stop.
            if not self._is_closed or (task is not None and task.cancelling()):
                raise
        if self._is_closed:
            raise client_closed()
        if time.monotonic() > over_at:
            raise out_of_time()
        return outcome
