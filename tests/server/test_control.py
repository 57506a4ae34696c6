"""`lom_server.control`: both ends, in two processes and over real pipes."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from lom_server.control import LINE_LIMIT_BYTES, ControlChannel, ControlError

PATIENCE_S = 30.0
EVENTS = 5000

CHILD = f"""
import asyncio, os, threading
from lom_api.reasons import Reason
from lom_bundle import BundleError
from lom_server.control import CommandLoop
from lom_server.errors import PolicyError, StartError

loop = CommandLoop()
released = asyncio.Event()

async def echo(facts): return {{"text": facts["text"]}}
async def wait(facts): await released.wait(); return {{}}
async def release(facts): released.set(); return {{}}
async def refuse_policy(facts): raise PolicyError(Reason.BAD_MODEL_NAME, "policy: expected another")
async def refuse_bundle(facts): raise BundleError("DIGEST_MISMATCH", "a file: expected another")
async def refuse_start(facts): raise StartError("ADDRESS_UNAVAILABLE", "expected another")
async def crash(facts): raise KeyError("a secret")
async def chat(facts): print("hello"); os.system("echo hello"); return {{}}
async def vanish(facts): os._exit(3)
async def babble(facts): os.write(loop._output, b"neither an answer nor an event\\n"); return {{}}
async def flood(facts):
    threading.Thread(target=lambda: [loop.tell("event") for _ in range({EVENTS})]).start()
    return {{"text": "x" * 4_000_000}}

commands = dict(
    echo=echo, wait=wait, release=release, refuse_policy=refuse_policy, refuse_bundle=refuse_bundle,
    refuse_start=refuse_start, crash=crash, chat=chat, vanish=vanish, babble=babble, flood=flood,
)
asyncio.run(loop.run(commands))
"""


@dataclass(kw_only=True)
class Child:
    """The process at the other end."""

    process: asyncio.subprocess.Process
    channel: ControlChannel
    events: list[str]
    listening: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self.listening = asyncio.create_task(self.channel.listen())

    async def log(self) -> str:
        """All that it wrote to stderr, once it has ended."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@asynccontextmanager
async def running_child() -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=LINE_LIMIT_BYTES,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    events: list[str] = []
    child = Child(process=process, channel=ControlChannel(process.stdout, process.stdin, events.append), events=events)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield child
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await asyncio.wait({child.listening})


async def refusal_of(asking: Awaitable[object]) -> ControlError:
    with pytest.raises(ControlError) as refusal:
        await asking
    return refusal.value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def test_every_answer_finds_who_asked() -> None:
    async with running_child() as child:
        waiting = asyncio.create_task(child.channel.ask("wait"))
        answers = await asyncio.gather(*(child.channel.ask("echo", text=str(number)) for number in range(50)))
        assert [answer["text"] for answer in answers] == [str(number) for number in range(50)]
        assert not waiting.done()  # one that takes its time keeps nobody waiting
        await child.channel.ask("release")
        assert await waiting == {}


async def test_refusals_travel_with_their_reason() -> None:
    async with running_child() as child:
        for command, expected in (
            ("refuse_policy", "BAD_MODEL_NAME: policy: expected another"),
            ("refuse_bundle", "DIGEST_MISMATCH: a file: expected another"),
            ("refuse_start", "ADDRESS_UNAVAILABLE: expected another"),
        ):
            assert str(await refusal_of(child.channel.ask(command))) == expected


@pytest.mark.parametrize("command", ["crash", "unknown"])
async def test_a_defect_is_an_internal_error_with_an_id(command: str) -> None:
    async with running_child() as child:
        refusal = await refusal_of(child.channel.ask(command))
        assert refusal.reason == "INTERNAL_ERROR"
        sentence, _, incident = refusal.detail.rpartition(" ")
        assert sentence == "the command could not be carried out, id"
        assert (await child.channel.ask("echo", text="still there"))["text"] == "still there"
        child.channel.close()
        log = await child.log()
        assert f"id {incident}" in log
        assert "KeyError" in log


async def test_what_the_child_prints_does_not_reach_the_channel() -> None:
    async with running_child() as child:
        assert await child.channel.ask("chat") == {}
        child.channel.close()
        assert await child.log() == "hello\nhello\n"


async def test_long_lines_and_events_of_another_thread_do_not_mix() -> None:
    async with running_child() as child:
        texts = [str(number) * 1_000_000 for number in range(3)]
        answers = await asyncio.gather(
            *(child.channel.ask("echo", text=text) for text in texts), *(child.channel.ask("flood") for _ in range(3))
        )
        assert [answer["text"] for answer in answers[:3]] == texts
        assert [len(answer["text"]) for answer in answers[3:]] == [4_000_000] * 3
        await until(lambda: len(child.events) == 3 * EVENTS)
        assert set(child.events) == {"event"}


async def test_a_child_that_ends_fails_what_waits_and_what_comes_later() -> None:
    async with running_child() as child:
        waiting = asyncio.create_task(child.channel.ask("wait"))
        for asking in (child.channel.ask("vanish"), waiting, child.channel.ask("echo", text="x")):
            assert (await refusal_of(asking)).reason == "WORKER_LOST"
        assert await child.process.wait() == 3


async def test_a_child_that_says_anything_else_is_lost() -> None:
    async with running_child() as child:
        waiting = asyncio.create_task(child.channel.ask("wait"))
        assert (await refusal_of(child.channel.ask("babble"))).reason == "WORKER_LOST"
        assert (await refusal_of(waiting)).reason == "WORKER_LOST"
        with pytest.raises(ValueError, match="Expecting value"):
            await child.listening


async def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    async with running_child() as child:
        waiting = asyncio.create_task(child.channel.ask("wait"))
        await child.channel.ask("echo", text="the command before it was sent")
        waiting.cancel()
        await asyncio.wait({waiting})
        await child.channel.ask("release")
        assert (await child.channel.ask("echo", text="x"))["text"] == "x"
        assert not child.listening.done()


async def test_a_child_whose_input_ends_ends() -> None:
    async with running_child() as child:
        await child.channel.ask("echo", text="x")
        child.channel.close()
        assert await child.process.wait() == 0
