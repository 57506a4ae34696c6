"""What only a client on an event loop can do; the rest is tested for both kinds alike."""

import asyncio
import inspect

import numpy as np
import pytest

from lom_client import AsyncPolicyClient, ClientConfig, PolicyClient
from tests.support.fake_policy_server import FakePolicyServer, never_act
from tests.support.servers import PATIENCE_S

ROW = [0.1, 0.2, 0.3]


def test_without_an_event_loop_there_is_no_client() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncPolicyClient("grpc://127.0.0.1:8001")


def test_both_clients_take_the_same_arguments() -> None:
    for method in ("__init__", "act", "get_spec"):
        ours, theirs = (inspect.signature(getattr(kind, method)) for kind in (AsyncPolicyClient, PolicyClient))
        assert ours.parameters == theirs.parameters


@pytest.mark.parametrize("use_stream", [False, True])
async def test_many_calls_are_under_way_at_once(server: FakePolicyServer, use_stream: bool) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
    async with AsyncPolicyClient(server.target, config=ClientConfig(use_stream=use_stream)) as client:
        answers = await asyncio.gather(*(client.act(row, deadline_s=20) for row in rows))
    np.testing.assert_array_equal([answer.actions for answer in answers], rows[:, :2])
    assert server.spec_requests >= 1


async def test_the_loop_lives_on_while_an_answer_is_waited_for(server: FakePolicyServer) -> None:
    server.act = never_act
    async with AsyncPolicyClient(server.target) as client:
        await client.get_spec(deadline_s=10)
        call = asyncio.create_task(client.act(ROW, deadline_s=30))
        while not server.requests:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(server.given_up.wait, PATIENCE_S)


@pytest.mark.parametrize("use_stream", [False, True])
async def test_who_is_cancelled_while_the_client_closes_stops(server: FakePolicyServer, use_stream: bool) -> None:
    server.act = never_act
    client = AsyncPolicyClient(server.target, config=ClientConfig(use_stream=use_stream))
    await client.get_spec(deadline_s=10)
    call = asyncio.create_task(client.act(ROW, deadline_s=30))
    while not server.requests:
        await asyncio.sleep(0.001)
    closing = asyncio.create_task(client.close())
    call.cancel()
    await asyncio.wait((call, closing))
    assert call.cancelled()
    assert closing.exception() is None


@pytest.mark.parametrize("use_stream", [False, True])
async def test_closing_leaves_no_task(server: FakePolicyServer, use_stream: bool) -> None:
    async with AsyncPolicyClient(server.target, config=ClientConfig(use_stream=use_stream)) as client:
        await client.act(ROW, deadline_s=10)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=PATIENCE_S)
    assert all(task.done() for task in others)
