"""A whole server: the supervisor, its admin listener and its metrics."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from lom_server.config import ServerConfig
from lom_server.edges.admin_edge import AdminEdge
from lom_server.edges.authentication import Authenticator, server_credentials
from lom_server.edges.listener import Listener, ListenerLimits
from lom_server.metrics import MetricsServer, serve_metrics
from lom_server.recording import make_datasets, require_recording
from lom_server.supervisor import Supervisor

_LONGEST_OPERATION_S = 3600.0


class RunningServer:
    """A server that is SERVING.

    Attributes:
        supervisor: what is served, and the operations on it.
        admin_address, metrics_address: where, with the port that the system gave; empty where there is none.
    """

    def __init__(self, supervisor: Supervisor, config: ServerConfig) -> None:
        self.supervisor = supervisor
        self.admin_address = ""
        self.metrics_address = ""
        self._config = config
        # Checked here even where only workers need them: what is wrong with them is said once, and nothing starts.
        self._authenticator = None if config.tokens is None else Authenticator(config.tokens)
        self._credentials = server_credentials(config)
        self._admin: Listener | None = None
        self._metrics: MetricsServer | None = None
        self._stopped: asyncio.Task[bool] | None = None
        self._finishing: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Where robots ask."""
        return self.supervisor.address

    async def reload_tokens(self) -> None:
        """Reads the file of tokens again, here and in every worker."""
        if self._authenticator is not None:
            self._authenticator.reload()
        await self.supervisor.reload_tokens()

    async def stop(self) -> bool:
        """Drains: NOT_SERVING, no new requests, accepted ones finish, closed. Any number of calls drain once.

        Returns:
            Whether every accepted request was answered within the grace time.
        """
        if self._stopped is None:
            self._stopped = asyncio.ensure_future(self._stop())
        return await asyncio.shield(self._stopped)

    async def start(self) -> None:
        """Opens the metrics, serves, then opens the admin listener: nothing is changed before it is there."""
        config = self._config
        if config.record is not None:
            require_recording(config.record)
            # Beside the start: what an earlier server left may take a while.
            self._finishing = asyncio.create_task(make_datasets(config.record, _LONGEST_OPERATION_S))
        if config.metrics_listen:
            self._metrics = serve_metrics(config.metrics_listen, self.supervisor.pool.totals.total)
            self.metrics_address = self._metrics.address
        await self.supervisor.start()
        if config.admin_listen:
            # A load takes as long as its proof, and the caller has hung up when it does not care any more.
            limits = replace(
                ListenerLimits.of(config),
                default_deadline_s=_LONGEST_OPERATION_S,
                max_deadline_s=_LONGEST_OPERATION_S,
            )
            self._admin = Listener(limits, authenticator=self._authenticator, credentials=self._credentials)
            AdminEdge(self.supervisor).register(self._admin)
            self.admin_address = await self._admin.listen(config.admin_listen)
            await self._admin.set_serving("", True)

    async def _stop(self) -> bool:
        if self._admin is not None:
            await self._admin.drain(0)
        was_clean = await self.supervisor.stop()
        if self._config.record is not None and self._finishing is not None:
            self._finishing.cancel()  # what it has not finished, the next one does
            await asyncio.gather(self._finishing, return_exceptions=True)
            await make_datasets(self._config.record, self._config.grace_s)
        if self._metrics is not None:
            self._metrics.close()
        return was_clean


@asynccontextmanager
async def serve(config: ServerConfig) -> AsyncIterator[RunningServer]:
    """Serves by `config` inside the `async with` block, drains at its end.

    Raises:
        StartError: an address, certificate, token file or execution provider is not to be had, or not one policy of
            `config.models` is intact, trusted and able to reproduce its golden rows.
    """
    server = RunningServer(Supervisor(config), config)
    try:
        await server.start()
        yield server
    finally:
        await server.stop()
