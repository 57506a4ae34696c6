"""A policy in its caller's own process: the checks, the batcher and the bytes of a server, without a socket.

The bundle is loaded into the process that asks: it is not proved in a process of its own first, and nothing stops a
graph that never ends, but that its callers stop waiting. A bundle that is not trusted belongs behind `lom-serve`.
"""

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeAlias, cast

import grpc

from lom_bundle import BundleError
from lom_server.batcher import MicroBatcher
from lom_server.config import ServerConfig
from lom_server.edges.authentication import Role
from lom_server.edges.listener import Call, Listener, StreamHandler, UnaryHandler
from lom_server.edges.policy_edge import PolicyEdge
from lom_server.errors import StartError
from lom_server.loading import load_policy
from lom_server.repository import open_repository
from lom_server.service import PolicyService, PolicyVersions, ServedPolicy
from lom_server.status import status_of

Answer: TypeAlias = tuple[grpc.StatusCode, str, bytes]

_CLIENT = "in-process"


def connect(bundle: str) -> "InProcessServer":
    """Serves the bundle in the folder `bundle`, as version 1 of the policy that it names. Blocks while it is loaded.

    Raises:
        ValueError: it cannot be served; one line that says why.
    """
    try:
        config = ServerConfig(models=Path(bundle))
        repository = open_repository(config.models)
        if not repository.is_single_bundle:
            raise StartError("BUNDLE_NOT_FOUND", f"expected one bundle, got a folder of others: {bundle!r}")
        ((name, versions),) = repository.scan().items()
        ((version, folder),) = versions.items()
        return InProcessServer(load_policy(name, version, folder, config).policy, config)
    except (BundleError, StartError) as error:
        raise ValueError(f"inproc: {error}") from None


class InProcessServer:
    """Answers the unary methods of `lom_api.v1.PolicyService` for one policy, on an event loop in a thread of its own.

    **Threads**: `call` and `close` may be called from any thread.
    """

    def __init__(self, policy: ServedPolicy, config: ServerConfig) -> None:
        self._batcher = MicroBatcher(max_batch_rows=config.max_batch_rows, max_queue_rows=config.max_queue_rows)
        service = PolicyService(batcher=self._batcher)
        service.publish(policy.name, PolicyVersions(versions={policy.version: policy}, default_version=policy.version))
        registry = _Registry()
        # The edge asks nothing else of a listener.
        PolicyEdge(service).register(cast(Listener, registry))
        self._handlers = registry.unary
        self._lock = threading.Lock()
        self._is_closed = False
        self._closing = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="lom-inproc", daemon=True)
        self._thread.start()

    def call(self, method: str, message: bytes, timeout_s: float) -> Future[Answer]:
        """Answers `message` with status, status message and reply; cancelling takes it back, closing cancels it."""
        deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
        with self._lock:
            if self._is_closed:
                refused: Future[Answer] = Future()
                refused.cancel()
                return refused
            call = Call(deadline_ns=deadline_ns, client=_CLIENT)
            return asyncio.run_coroutine_threadsafe(_answer(self._handlers[method], message, call), self._loop)

    def close(self) -> None:
        """Stops, once a run under way on the loop has ended; may be called twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # cancels at its end what is under way
            runner.run(self._closing.wait())
            self._batcher.close()


class _Registry:
    """Takes the handlers that a listener would be given."""

    def __init__(self) -> None:
        self.unary: dict[str, UnaryHandler] = {}

    def add_service(
        self, name: str, *, unary: Mapping[str, UnaryHandler], streams: Mapping[str, StreamHandler], role: Role
    ) -> None:
        self.unary.update(unary)


async def _answer(handler: UnaryHandler, message: bytes, call: Call) -> Answer:
    try:
        return grpc.StatusCode.OK, "", await handler(message, call)
    except Exception as error:
        status = status_of(error)
        return status.code, status.message, b""
