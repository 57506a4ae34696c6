"""A TCP proxy with faults: what a network does to a connection, without a network.

TCP keeps the order of a connection's bytes, so nothing is lost or reordered here: a cut holds bytes back, as lost
packets that are sent again do, and lets them go when it heals.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Self

_CHUNK_BYTES = 64 * 1024


class FaultProxy:
    """Between clients and 127.0.0.1:`port`, while its `with` block lasts. Faults take effect before a method returns.

    Attributes:
        delay_s: how late each direction is; to be set before there are connections.
        connections: how many there have been so far.
    """

    def __init__(self, port: int, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.connections = 0
        self._to_port = port
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._requests_flow = asyncio.Event()
        self._replies_flow = asyncio.Event()
        self._refuses = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.heal()

    @property
    def target(self) -> str:
        """Where a client finds it."""
        return f"grpc://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Holds back what is sent either way; connections stay open."""
        self._do(self._requests_flow.clear)
        self._do(self._replies_flow.clear)

    def cut_replies(self) -> None:
        """Holds back replies; requests arrive."""
        self._do(self._replies_flow.clear)

    def reset(self) -> None:
        """Ends every connection at once, and new ones as soon as they are made."""

        def abort() -> None:
            self._refuses = True
            for writer in self._open:
                writer.transport.abort()

        self._do(abort)

    def heal(self) -> None:
        """Ends every fault; what was held back arrives now."""

        def flow() -> None:
            self._refuses = False
            self._requests_flow.set()
            self._replies_flow.set()

        self._do(flow)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, fault: Callable[[], object]) -> None:
        async def now() -> None:
            fault()

        asyncio.run_coroutine_threadsafe(now(), self._loop).result()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connect, "127.0.0.1", 0)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refuses:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        for source, sink, flow in (
            (reader, far_writer, self._requests_flow),
            (far_reader, writer, self._replies_flow),
        ):
            pump = asyncio.create_task(self._pump(source, sink, flow))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: asyncio.Event) -> None:
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                await flow.wait()
                if self.delay_s:
                    self._loop.call_later(self.delay_s, self._write, writer, chunk)
                else:
                    self._write(writer, chunk)
        except ConnectionError:
            pass
        await flow.wait()
        self._loop.call_later(self.delay_s, writer.close)
        self._open.discard(writer)

    def _write(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        if not writer.is_closing():
            writer.write(chunk)

    async def _close(self) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        for writer in self._open:
            writer.transport.abort()
        await asyncio.gather(*self._pumps, return_exceptions=True)
