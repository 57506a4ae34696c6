"""`lom_server.supervisor` with real worker processes: asked over real sockets while they are changed, killed, hung."""

import asyncio
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from lom_api.codec import pack_array
from lom_api.v1 import policy_pb2, policy_pb2_grpc
from lom_server.config import ServerConfig
from lom_server.errors import PolicyError, StartError
from lom_server.repository import PROMOTED_FILE
from lom_server.supervisor import LoadState, PolicyState, Supervisor
from lom_server.worker_pool import WorkerProcess
from tests.support.bundles import Flaws, write_test_bundle
from tests.support.processes import children_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_S = 30.0
WORKERS = 2
CONNECTIONS = 6
# Rows of the burning policy that take far longer than its server's `run_limit_s`: 2 gigaflop in each layer.
HANGING_ROWS = 4096
BURNING = Flaws(burn_layers=60)
ROWS_OF_A_LONG_RUN = 512
# What a call may get that its worker had not accepted when it left: gRPC cancels those that were on their way.
NOT_ACCEPTED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


@dataclass(kw_only=True)
class Stage:
    """A supervisor that serves a repository which tests add policies to, each its own."""

    supervisor: Supervisor
    repository: Path

    def write(self, policy: str, versions: Mapping[int, Flaws]) -> dict[int, str]:
        """Adds a policy to the repository, and returns the digests of its versions."""
        return {
            version: write_test_bundle(self.repository / policy / str(version), policy=policy, flaws=flaws)
            for version, flaws in versions.items()
        }

    def rewrite(self, policy: str, version: int, flaws: Flaws) -> str:
        """Replaces the content of a version."""
        shutil.rmtree(self.repository / policy / str(version))
        return self.write(policy, {version: flaws})[version]

    def state(self, policy: str) -> PolicyState:
        (state,) = [state for state in self.supervisor.list_policies() if state.policy == policy]
        return state

    def processes(self) -> list[int]:
        """Of the workers that are up."""
        return [worker.process.pid for worker in self.supervisor.pool.workers if worker.process.returncode is None]

    def restarts(self) -> int:
        return int(self.supervisor.pool.totals.total()["counters"]["worker_restarts"])

    async def held(self) -> list[set[tuple[str, int, str, bool]]]:
        """Policy, version, digest, and whether it is the default, of all that each worker serves."""
        answers = [await worker.ask("measure", limit_s=PATIENCE_S) for worker in self.supervisor.pool.workers]
        return [
            {
                (entry["policy"], entry["version"], entry["digest"], entry["is_default"])
                for entry in answer["metrics"]["served"]
            }
            for answer in answers
        ]

    async def replaced(self, processes: Sequence[int], before: int) -> None:
        """Returns when as many workers as ever are up, none of them one of `processes`."""
        await until(
            lambda: (
                self.restarts() == before + len(processes)
                and len(self.processes()) == WORKERS
                and not set(processes) & set(self.processes())
            ),
            "the workers are replaced",
        )


