"""`AsyncPolicyClient` with the face of `PolicyClient`, so that one test can speak for both."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

from lom_client import Actions, AsyncPolicyClient, ClientConfig, PolicySpec

_Result = TypeVar("_Result")


class BlockingClient:
    """Lives on an event loop in a thread of its own, until it is closed for good."""

    def __init__(
        self, target: str, *, policy: str | None = None, version: int | None = None, config: ClientConfig | None = None
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

        async def make() -> AsyncPolicyClient:
            return AsyncPolicyClient(target, policy=policy, version=version, config=config)

        try:
            self._client = self._run(make())
        except BaseException:
            self._end_loop()
            raise

    @property
    def spec(self) -> PolicySpec | None:
        return self._client.spec

    def get_spec(self, *, deadline_s: float) -> PolicySpec:
        return self._run(self._client.get_spec(deadline_s=deadline_s))

    def act(self, observations: Any, *, deadline_s: float, **options: Any) -> Actions:
        return self._run(self._client.act(observations, deadline_s=deadline_s, **options))

    def close(self) -> None:
        self._run(self._client.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._end_loop()

    def _run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
