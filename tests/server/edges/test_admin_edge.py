"""`lom_server.edges.admin_edge` as an operator and Triton's client reach it, over a Unix socket."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from lom_api.v1 import admin_pb2, admin_pb2_grpc
from lom_server.config import ServerConfig
from lom_server.edges import oip_schema
from lom_server.server import RunningServer, serve
from tests.support.bundles import Flaws, write_test_bundle

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_S = 30.0
ADMIN = "lom_api.v1.AdminService"
READY, ON_DISK, FAILED = admin_pb2.LOAD_STATE_READY, admin_pb2.LOAD_STATE_ON_DISK, admin_pb2.LOAD_STATE_FAILED


@dataclass(kw_only=True)
class Stage:
    """A server with an admin listener, and a repository that tests add policies to, each its own."""

    server: RunningServer
    repository: Path
    channel: grpc.aio.Channel

    def write(self, policy: str, *versions: int, flaws: Flaws | None = None) -> list[str]:
        """Adds versions to the repository, and returns their digests."""
        return [
            write_test_bundle(self.repository / policy / str(version), policy=policy, flaws=flaws)
            for version in versions
        ]

    @property
    def operator(self) -> Any:
        return admin_pb2_grpc.AdminServiceStub(self.channel)

    async def state(self, policy: str) -> admin_pb2.PolicyState:
        reply = await self.operator.ListPolicies(admin_pb2.ListPoliciesRequest(), timeout=PATIENCE_S)
        by_name: dict[str, admin_pb2.PolicyState] = {state.policy: state for state in reply.policies}
        return by_name[policy]

    def raw_call(self, method: str) -> Any:
        """A method without a serialiser."""
        return self.channel.unary_unary(f"/{method}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """Serves `toy` in version 1, and grants robots next to no time."""
    repository = tmp_path_factory.mktemp("models")
    write_test_bundle(repository / "toy" / "1")
    config = ServerConfig(
        models=repository,
        listen="127.0.0.1:0",
        admin_listen=f"unix:{repository.parent}/admin-edge.sock",
        max_batch_rows=16,
        default_deadline_s=0.001,
        max_deadline_s=0.001,
    )
    async with serve(config) as server, grpc.aio.insecure_channel(server.admin_address) as channel:
        yield Stage(server=server, repository=repository, channel=channel)


async def refusal_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status code and message."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    return refusal.value.code(), str(refusal.value.details())


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        await asyncio.sleep(0.005)


async def test_a_policy_from_disk_to_service_and_back(stage: Stage) -> None:
    one, two = stage.write("arm", 1, 2)
    operator = stage.operator
    state = await operator.LoadPolicy(admin_pb2.LoadPolicyRequest(policy="arm", version=1))  # without a deadline
    assert state == admin_pb2.PolicyState(
        policy="arm",
        default_version=1,
        versions=[
            admin_pb2.VersionState(version=1, state=READY, bundle_digest=one),
            admin_pb2.VersionState(version=2, state=ON_DISK),
        ],
    )
    state = await operator.LoadPolicy(admin_pb2.LoadPolicyRequest(policy="arm", promote=True))
    assert state == admin_pb2.PolicyState(
        policy="arm",
        default_version=2,
        previous_version=1,
        survives_restart=True,
        versions=[
            admin_pb2.VersionState(version=1, state=READY, bundle_digest=one),
            admin_pb2.VersionState(version=2, state=READY, bundle_digest=two),
        ],
    )
    assert await stage.state("arm") == state
    state = await operator.PromotePolicy(admin_pb2.PromotePolicyRequest(policy="arm", version=1))
    assert (state.default_version, state.previous_version) == (1, 2)
    state = await operator.RollBackPolicy(admin_pb2.RollBackPolicyRequest(policy="arm"))
    assert (state.default_version, state.previous_version) == (2, 1)
    state = await operator.UnloadPolicy(admin_pb2.UnloadPolicyRequest(policy="arm", version=1))
    assert [version.state for version in state.versions] == [ON_DISK, READY]
    state = await operator.UnloadPolicy(admin_pb2.UnloadPolicyRequest(policy="arm", force=True))
    assert (state.default_version, [version.state for version in state.versions]) == (0, [ON_DISK, ON_DISK])


async def test_refusals_have_their_status_and_reason(stage: Stage) -> None:
    stage.write("wrong", 1, flaws=Flaws(wrong_golden=True))
    stage.write("damaged", 1)
    (stage.repository / "damaged" / "1" / "actor.onnx").write_bytes(b"damaged")
    operator = stage.operator
    load, promote = admin_pb2.LoadPolicyRequest, admin_pb2.PromotePolicyRequest
    unload, roll_back = admin_pb2.UnloadPolicyRequest, admin_pb2.RollBackPolicyRequest
    for call, code, reason in (
        (operator.LoadPolicy(load(policy="../toy")), grpc.StatusCode.NOT_FOUND, "BUNDLE_NOT_FOUND"),
        (operator.LoadPolicy(load(policy="toy", version=2**32 - 1)), grpc.StatusCode.NOT_FOUND, "BUNDLE_NOT_FOUND"),
        (operator.LoadPolicy(load(policy="wrong")), grpc.StatusCode.FAILED_PRECONDITION, "SELF_TEST_FAILED"),
        (operator.LoadPolicy(load(policy="damaged")), grpc.StatusCode.DATA_LOSS, "DIGEST_MISMATCH"),
        (operator.PromotePolicy(promote(policy="toy")), grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND"),
        (operator.PromotePolicy(promote(policy="wrong", version=1)), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        (operator.UnloadPolicy(unload(policy="toy")), grpc.StatusCode.FAILED_PRECONDITION, "LAST_VERSION"),
        (operator.RollBackPolicy(roll_back(policy="toy")), grpc.StatusCode.FAILED_PRECONDITION, "NO_PREVIOUS_VERSION"),
    ):
        status, message = await refusal_of(call)
        assert status is code, message
        assert message.startswith(f"{reason}: ")
        assert str(stage.repository) not in message
    failed = (await stage.state("wrong")).versions[0]
    assert (failed.state, failed.reason) == (FAILED, "SELF_TEST_FAILED")


@pytest.mark.parametrize(
    "method",
    [f"{ADMIN}/{name}" for name in ("ListPolicies", "LoadPolicy", "UnloadPolicy", "PromotePolicy", "RollBackPolicy")]
    + [f"{oip_schema.SERVICE.full_name}/Repository{name}" for name in ("Index", "ModelLoad", "ModelUnload")],
)
async def test_what_is_no_message_is_refused(stage: Stage, method: str) -> None:
    status, message = await refusal_of(stage.raw_call(method)(b"\xff\xff\xff", timeout=PATIENCE_S))
    assert status is grpc.StatusCode.INTERNAL
    assert message.startswith("BAD_MESSAGE: expected a ")


async def test_an_operator_who_hangs_up_leaves_the_load_to_finish(stage: Stage) -> None:
    (digest,) = stage.write("left", 1)
    call = stage.operator.LoadPolicy(admin_pb2.LoadPolicyRequest(policy="left"), timeout=PATIENCE_S)
    await until(lambda: is_being_proved(stage.repository / "left" / "1"), "the proof begins")
    call.cancel()
    await until(lambda: "left" in stage.server.supervisor.published, "the policy is published")
    state = await stage.state("left")
    assert (state.default_version, state.versions[0].bundle_digest) == (1, digest)
    again = await stage.operator.LoadPolicy(admin_pb2.LoadPolicyRequest(policy="left"), timeout=PATIENCE_S)
    assert again == state  # the place is free


def is_being_proved(bundle: Path) -> bool:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                arguments = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"lom_server.verifier" in arguments and os.fsencode(bundle) in arguments:
                return True
    return False


# Triton's own client.


@contextmanager
def refused(reason: str, status: str) -> Iterator[None]:
    with pytest.raises(InferenceServerException) as refusal:
        yield
    assert refusal.value.message().startswith(f"{reason}: ")
    assert refusal.value.status() == f"StatusCode.{status}"


async def test_triton_lists_loads_and_unloads(stage: Stage) -> None:
    stage.write("triton", 1, 2)
    stage.write("hopeless", 1, flaws=Flaws(wrong_golden=True))
    async with triton.InferenceServerClient(stage.server.admin_address) as client:

        async def index() -> set[tuple[str, str, str, str]]:
            reply = await client.get_model_repository_index()
            return {
                (model.name, model.version, model.state, model.reason)
                for model in reply.models
                if model.name in ("triton", "hopeless")
            }

        unavailable = {("triton", "1", "UNAVAILABLE", ""), ("triton", "2", "UNAVAILABLE", "")}
        assert await index() == unavailable | {("hopeless", "1", "UNAVAILABLE", "")}
        await client.load_model("triton")
        with refused("SELF_TEST_FAILED", "FAILED_PRECONDITION"):
            await client.load_model("hopeless")
        assert await index() == {
            ("triton", "1", "UNAVAILABLE", ""),
            ("triton", "2", "READY", ""),
            ("hopeless", "1", "UNAVAILABLE", "SELF_TEST_FAILED"),
        }
        stage.write("triton", 3)
        await client.load_model("triton")
        assert (await stage.state("triton")).default_version == 3
        await client.unload_model("triton", unload_dependents=True)
        assert {entry[2] for entry in await index()} == {"UNAVAILABLE"}
        with refused("MODEL_NOT_FOUND", "NOT_FOUND"):
            await client.unload_model("triton")
        with refused("BUNDLE_NOT_FOUND", "NOT_FOUND"):
            await client.load_model("unknown")


async def test_triton_can_ask_for_what_is_ready_alone(stage: Stage) -> None:
    request = oip_schema.message_type("RepositoryIndexRequest")(ready=True)
    method = f"{oip_schema.SERVICE.full_name}/RepositoryIndex"
    reply = await stage.raw_call(method)(request.SerializeToString(), timeout=PATIENCE_S)
    models = oip_schema.message_type("RepositoryIndexResponse").FromString(reply).models
    assert ("toy", "1") in {(model.name, model.version) for model in models}
    assert {model.state for model in models} == {"READY"}


async def test_a_bundle_is_taken_from_the_repository_and_from_nowhere_else(stage: Stage) -> None:
    stage.write("given", 1)
    async with triton.InferenceServerClient(stage.server.admin_address) as client:
        for options in ({"config": "{}"}, {"config": "{}", "files": {"file:1/model.onnx": b"\x08\x08"}}):
            with refused("UNKNOWN_PARAMETER", "INVALID_ARGUMENT"):
                await client.load_model("given", **options)
    assert (await stage.state("given")).default_version == 0