@asynccontextmanager
async def running(repository: Path, **choices: Any) -> AsyncIterator[Stage]:
    defaults: dict[str, Any] = {"listen": "127.0.0.1:0", "workers": WORKERS, "max_batch_rows": 16, "grace_s": 5.0}
    supervisor = Supervisor(ServerConfig(models=repository, **defaults | choices))
    try:
        await supervisor.start()
        yield Stage(supervisor=supervisor, repository=repository)
    finally:
        await supervisor.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """Serves `toy` in version 2 of 1 and 2, and not `bad`."""
    repository = tmp_path_factory.mktemp("repository")
    write_test_bundle(repository / "toy" / "1", flaws=Flaws())
    write_test_bundle(repository / "toy" / "2", flaws=Flaws(action_offset=0.25))
    write_test_bundle(repository / "bad" / "1", policy="bad", flaws=Flaws(wrong_golden=True))
    # Workers that a test stops for a moment are not to be taken for hung ones.
    async with running(repository, run_limit_s=PATIENCE_S) as stage:
        yield stage


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def tidy(stage: Stage) -> AsyncIterator[None]:
    """Unloads what a test has loaded: a new worker has to load all that is there."""
    yield
    for policy in [policy for policy in stage.supervisor.published if policy != "toy"]:
        await stage.supervisor.unload(policy, force=True)


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(stage: Stage) -> AsyncIterator["policy_pb2_grpc.PolicyServiceAsyncStub"]:
    """A connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(stage.supervisor.address, options) as channel:
        yield policy_pb2_grpc.PolicyServiceStub(channel)


def request(policy: str, version: int = 0, rows: int = 1) -> policy_pb2.ActRequest:
    # Mode 1, whose mean is (0, 0.25).
    observation = np.tile(np.array([[0.1, 0.3, 0.2]], dtype=np.float32), (rows, 1))
    return policy_pb2.ActRequest(policy=policy, version=version, inputs=[pack_array(observation, "observation")])


async def act(stage: Stage, policy: str, version: int = 0, rows: int = 1) -> policy_pb2.ActReply:
    async with connected(stage) as stub:
        return await stub.Act(request(policy, version, rows), timeout=PATIENCE_S)


async def refusal_of(stage: Stage, policy: str, version: int = 0) -> str:
    """The reason."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await act(stage, policy, version)
    return str(refusal.value.details()).partition(":")[0]


async def reason_of(operation: Awaitable[object]) -> str:
    with pytest.raises(PolicyError) as refusal:
        await operation
    return str(refusal.value.reason)


@dataclass(kw_only=True)
class Robots:
    """Connections that ask again and again.

    Attributes:
        replies: (sent, received, digest), in nanoseconds.
        errors: what else they got.
    """

    replies: list[tuple[int, int, str]] = field(default_factory=list)
    errors: list[grpc.aio.AioRpcError] = field(default_factory=list)
    stopped: bool = False

    async def ask(self, stage: Stage, policy: str) -> None:
        async with connected(stage) as stub:
            while not self.stopped:
                sent_ns = time.monotonic_ns()
                try:
                    reply = await stub.Act(request(policy), timeout=PATIENCE_S)
                except grpc.aio.AioRpcError as error:
                    self.errors.append(error)
                    await asyncio.sleep(0.01)
                else:
                    self.replies.append((sent_ns, time.monotonic_ns(), reply.bundle_digest))
                    await asyncio.sleep(0.002)  # processors are for those who change things

    async def see_more(self) -> None:
        """Returns when each of them has asked again, or nearly so."""
        seen = len(self.replies) + CONNECTIONS
        await until(lambda: len(self.replies) >= seen, "robots are answered")


@asynccontextmanager
async def asking_robots(stage: Stage, policy: str) -> AsyncIterator[Robots]:
    robots = Robots()
    asking = [asyncio.create_task(robots.ask(stage, policy)) for _ in range(CONNECTIONS)]
    try:
        await robots.see_more()
        yield robots
    finally:
        robots.stopped = True
        await asyncio.gather(*asking)


