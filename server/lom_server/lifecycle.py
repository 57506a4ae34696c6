"""From a configuration to a serving server, and back to nothing without losing an accepted request."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lom_bundle import Bundle, Manifest, read_bundle
from lom_bundle.signature import load_trusted_key
from lom_server.batcher import Lane, MicroBatcher, rows_worth_inlining
from lom_server.config import ServerConfig
from lom_server.edges.grpc_edge import MESSAGE_CEILING_BYTES, MESSAGE_OVERHEAD_BYTES, GrpcEdge
from lom_server.engine import OnnxEngine
from lom_server.service import PolicyService, ServedPolicy

_logger = logging.getLogger(__name__)

# What every answer carries where the variant has it; diagnostics are not fetched for it.
_ANSWERED_OUTPUTS = ("action", "mode", "margin", "state_score", "action_score")


class RunningServer:
    """A server that is SERVING.

    Attributes:
        address: HOST:PORT, with the port that the system gave.
        policy: what is served there.
    """

    def __init__(
        self, *, address: str, policy: ServedPolicy, edge: GrpcEdge, engine: OnnxEngine, grace_s: float
    ) -> None:
        self.address = address
        self.policy = policy
        self._edge = edge
        self._engine = engine
        self._grace_s = grace_s
        self._stopped: asyncio.Task[bool] | None = None

    async def stop(self) -> bool:
        """Drains: NOT_SERVING, no new requests, accepted ones finish, closed. Any number of calls drain once.

        Returns:
            Whether every accepted request was answered within `grace_s`.
        """
        if self._stopped is None:
            self._stopped = asyncio.ensure_future(self._drain())
        return await asyncio.shield(self._stopped)

    async def _drain(self) -> bool:
        was_clean = await self._edge.drain(self._grace_s)
        if not was_clean:
            _logger.warning("requests were cancelled: not answered within %g s", self._grace_s)
            self._engine.abort()  # or the engine thread would keep the process alive
        return was_clean


@asynccontextmanager
async def serve(config: ServerConfig) -> AsyncIterator[RunningServer]:
    """Serves `config.bundle` inside the `async with` block, drains at its end.

    Listens before the graphs are loaded (a taken port is known at once, health says NOT_SERVING meanwhile) and
    becomes SERVING only when every variant has reproduced its golden rows on the provider that will answer.

    Raises:
        BundleError: the bundle is not intact or not trusted, or its graphs do not reproduce its golden rows.
        StartError: the address or the execution provider is not to be had.
    """
    bundle = await asyncio.to_thread(_read, config)
    row_bytes = _row_bytes(bundle.manifest)
    max_batch_rows = max(1, min(config.max_batch_rows, (MESSAGE_CEILING_BYTES - MESSAGE_OVERHEAD_BYTES) // row_bytes))
    batcher = MicroBatcher(max_batch_rows=max_batch_rows, max_queue_rows=config.max_queue_rows)
    service = PolicyService(batcher)
    edge = GrpcEdge(
        service,
        max_message_bytes=max_batch_rows * row_bytes + MESSAGE_OVERHEAD_BYTES,
        default_deadline_s=config.default_deadline_s,
        max_deadline_s=config.max_deadline_s,
    )
    address = await edge.listen(*config.host_and_port)
    _logger.info("listening on %s, not serving before the policy has proved itself", address)
    try:
        engine, policy = await asyncio.to_thread(_load, bundle, config, max_batch_rows)
    except BaseException:
        await edge.drain(0)
        raise
    service.publish(policy)
    await edge.announce(bundle.manifest.policy)
    server = RunningServer(address=address, policy=policy, edge=edge, engine=engine, grace_s=config.grace_s)
    try:
        yield server
    finally:
        await server.stop()
        batcher.close()


def _read(config: ServerConfig) -> Bundle:
    """Blocks."""
    return read_bundle(config.bundle, trusted_keys=[load_trusted_key(path) for path in config.trusted_keys])


def _load(bundle: Bundle, config: ServerConfig, max_batch_rows: int) -> tuple[OnnxEngine, ServedPolicy]:
    """Sessions, proof, warm-up, in that order. Blocks."""
    engine = OnnxEngine(
        bundle,
        provider=config.provider,
        intra_op_threads=config.intra_op_threads,
        allow_spinning=config.allow_spinning,
    )
    engine.self_check()
    policy = ServedPolicy(
        manifest=bundle.manifest,
        bundle_digest=bundle.digest,
        lanes={variant: _lane(engine, bundle.manifest, variant, config, max_batch_rows) for variant in bundle.graphs},
        provider=engine.provider,
        max_batch_rows=max_batch_rows,
    )
    return engine, policy


def _lane(engine: OnnxEngine, manifest: Manifest, variant: str, config: ServerConfig, max_batch_rows: int) -> Lane:
    outputs = tuple(name for name in _ANSWERED_OUTPUTS if name in manifest.variants[variant].outputs)
    measured_rows = rows_worth_inlining(lambda rows: engine.measured_run_ns(variant, outputs, rows), max_batch_rows)
    inline_rows = {"auto": measured_rows, "inline": max_batch_rows, "thread": 0}[config.inference]
    return Lane(engine=engine, variant=variant, outputs=outputs, inline_rows=inline_rows)


def _row_bytes(manifest: Manifest) -> int:
    return sum(4 * len(space.low) for space in manifest.inputs)
