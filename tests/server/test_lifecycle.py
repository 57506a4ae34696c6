"""`lom_server.lifecycle.serve` in process."""

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lom_bundle import BundleError
from lom_server.config import ServerConfig
from lom_server.engine import OnnxEngine
from lom_server.lifecycle import serve
from tests.support.bundles import Flaws, write_test_bundle

PATIENCE_S = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def on_free_port(bundle: Path, **choices: object) -> ServerConfig:
    return ServerConfig(bundle=bundle, listen="127.0.0.1:0", **choices)  # type: ignore[arg-type]


async def listening_address(caplog: pytest.LogCaptureFixture) -> str:
    async def poll() -> str:
        while True:
            for record in caplog.records:
                if record.getMessage().startswith("listening on "):
                    assert isinstance(record.args, tuple)
                    return str(record.args[0])
            await asyncio.sleep(0.001)

    return await asyncio.wait_for(poll(), PATIENCE_S)


async def test_not_serving_until_the_golden_rows_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=Flaws(burn_layers=200))
    async with AsyncExitStack() as stack:
        with caplog.at_level(logging.INFO, "lom_server"):
            starting = asyncio.create_task(stack.enter_async_context(serve(on_free_port(tmp_path / "bundle"))))
            address = await listening_address(caplog)
        async with grpc.aio.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert (await watch.read()).status == NOT_SERVING
            assert not starting.done()
            assert (await watch.read()).status == SERVING
            server = await starting
            assert server.address == address
            stopping = asyncio.create_task(server.stop())
            assert (await watch.read()).status == NOT_SERVING
            assert await stopping


async def test_a_failed_proof_is_never_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_test_bundle(tmp_path / "bundle", flaws=Flaws(burn_layers=200, wrong_golden=True))
    with caplog.at_level(logging.INFO, "lom_server"):
        starting = asyncio.create_task(AsyncExitStack().enter_async_context(serve(on_free_port(tmp_path / "bundle"))))
        address = await listening_address(caplog)
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        seen = []
        try:
            async for reply in watch:
                seen.append(reply.status)  # noqa: PERF401
        except grpc.aio.AioRpcError:
            pass
    assert NOT_SERVING in seen
    assert SERVING not in seen
    with pytest.raises(BundleError, match=r"^SELF_TEST_FAILED: "):
        await starting


async def test_inference_is_placed_by_measurement(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxEngine, "measured_run_ns", lambda self, variant, outputs, rows: 100_000 * rows)
    for inference, inline_rows in (("auto", 4), ("inline", 1024), ("thread", 0)):
        async with serve(on_free_port(toy_bundle, inference=inference)) as server:
            assert {lane.inline_rows for lane in server.policy.lanes.values()} == {inline_rows}


async def test_stopping_twice_is_stopping_once(toy_bundle: Path) -> None:
    async with serve(on_free_port(toy_bundle)) as server:
        assert all(await asyncio.gather(server.stop(), server.stop()))


async def test_two_servers_in_one_process_do_not_meet(toy_bundle: Path, tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "bundle", policy="other")
    async with serve(on_free_port(toy_bundle)) as one, serve(on_free_port(tmp_path / "bundle")) as other:
        assert one.address != other.address
        assert one.policy.bundle_digest != other.policy.bundle_digest