def verifiers_of(bundle: Path) -> list[int]:
    """Processes that prove `bundle` at this moment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                arguments = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"lom_server.verifier" in arguments and os.fsencode(bundle) in arguments:
                found.append(int(process.name))
    return found


async def proved(bundle: Path) -> None:
    """Returns when a proof of `bundle` has begun and is over."""
    await until(lambda: bool(verifiers_of(bundle)), "the proof begins")
    await until(lambda: not verifiers_of(bundle), "the proof is over")


# What is served after the start.


async def test_the_newest_version_serves_and_what_failed_says_so(stage: Stage) -> None:
    reply = await act(stage, "toy")
    assert (reply.policy, reply.version) == ("toy", 2)
    assert await refusal_of(stage, "toy", version=1) == "VERSION_NOT_FOUND"
    assert await refusal_of(stage, "bad") == "MODEL_FAILED"
    assert await refusal_of(stage, "unknown") == "MODEL_NOT_FOUND"
    toy, bad = stage.state("toy"), stage.state("bad")
    assert [(version.version, version.state) for version in toy.versions] == [
        (1, LoadState.ON_DISK),
        (2, LoadState.READY),
    ]
    assert (toy.default_version, toy.previous_version, toy.survives_restart) == (2, 0, True)
    assert toy.versions[1].digest == reply.bundle_digest
    assert [(version.state, version.reason, version.digest) for version in bad.versions] == [
        (LoadState.FAILED, "SELF_TEST_FAILED", "")
    ]
    assert (bad.default_version, bad.survives_restart) == (0, False)


async def test_every_worker_serves_the_same(stage: Stage) -> None:
    one, other = await stage.held()
    assert one == other
    assert ("toy", 2) in {entry[:2] for entry in one}


async def test_a_server_with_nothing_to_serve_does_not_start(tmp_path: Path) -> None:
    for version in (1, 2):
        write_test_bundle(tmp_path / "one" / str(version), policy="one", flaws=Flaws(wrong_golden=True))
    write_test_bundle(tmp_path / "two" / "1", policy="two", flaws=Flaws(wrong_golden=True))
    supervisor = Supervisor(ServerConfig(models=tmp_path, listen="127.0.0.1:0"))
    with pytest.raises(StartError) as refusal:
        await supervisor.start()
    assert refusal.value.reason == "SELF_TEST_FAILED"
    assert [worker.process.returncode for worker in supervisor.pool.workers] == [0]
    host, _, port = supervisor.address.rpartition(":")
    with socket.create_server((host, int(port))):
        pass  # the port is free


async def test_an_address_that_is_taken_is_said_before_anything_is_started(stage: Stage) -> None:
    config = ServerConfig(models=stage.repository, listen=stage.supervisor.address)
    with pytest.raises(StartError, match=r"^ADDRESS_UNAVAILABLE: "):
        await Supervisor(config).start()


# Loading, promoting, rolling back, unloading.


async def test_a_version_comes_and_goes(stage: Stage) -> None:
    digests = stage.write("arm", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    supervisor = stage.supervisor
    assert await refusal_of(stage, "arm") == "MODEL_NOT_FOUND"

    await supervisor.load("arm", 1)
    reply = await act(stage, "arm")
    assert (reply.version, reply.bundle_digest) == (1, digests[1])

    state = await supervisor.load("arm")  # the highest on disk, beside the one that serves
    assert state.default_version == 1
    assert (await act(stage, "arm")).version == 1
    assert (await act(stage, "arm", version=2)).bundle_digest == digests[2]

    state = await supervisor.promote("arm", 2)
    assert (state.default_version, state.previous_version, state.survives_restart) == (2, 1, True)
    assert (await act(stage, "arm")).bundle_digest == digests[2]
    assert (stage.repository / "arm" / PROMOTED_FILE).read_text() == "2\n"

    state = await supervisor.roll_back("arm")
    assert (state.default_version, state.previous_version) == (1, 2)
    assert (await act(stage, "arm")).bundle_digest == digests[1]
    assert (stage.repository / "arm" / PROMOTED_FILE).read_text() == "1\n"

    assert await reason_of(supervisor.unload("arm", 1)) == "LAST_VERSION"
    assert await reason_of(supervisor.unload("arm")) == "LAST_VERSION"
    state = await supervisor.unload("arm", 2)
    assert (state.default_version, state.previous_version) == (1, 0)
    assert await refusal_of(stage, "arm", version=2) == "VERSION_NOT_FOUND"
    assert await reason_of(supervisor.roll_back("arm")) == "NO_PREVIOUS_VERSION"

    state = await supervisor.unload("arm", force=True)
    assert (state.default_version, {version.state for version in state.versions}) == (0, {LoadState.ON_DISK})
    assert await refusal_of(stage, "arm") == "MODEL_NOT_FOUND"
    assert all("arm" not in {entry[0] for entry in held} for held in await stage.held())


async def test_force_unloads_the_default_and_the_newest_that_is_left_takes_over(stage: Stage) -> None:
    stage.write("forced", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    await stage.supervisor.load("forced", 1)
    await stage.supervisor.load("forced", 2, promote=True)
    state = await stage.supervisor.unload("forced", 2, force=True)
    assert (state.default_version, state.previous_version, state.survives_restart) == (1, 0, False)
    assert (await act(stage, "forced")).version == 1


async def test_what_is_not_there_is_refused(stage: Stage) -> None:
    supervisor = stage.supervisor
    for name in ("unknown", "..", "../toy", "toy/1", ""):
        assert await reason_of(supervisor.load(name)) == "BUNDLE_NOT_FOUND"
        assert await reason_of(supervisor.promote(name, 1)) == "MODEL_NOT_FOUND"
        assert await reason_of(supervisor.roll_back(name)) == "MODEL_NOT_FOUND"
        assert await reason_of(supervisor.unload(name)) == "MODEL_NOT_FOUND"
    assert await reason_of(supervisor.load("toy", 7)) == "BUNDLE_NOT_FOUND"
    assert await reason_of(supervisor.unload("toy", 1)) == "VERSION_NOT_FOUND"
    for version in (0, 1, 7):
        assert await reason_of(supervisor.promote("toy", version)) == "VERSION_NOT_FOUND"
    assert (await act(stage, "toy")).version == 2


async def test_promoting_the_default_makes_it_stay(stage: Stage) -> None:
    stage.write("staying", {1: Flaws()})
    await stage.supervisor.load("staying")
    assert not (stage.repository / "staying" / PROMOTED_FILE).exists()
    state = await stage.supervisor.promote("staying", 1)
    assert state.survives_restart
    stage.write("staying", {2: Flaws()})
    assert stage.state("staying").survives_restart


async def test_a_promotion_that_cannot_be_written_takes_place_and_says_so(stage: Stage) -> None:
    stage.write("unwritable", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    (stage.repository / "unwritable" / PROMOTED_FILE).mkdir()
    await stage.supervisor.load("unwritable", 2)
    assert stage.state("unwritable").survives_restart  # the newest one would be chosen
    state = await stage.supervisor.load("unwritable", 1, promote=True)
    assert (state.default_version, state.survives_restart) == (1, False)
    assert (await act(stage, "unwritable")).version == 1


async def test_only_what_a_roll_back_needs_is_kept(stage: Stage) -> None:
    digests = stage.write("kept", {1: Flaws(), 2: Flaws(action_offset=0.1), 3: Flaws(action_offset=0.2)})
    for version in (1, 2, 3):
        await stage.supervisor.load("kept", version, promote=True)
    expected = {("kept", 2, digests[2], False), ("kept", 3, digests[3], True)}
    assert [{entry for entry in held if entry[0] == "kept"} for held in await stage.held()] == [expected] * WORKERS


async def test_a_version_whose_content_changed_is_replaced(stage: Stage) -> None:
    digests = stage.write("changing", {1: Flaws()})
    await stage.supervisor.load("changing")
    changed = stage.rewrite("changing", 1, Flaws(action_offset=0.25))
    assert (await act(stage, "changing")).bundle_digest == digests[1]
    state = await stage.supervisor.load("changing", 1)
    assert state.versions[0].digest == changed
    for _ in range(CONNECTIONS):
        assert (await act(stage, "changing")).bundle_digest == changed


async def test_a_version_that_fails_changes_nothing_and_can_be_tried_again(stage: Stage) -> None:
    digests = stage.write("failing", {1: Flaws(), 2: Flaws(wrong_golden=True)})
    await stage.supervisor.load("failing", 1)
    before = await stage.held()
    for promote in (False, True):
        assert await reason_of(stage.supervisor.load("failing", 2, promote=promote)) == "SELF_TEST_FAILED"
    assert await stage.held() == before
    failed = stage.state("failing").versions[1]
    assert (failed.state, failed.reason) == (LoadState.FAILED, "SELF_TEST_FAILED")
    stage.rewrite("failing", 2, Flaws())
    state = await stage.supervisor.load("failing", 2)
    assert (state.versions[1].state, state.versions[1].reason) == (LoadState.READY, "")
    assert (await act(stage, "failing")).bundle_digest == digests[1]


async def test_a_policy_is_loaded_once_at_a_time_and_two_at_once(stage: Stage) -> None:
    stage.write("twice", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    stage.write("beside", {1: Flaws()})
    first = asyncio.create_task(stage.supervisor.load("twice", 1))
    await asyncio.sleep(0)  # it has taken its place
    assert stage.state("twice").versions[0].state is LoadState.LOADING
    assert await reason_of(stage.supervisor.load("twice", 2)) == "RELOAD_IN_PROGRESS"
    beside = await stage.supervisor.load("beside")
    assert {(await first).default_version, beside.default_version} == {1}
    assert (await stage.supervisor.load("twice", 2)).default_version == 1  # the place is free again


async def test_a_bundle_that_changes_after_its_proof_is_refused(stage: Stage) -> None:
    digests = stage.write("swapped", {1: Flaws()})
    await stage.supervisor.load("swapped")
    stage.write("swapped", {2: Flaws()})
    workers = stage.processes()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    loading = asyncio.create_task(stage.supervisor.load("swapped", 2, promote=True))
    try:
        await proved(stage.repository / "swapped" / "2")
        stage.rewrite("swapped", 2, Flaws(action_offset=0.25))
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
    assert await reason_of(loading) == "DIGEST_MISMATCH"
    assert (await act(stage, "swapped")).bundle_digest == digests[1]
    assert await refusal_of(stage, "swapped", version=2) == "VERSION_NOT_FOUND"


async def test_an_unreadable_repository_keeps_serving_and_can_be_rolled_back(stage: Stage) -> None:
    stage.write("offline", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    await stage.supervisor.load("offline", 1)
    await stage.supervisor.load("offline", 2, promote=True)
    elsewhere = stage.repository.with_name("elsewhere")
    stage.repository.rename(elsewhere)
    try:
        assert await reason_of(stage.supervisor.load("offline", 2)) == "STORE_UNREADABLE"
        with pytest.raises(PolicyError, match=r"^STORE_UNREADABLE: "):
            stage.supervisor.list_policies()
        state = await stage.supervisor.roll_back("offline")
        assert (state.default_version, state.survives_restart) == (1, False)
        assert (await act(stage, "offline")).version == 1
    finally:
        elsewhere.rename(stage.repository)


# While robots ask.


@dataclass(kw_only=True)
class Period:
    """When a bundle may answer: from the call that promotes it until the acknowledgement of the next promotion."""

    digest: str
    begin_ns: int
    end_ns: int = 2**63


async def test_a_promotion_loses_nothing_and_after_it_only_the_new_version_answers(stage: Stage) -> None:
    digests = stage.write("swinging", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    await stage.supervisor.load("swinging", 1)
    await stage.supervisor.load("swinging", 2)
    swaps_before = stage.supervisor.pool.totals.total()["counters"]["swaps"]
    periods = [Period(digest=digests[1], begin_ns=0)]
    async with asking_robots(stage, "swinging") as robots:
        for number in range(50):
            version = 2 - number % 2
            periods.append(Period(digest=digests[version], begin_ns=time.monotonic_ns()))
            await stage.supervisor.promote("swinging", version)
            periods[-2].end_ns = time.monotonic_ns()
            await robots.see_more()
    assert robots.errors == []
    for sent_ns, received_ns, digest in robots.replies:
        assert any(
            period.digest == digest and period.begin_ns <= received_ns and sent_ns <= period.end_ns
            for period in periods
        ), (sent_ns, received_ns, digest)
    assert {digest for _, _, digest in robots.replies} == set(digests.values())
    assert stage.supervisor.pool.totals.total()["counters"]["swaps"] == swaps_before + 50


async def test_a_promotion_is_acknowledged_when_every_worker_has_made_it(stage: Stage) -> None:
    stage.write("awaited", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    await stage.supervisor.load("awaited", 1)
    await stage.supervisor.load("awaited", 2)
    slow, other = stage.supervisor.pool.workers
    os.kill(slow.process.pid, signal.SIGSTOP)
    try:
        promoting = asyncio.create_task(stage.supervisor.promote("awaited", 2))
        await until_default(other, "awaited", 2)
        assert not promoting.done()
    finally:
        os.kill(slow.process.pid, signal.SIGCONT)
    assert (await promoting).default_version == 2
    one, two = await stage.held()
    assert one == two


async def until_default(worker: WorkerProcess, policy: str, version: int) -> None:
    """Returns when `worker` answers by that version whoever names none."""
    served: list[dict[str, Any]] = []
    give_up_at = time.monotonic() + PATIENCE_S
    while (policy, version, True) not in {(at["policy"], at["version"], at["is_default"]) for at in served}:
        assert time.monotonic() < give_up_at
        served = (await worker.ask("measure", limit_s=PATIENCE_S))["metrics"]["served"]


async def test_failed_loads_and_other_loads_disturb_nobody(stage: Stage) -> None:
    digests = stage.write("calm", {1: Flaws()})
    stage.write("noisy", {1: Flaws()})
    stage.write("wrong", {1: Flaws(wrong_golden=True)})
    await stage.supervisor.load("calm")
    async with asking_robots(stage, "calm") as robots:
        loaded, wrong = await asyncio.gather(stage.supervisor.load("noisy"), reason_of(stage.supervisor.load("wrong")))
        await robots.see_more()
    assert (loaded.default_version, wrong) == (1, "SELF_TEST_FAILED")
    assert robots.errors == []
    assert {digest for _, _, digest in robots.replies} == {digests[1]}


# Workers that die.


async def test_a_killed_worker_is_replaced_by_one_that_holds_the_same(stage: Stage) -> None:
    stage.write("mourned", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    await stage.supervisor.load("mourned", 1)
    await stage.supervisor.load("mourned", 2, promote=True)
    before, restarts = await stage.held(), stage.restarts()
    victim = stage.processes()[0]
    os.kill(victim, signal.SIGKILL)
    await stage.replaced([victim], restarts)
    assert await stage.held() == before
    for _ in range(CONNECTIONS):
        assert (await act(stage, "mourned")).version == 2
    assert await refusal_of(stage, "bad") == "MODEL_FAILED"


async def test_losing_all_workers_loses_no_state(stage: Stage) -> None:
    before, restarts, victims = await stage.held(), stage.restarts(), stage.processes()
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    state = await stage.supervisor.promote("toy", 2)  # nobody lives to be told
    assert state.default_version == 2
    await stage.replaced(victims, restarts)
    assert await stage.held() == before


async def test_a_worker_that_dies_during_a_load_has_a_successor_that_holds_it(stage: Stage) -> None:
    digests = stage.write("survived", {1: Flaws()})
    restarts = stage.restarts()
    victim = stage.processes()[0]
    os.kill(victim, signal.SIGSTOP)
    loading = asyncio.create_task(stage.supervisor.load("survived"))
    await proved(stage.repository / "survived" / "1")
    os.kill(victim, signal.SIGKILL)
    assert (await loading).default_version == 1
    await stage.replaced([victim], restarts)
    assert all(("survived", 1, digests[1], True) in held for held in await stage.held())


async def test_a_load_without_any_worker_is_refused_and_changes_nothing(stage: Stage) -> None:
    stage.write("orphaned", {1: Flaws()})
    before, restarts, victims = await stage.held(), stage.restarts(), stage.processes()
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    loading = asyncio.create_task(stage.supervisor.load("orphaned"))
    await proved(stage.repository / "orphaned" / "1")
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    assert await reason_of(loading) == "WORKER_LOST"
    await stage.replaced(victims, restarts)
    assert await stage.held() == before


async def test_what_a_new_worker_cannot_load_any_more_is_let_go_by_all(stage: Stage) -> None:
    digests = stage.write("pruned", {1: Flaws(), 2: Flaws(action_offset=0.25)})
    await stage.supervisor.load("pruned", 1)
    await stage.supervisor.load("pruned", 2, promote=True)
    shutil.rmtree(stage.repository / "pruned" / "1")
    restarts, victim = stage.restarts(), stage.processes()[0]
    os.kill(victim, signal.SIGKILL)
    await stage.replaced([victim], restarts)
    for held in await stage.held():
        assert {entry for entry in held if entry[0] == "pruned"} == {("pruned", 2, digests[2], True)}
    assert await reason_of(stage.supervisor.roll_back("pruned")) == "NO_PREVIOUS_VERSION"


async def test_a_default_that_is_gone_from_disk_serves_while_a_worker_lives(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    digests = stage.write("vanished", {1: Flaws()})
    await stage.supervisor.load("vanished")
    shutil.rmtree(stage.repository / "vanished")
    restarts, victims = stage.restarts(), stage.processes()
    os.kill(victims[0], signal.SIGKILL)
    await until(lambda: "a worker could not be started: " in caplog.text, "a successor fails")
    assert (await act(stage, "vanished")).bundle_digest == digests[1]
    os.kill(victims[1], signal.SIGKILL)
    await stage.replaced(victims, restarts)
    assert await refusal_of(stage, "vanished") == "MODEL_FAILED"
    assert (await act(stage, "toy")).version == 2  # the others do not suffer


# Servers of their own.


async def test_a_promotion_survives_a_restart(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        write_test_bundle(tmp_path / "arm" / str(version), policy="arm", flaws=Flaws(action_offset=version / 100))
    async with running(tmp_path, workers=1) as stage:
        assert (await act(stage, "arm")).version == 3
        await stage.supervisor.load("arm", 1, promote=True)
    async with running(tmp_path, workers=1, versions="all") as stage:
        assert (await act(stage, "arm")).version == 1
        assert {(await act(stage, "arm", version=version)).version for version in (1, 2, 3)} == {1, 2, 3}
        assert stage.state("arm").survives_restart
    async with running(tmp_path, workers=1, pin=("arm=2",)) as stage:
        assert (await act(stage, "arm")).version == 2
        assert stage.state("arm").survives_restart
        state = await stage.supervisor.load("arm", 3, promote=True)
        assert not state.survives_restart  # the pin would win
    (tmp_path / "arm" / PROMOTED_FILE).write_text("7\n")
    async with running(tmp_path, workers=1) as stage:
        assert (await act(stage, "arm")).version == 3
    for pin in ("arm=7", "unknown=1"):
        with pytest.raises(StartError, match=r"^BUNDLE_NOT_FOUND: pin: "):
            await Supervisor(ServerConfig(models=tmp_path, listen="127.0.0.1:0", pin=(pin,))).start()


async def test_where_the_promoted_version_fails_the_newest_other_one_serves(tmp_path: Path) -> None:
    for version in (1, 2, 3):
        flaws = Flaws(wrong_golden=version == 3)
        write_test_bundle(tmp_path / "arm" / str(version), policy="arm", flaws=flaws)
    async with running(tmp_path, workers=1, versions="all") as stage:
        assert (await act(stage, "arm")).version == 2


async def test_a_single_bundle_can_be_replaced_in_its_place(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    first = write_test_bundle(bundle, policy="arm")
    async with running(bundle, workers=1) as stage:
        reply = await act(stage, "arm")
        assert (reply.version, reply.bundle_digest) == (1, first)
        shutil.rmtree(bundle)
        second = write_test_bundle(bundle, policy="arm", flaws=Flaws(action_offset=0.25))
        await stage.supervisor.load("arm")
        assert (await act(stage, "arm")).bundle_digest == second


async def test_a_hung_run_costs_its_caller_and_a_worker_and_nobody_else(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "toy" / "1")
    write_test_bundle(tmp_path / "burning" / "1", policy="burning", flaws=BURNING)
    room = {"max_batch_rows": HANGING_ROWS, "max_queue_rows": 2 * HANGING_ROWS}  # robots may wait beside the run
    async with running(tmp_path, run_limit_s=0.3, **room) as stage:
        before = await stage.held()
        processes = set(stage.processes())
        async with asking_robots(stage, "toy") as robots:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await act(stage, "burning", rows=HANGING_ROWS)
            assert refusal.value.code() is grpc.StatusCode.INTERNAL
            assert str(refusal.value.details()).startswith("INFERENCE_FAILED: ")
            await until(lambda: stage.restarts() == 1, "the worker is to be replaced")
            await until(lambda: len(set(stage.processes()) - processes) == 1, "the worker is replaced")
            await robots.see_more()
        # A robot whose worker leaves asks the next one.
        assert {error.code() for error in robots.errors} <= NOT_ACCEPTED
        assert await stage.held() == before

        # Letting a version go does not take its last run out of sight.
        hanging = asyncio.create_task(act(stage, "burning", rows=HANGING_ROWS))
        await until_accepted(stage.processes())
        await stage.supervisor.unload("burning", force=True)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await hanging
        assert str(refusal.value.details()).startswith("INFERENCE_FAILED: ")


async def test_a_worker_that_does_not_answer_is_ended_and_replaced(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "toy" / "1")
    async with running(tmp_path) as stage:
        before = await stage.held()
        stopped = stage.processes()[0]
        os.kill(stopped, signal.SIGSTOP)
        await stage.replaced([stopped], 0)
        assert await stage.held() == before


async def until_accepted(processes: Sequence[int]) -> None:
    """Returns when one of `processes` has computed for a while."""

    def ticks(process: int) -> int:
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1].split()[11])

    before = {process: ticks(process) for process in processes}
    await until(lambda: any(ticks(process) > before[process] + 5 for process in processes), "a worker computes")


async def test_workers_that_die_at_once_are_not_replaced_at_once(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "toy" / "1")
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(running(tmp_path, workers=1))
        (known,) = stage.supervisor.pool.workers
        bystanders = children_of(os.getpid()) - {known.process.pid}
        killed: set[int] = set()
        give_up_at = time.monotonic() + 2.0
        while time.monotonic() < give_up_at:
            for process in children_of(os.getpid()) - killed - bystanders:
                killed.add(process)
                os.kill(process, signal.SIGKILL)
            await asyncio.sleep(0.002)
        assert 2 <= len(killed) <= 8  # pauses of 0.1, 0.2, 0.4, 0.8, 1.6 s
        await until(lambda: len(stage.processes()) == 1, "peace returns")
        assert (await act(stage, "toy")).version == 1


async def test_a_drain_answers_what_was_accepted(tmp_path: Path) -> None:
    write_test_bundle(tmp_path / "burning" / "1", policy="burning", flaws=BURNING)
    write_test_bundle(tmp_path / "toy" / "1")
    async with running(
        tmp_path, max_batch_rows=ROWS_OF_A_LONG_RUN, run_limit_s=20.0, grace_s=PATIENCE_S, max_deadline_s=PATIENCE_S
    ) as stage:
        async with asking_robots(stage, "toy") as robots:
            accepted = [asyncio.create_task(act(stage, "burning", rows=ROWS_OF_A_LONG_RUN)) for _ in range(8)]
            # One of them may run in each worker.
            await until_waiting(stage, (len(accepted) - WORKERS) * ROWS_OF_A_LONG_RUN)
            assert await stage.supervisor.stop()
            for reply in await asyncio.gather(*accepted):
                assert reply.policy == "burning"
        assert robots.errors
        assert {error.code() for error in robots.errors} <= NOT_ACCEPTED


async def until_waiting(stage: Stage, rows: int) -> None:
    """Returns when so many rows wait for engines."""
    give_up_at = time.monotonic() + PATIENCE_S
    waiting = 0
    while waiting < rows:
        answers = [await worker.ask("measure", limit_s=PATIENCE_S) for worker in stage.supervisor.pool.workers]
        waiting = sum(answer["metrics"]["gauges"]["queue_rows"] for answer in answers)
        assert time.monotonic() < give_up_at, f"waited in vain for {rows} rows, saw {waiting}"
