"""`lom_server.edges.open_inference` through real sockets and real graphs, each rule of the protocol on its own."""

import asyncio
import re
import resource
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from lom_api.reasons import Reason
from lom_bundle import SpaceSpec
from lom_server.batcher import Lane, MicroBatcher
from lom_server.config import ServerConfig
from lom_server.edges.authentication import Role
from lom_server.edges.listener import Call, Listener, ListenerLimits
from lom_server.edges.oip_schema import SERVICE, message_type
from lom_server.edges.open_inference import MAX_OUTSTANDING, OpenInferenceEdge
from lom_server.errors import PolicyError
from lom_server.loading import load_policy
from lom_server.metrics import Duration, PolicyStatistics
from lom_server.service import ActReply, ActRequest, PolicyService, PolicyVersions, ServedPolicy
from tests.support.bundles import (
    COMPONENT_LOG_STD,
    COMPONENT_MEANS,
    POLICY,
    Flaws,
    golden_observations,
    greedy_action,
    greedy_margin,
    greedy_mode,
    state_score,
    toy_manifest,
    write_test_bundle,
)
from tests.support.engines import BurningEngine

PATIENCE_S = 20.0
MAX_BATCH_ROWS = 16
MAX_PARAMETERS = 10
OBSERVATION = np.array([[0.1, 0.3, 0.2]], dtype=np.float32)  # mode 1, margin 0.1, action (0, 0.25), state_score 0.6
BY_ACTOR = "by-actor"

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE

CLEAN_MESSAGE = re.compile(r"(?:[A-Z][A-Z_]+: |Request for unknown model: )[ -~]+")
UNCLEAN = re.compile(r"Traceback|\.py\b|0x[0-9a-f]{4,}|<class|Error\b|Exception|onnxruntime|/tmp/|/home/|site-packages")


class FixedStatistics:
    """Numbers that tell policies and versions apart."""

    def statistics(self, policy: str, version: int) -> PolicyStatistics:
        return PolicyStatistics(
            last_answer_ms=1_700_000_000_000 + version,
            answered=Duration(count=7, ns=700),
            refused=Duration(count=2, ns=20),
            queued=Duration(count=7, ns=70),
            inferred=Duration(count=7, ns=350),
            runs={4: Duration(count=1, ns=200), 1: Duration(count=3, ns=150)},
        )


def edge_of(service: PolicyService) -> OpenInferenceEdge:
    return OpenInferenceEdge(
        service, server_version="1.2.3", max_parameters=MAX_PARAMETERS, statistics=FixedStatistics()
    )


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, PolicyVersions]:
    """`toy` in the versions 2 and 10, told apart by an offset of their actions, and one that acts by its actor."""
    folder = tmp_path_factory.mktemp("bundles")

    def load(name: str, version: int, **options: Any) -> ServedPolicy:
        path = folder / f"{name}-{version}"
        write_test_bundle(path, policy=name, **options)
        return load_policy(name, version, path, ServerConfig(models=path, max_batch_rows=MAX_BATCH_ROWS)).policy

    return {
        POLICY: PolicyVersions(
            versions={10: load(POLICY, 10), 2: load(POLICY, 2, flaws=Flaws(action_offset=0.25, nan_above=100.0))},
            default_version=10,
        ),
        BY_ACTOR: PolicyVersions(versions={1: load(BY_ACTOR, 1, default_variant="actor")}, default_version=1),
    }


class Observations:
    """What an observer of the service is told."""

    def __init__(self) -> None:
        self.answers: list[ActRequest] = []
        self.refusals: list[tuple[str, Reason]] = []

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        self.answers.append(request)

    def refused(self, policy: str, reason: Reason) -> None:
        self.refusals.append((policy, reason))


class Stage:
    """A service behind a real listener, and a channel to it."""

    def __init__(self) -> None:
        self.batcher = MicroBatcher(max_batch_rows=MAX_BATCH_ROWS, max_queue_rows=4096)
        self.observations = Observations()
        self.service = PolicyService(batcher=self.batcher, observer=self.observations)
        self.listener = Listener(ListenerLimits.of(ServerConfig(models=Path("models"), default_deadline_s=10)))
        edge_of(self.service).register(self.listener)

    async def listen(self, address: str = "127.0.0.1:0") -> str:
        self.address = await self.listener.listen(address)
        self.channel: Any = grpc.aio.insecure_channel(self.address)
        return self.address

    async def close(self) -> None:
        await self.channel.close()
        await self.listener.drain(0)
        self.batcher.close()

    async def ask(self, method: str, message: Any = None, **options: Any) -> Any:
        message = message_type(f"{method}Request")() if message is None else message
        raw = message if isinstance(message, bytes) else message.SerializeToString()
        call = self.channel.unary_unary(f"/{SERVICE.full_name}/{method}")(raw, timeout=PATIENCE_S, **options)
        return message_type(f"{method}Response").FromString(await call)

    async def infer(self, message: Any = None, **options: Any) -> Any:
        return await self.ask("ModelInfer", infer_request() if message is None else message, **options)

    def stream(self) -> Any:
        return self.channel.stream_stream(f"/{SERVICE.full_name}/ModelStreamInfer")(timeout=PATIENCE_S)


@pytest.fixture
async def stage(policies: Mapping[str, PolicyVersions]) -> AsyncIterator[Stage]:
    stage = Stage()
    for name, policy in policies.items():
        stage.service.publish(name, policy)
    await stage.listen()
    yield stage
    await stage.close()


@asynccontextmanager
async def burning_stage() -> AsyncIterator[tuple[Stage, BurningEngine]]:
    """A stage whose only policy answers twice the observation, and can be held."""
    stage, engine = Stage(), BurningEngine()
    doubled = SpaceSpec(name="action", shape=(3,), low=(-10.0,) * 3, high=(10.0,) * 3)
    lane = Lane(engine=engine, graph="actor", outputs=("action",), inline_rows=0)
    policy = ServedPolicy(
        name=POLICY,
        manifest=replace(toy_manifest(default_variant="actor"), action=doubled),
        bundle_digest="0" * 64,
        lanes={"actor": lane},
        provider="CPUExecutionProvider",
        max_batch_rows=MAX_BATCH_ROWS,
        version=1,
    )
    stage.service.publish(POLICY, PolicyVersions(versions={1: policy}, default_version=1))
    await stage.listen()
    try:
        yield stage, engine
    finally:
        engine.gate.set()
        await stage.close()


async def until(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain: {what}"
        await asyncio.sleep(0.002)


def infer_request(
    observation: Any = OBSERVATION,
    *,
    raw: bool = True,
    parameters: Mapping[str, tuple[str, Any]] | None = None,
    outputs: Sequence[str] = (),
    **fields: Any,
) -> Any:
    """`parameters` by key: the field of the parameter, e.g. `int64_param`, and its value."""
    array = np.asarray(observation, dtype="<f4")
    request = message_type("ModelInferRequest")(**{"model_name": POLICY} | fields)
    tensor = request.inputs.add(name="observation", datatype="FP32", shape=array.shape)
    if raw:
        request.raw_input_contents.append(array.tobytes())
    else:
        tensor.contents.fp32_contents.extend(array.ravel().tolist())
    for key, (field, value) in (parameters or {}).items():
        setattr(request.parameters[key], field, value)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def changed(request: Any, change: Callable[[Any], object]) -> Any:
    change(request)
    return request


def with_shape(*shape: int) -> Any:
    return changed(infer_request(), lambda request: request.inputs[0].shape.__setitem__(slice(None), shape))


def with_datatype(datatype: str, raw: bytes = b"") -> Any:
    request = infer_request()
    request.inputs[0].datatype = datatype
    if raw:
        request.raw_input_contents[0] = raw
    return request


def option(key: str, field: str, value: Any, **fields: Any) -> Any:
    return infer_request(parameters={key: (field, value)}, **fields)


def arrays_of(response: Any) -> dict[str, Any]:
    """The outputs by name, read as a client reads raw data."""
    dtypes = {"FP32": "<f4", "INT32": "<i4"}
    return {
        output.name: np.frombuffer(data, dtypes[output.datatype]).reshape(tuple(output.shape))
        for output, data in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def values_of(parameters: Any) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in parameters.items()}


def assert_clean(text: str) -> None:
    assert CLEAN_MESSAGE.fullmatch(text), text
    assert len(text) <= 256
    assert not UNCLEAN.search(text), text


async def refusal(stage: Stage, method: str, message: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stage.ask(method, message)
    text = str(error.value.details())
    assert_clean(text)
    return error.value.code(), text


# Who is there.


async def test_the_server_says_who_it_is(stage: Stage) -> None:
    assert (await stage.ask("ServerLive")).live
    assert (await stage.ask("ServerReady")).ready
    metadata = await stage.ask("ServerMetadata")
    assert (metadata.name, metadata.version) == ("lom", "1.2.3")
    assert set(metadata.extensions) == {"model_configuration", "model_repository", "parameters", "statistics"}


async def test_the_server_is_ready_once_something_can_be_asked_for(policies: Mapping[str, PolicyVersions]) -> None:
    stage = Stage()
    await stage.listen()
    assert not (await stage.ask("ServerReady")).ready
    stage.service.withdraw(POLICY, Reason.MODEL_LOADING)
    assert not (await stage.ask("ServerReady")).ready
    assert (await stage.ask("ServerLive")).live
    stage.service.publish(POLICY, policies[POLICY])
    assert (await stage.ask("ServerReady")).ready
    await stage.close()


async def test_whether_a_model_is_ready(stage: Stage) -> None:
    stage.service.withdraw("loading", Reason.MODEL_LOADING)
    stage.service.withdraw("failed", Reason.MODEL_FAILED)
    ready = {
        (POLICY, ""): True, (POLICY, "2"): True, (POLICY, "10"): True, (POLICY, "3"): False, ("other", ""): False,
        ("loading", ""): False, ("failed", ""): False,
    }  # fmt: skip
    for (name, version), expected in ready.items():
        request = message_type("ModelReadyRequest")(name=name, version=version)
        assert (await stage.ask("ModelReady", request)).ready is expected, (name, version)


async def test_a_draining_server_is_live_and_not_ready(stage: Stage) -> None:
    stage.service.drain()
    assert (await stage.ask("ServerLive")).live
    assert not (await stage.ask("ServerReady")).ready
    assert not (await stage.ask("ModelReady", message_type("ModelReadyRequest")(name=POLICY))).ready
    code, text = await refusal(stage, "ModelInfer", infer_request())
    assert code is UNAVAILABLE
    assert text.startswith("DRAINING: ")


async def test_a_models_metadata(stage: Stage, policies: Mapping[str, PolicyVersions]) -> None:
    metadata = await stage.ask("ModelMetadata", message_type("ModelMetadataRequest")(name=POLICY))
    assert (metadata.name, list(metadata.versions), metadata.platform) == (POLICY, ["2", "10"], "onnxruntime_onnx")
    described = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs]
    assert described == [("observation", "FP32", [-1, 3])]
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.outputs] == [
        ("action", "FP32", [-1, 2]),
        ("mode", "INT32", [-1]),
        ("margin", "FP32", [-1]),
        ("state_score", "FP32", [-1]),
    ]
    assert dict(metadata.properties) == {
        "variants": "actor,greedy_mode",
        "default_variant": "greedy_mode",
        "num_components": "3",
        "bundle_digest": policies[POLICY].versions[10].bundle_digest,
        "contract_hash": toy_manifest().contract_hash,
        "execution_provider": "CPUExecutionProvider",
    }
    of_version_2 = await stage.ask("ModelMetadata", message_type("ModelMetadataRequest")(name=POLICY, version="2"))
    assert of_version_2.properties["bundle_digest"] == policies[POLICY].versions[2].bundle_digest


async def test_a_client_that_asks_for_everything_in_the_metadata_is_answered(stage: Stage) -> None:
    """Load tools do just that."""
    for name in (POLICY, BY_ACTOR):
        metadata = await stage.ask("ModelMetadata", message_type("ModelMetadataRequest")(name=name))
        names = [tensor.name for tensor in metadata.outputs]
        response = await stage.infer(infer_request(model_name=name, outputs=names))
        for tensor, output in zip(metadata.outputs, response.outputs, strict=True):
            assert (output.name, output.datatype) == (tensor.name, tensor.datatype)
            assert list(output.shape) == [1, *tensor.shape[1:]]


async def test_a_models_configuration(stage: Stage) -> None:
    config = (await stage.ask("ModelConfig", message_type("ModelConfigRequest")(name=POLICY))).config
    assert (config.name, config.platform, config.backend) == (POLICY, "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == MAX_BATCH_ROWS
    fp32, int32 = 11, 8
    assert [(entry.name, entry.data_type, list(entry.dims)) for entry in config.input] == [("observation", fp32, [3])]
    assert [(entry.name, entry.data_type, list(entry.dims)) for entry in config.output] == [
        ("action", fp32, [2]),
        ("mode", int32, []),
        ("margin", fp32, []),
        ("state_score", fp32, []),
    ]
    assert config.HasField("dynamic_batching")
    by_actor = (await stage.ask("ModelConfig", message_type("ModelConfigRequest")(name=BY_ACTOR))).config
    assert [entry.name for entry in by_actor.output] == ["action", "state_score"]


async def test_the_index_lists_what_is_served_and_what_should_be(stage: Stage) -> None:
    stage.service.withdraw("loading", Reason.MODEL_LOADING)
    stage.service.withdraw("failed", Reason.MODEL_FAILED)

    async def index(**fields: Any) -> set[tuple[str, str, str, str]]:
        response = await stage.ask("RepositoryIndex", message_type("RepositoryIndexRequest")(**fields))
        return {(model.name, model.version, model.state, model.reason) for model in response.models}

    ready = {(POLICY, "2", "READY", ""), (POLICY, "10", "READY", ""), (BY_ACTOR, "1", "READY", "")}
    missing = {("loading", "", "LOADING", "MODEL_LOADING"), ("failed", "", "UNAVAILABLE", "MODEL_FAILED")}
    assert await index() == ready | missing
    assert await index(ready=True) == ready
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await index(repository_name="elsewhere")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert str(error.value.details()).startswith("UNSUPPORTED: repository_name: ")


async def test_statistics(stage: Stage) -> None:
    async def statistics(**fields: Any) -> list[Any]:
        response = await stage.ask("ModelStatistics", message_type("ModelStatisticsRequest")(**fields))
        return list(response.model_stats)

    assert [(entry.name, entry.version) for entry in await statistics()] == [
        (POLICY, "2"), (POLICY, "10"), (BY_ACTOR, "1"),
    ]  # fmt: skip
    assert [entry.version for entry in await statistics(name=POLICY)] == ["2", "10"]
    (entry,) = await statistics(name=POLICY, version="2")
    assert (entry.name, entry.version, entry.last_inference) == (POLICY, "2", 1_700_000_000_002)
    assert (entry.inference_count, entry.execution_count) == (7, 4)
    stats = entry.inference_stats
    assert (stats.success.count, stats.success.ns, stats.fail.count, stats.fail.ns) == (7, 700, 2, 20)
    assert (stats.queue.count, stats.queue.ns, stats.compute_infer.count, stats.compute_infer.ns) == (7, 70, 7, 350)
    batches = [(batch.batch_size, batch.compute_infer.count, batch.compute_infer.ns) for batch in entry.batch_stats]
    assert batches == [(1, 3, 150), (4, 1, 200)]


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"])
async def test_questions_about_a_model_refuse_names_that_are_none(stage: Stage, method: str) -> None:
    request = message_type(f"{method}Request")
    bad = [(request(name="../x"), "BAD_MODEL_NAME: "), (request(name=POLICY, version="x"), "BAD_VERSION: ")]
    if method != "ModelStatistics":  # there, no name stands for all
        bad.append((request(), "MISSING_MODEL: "))
    for message, start in bad:
        code, text = await refusal(stage, method, message)
        assert code is INVALID
        assert text.startswith(start)
    if method != "ModelReady":
        code, text = await refusal(stage, method, request(name="other"))
        assert code is NOT_FOUND
        assert text.startswith("Request for unknown model")


@pytest.mark.parametrize(
    "method",
    ["RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus", "SystemSharedMemoryRegister",
     "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings"],
)  # fmt: skip
async def test_what_changes_the_server_or_its_memory_is_not_here(stage: Stage, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stage.channel.unary_unary(f"/{SERVICE.full_name}/{method}")(b"", timeout=PATIENCE_S)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


# The data rules.


async def test_answers_are_the_hand_worked_ones(stage: Stage, policies: Mapping[str, PolicyVersions]) -> None:
    observation = golden_observations()
    response = await stage.infer(infer_request(observation, id="episode 3"))
    arrays = arrays_of(response)
    assert list(arrays) == ["action", "mode", "margin", "state_score"]
    np.testing.assert_array_equal(arrays["action"], greedy_action(observation))
    np.testing.assert_array_equal(arrays["mode"], greedy_mode(observation))
    np.testing.assert_allclose(arrays["margin"], greedy_margin(observation), rtol=1e-6)
    np.testing.assert_allclose(arrays["state_score"], state_score(observation), rtol=1e-6)
    assert (response.model_name, response.model_version, response.id) == (POLICY, "10", "episode 3")
    parameters = values_of(response.parameters)
    assert parameters.pop("lom_inference_ns") > 0
    assert parameters.pop("lom_queue_ns") >= 0
    assert parameters == {
        "lom_variant": "greedy_mode",
        "lom_bundle_digest": policies[POLICY].versions[10].bundle_digest,
        "lom_clamped": False,
        "lom_warns": "",
        "lom_batch_rows": len(observation),
    }


async def test_rule_1_row_major_little_endian(stage: Stage) -> None:
    request = infer_request(np.zeros((2, 3)), parameters={"lom_variant": ("string_param", "actor")})
    request.raw_input_contents[0] = struct.pack("<6f", 0.2, 0.4, 0, -0.6, 0.8, 0)
    response = await stage.infer(request)
    assert response.raw_output_contents[0] == struct.pack("<4f", 0.1, 0.2, -0.3, 0.4)
    assert [output.name for output in response.outputs] == ["action", "state_score"]
    with_modes = await stage.infer(infer_request([[0, 1, 0], [0, 0, 1]], outputs=["mode"]))
    assert with_modes.raw_output_contents[0] == struct.pack("<2i", 1, 2)


async def test_rule_2_one_raw_entry_for_each_input(stage: Stage) -> None:
    too_many = changed(infer_request(), lambda request: request.raw_input_contents.append(b""))
    too_few = changed(infer_request(), lambda request: request.inputs.add(name="x", datatype="FP32", shape=[1]))
    for request, counts in ((too_many, "expected 1 entries, one for each input, got 2"), (too_few, "2 entries")):
        code, text = await refusal(stage, "ModelInfer", request)
        assert code is INVALID
        assert text.startswith("SIZE_MISMATCH: raw_input_contents: ")
        assert counts in text


async def test_rule_3_not_both_kinds_of_data(stage: Stage) -> None:
    request = changed(infer_request(raw=False), lambda request: request.raw_input_contents.append(b"\0" * 12))
    code, text = await refusal(stage, "ModelInfer", request)
    assert code is INVALID
    assert text == "BAD_OPTION: input 'observation': expected contents or raw_input_contents, got both"


async def test_rule_4_some_data(stage: Stage) -> None:
    request = changed(infer_request(), lambda request: request.ClearField("raw_input_contents"))
    code, text = await refusal(stage, "ModelInfer", request)
    assert code is INVALID
    assert text.startswith("MISSING_INPUT: input 'observation': unable to find data")


async def test_rule_5_the_field_of_the_datatype(stage: Stage) -> None:
    request = changed(infer_request(raw=False), lambda request: request.inputs[0].contents.Clear())
    request.inputs[0].contents.fp64_contents.extend([0.1, 0.3, 0.2])
    code, text = await refusal(stage, "ModelInfer", request)
    assert code is INVALID
    assert text == "BAD_DTYPE: input 'observation': expected fp32_contents alone, got fp64_contents"
    beside = changed(infer_request(raw=False), lambda request: request.inputs[0].contents.int_contents.append(1))
    code, text = await refusal(stage, "ModelInfer", beside)
    assert code is INVALID
    assert text.startswith("BAD_DTYPE: ")
    assert "got int_contents and fp32_contents" in text


async def test_rule_5_as_many_elements_as_the_shape_has(stage: Stage) -> None:
    for elements in ([], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]):
        request = changed(infer_request(raw=False), lambda request: request.inputs[0].contents.Clear())
        request.inputs[0].contents.SetInParent()
        request.inputs[0].contents.fp32_contents.extend(elements)
        code, text = await refusal(stage, "ModelInfer", request)
        assert code is INVALID
        assert text == f"SIZE_MISMATCH: input 'observation': expected 12 bytes, got {4 * len(elements)}"


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
async def test_rule_6_half_precision_is_not_typed(stage: Stage, datatype: str) -> None:
    request = changed(infer_request(raw=False), lambda request: setattr(request.inputs[0], "datatype", datatype))
    code, text = await refusal(stage, "ModelInfer", request)
    assert code is INVALID
    assert text == f"BAD_DTYPE: input 'observation': expected FP32, got '{datatype}'"


async def test_rule_7_the_outputs_asked_for_in_that_order(stage: Stage) -> None:
    response = await stage.infer(infer_request(outputs=["margin", "action"]))
    assert list(arrays_of(response)) == ["margin", "action"]
    np.testing.assert_allclose(arrays_of(response)["margin"], [0.1], rtol=1e-6)
    np.testing.assert_array_equal(arrays_of(response)["action"], [[0.0, 0.25]])
    for outputs, start in (
        (["q"], "UNKNOWN_OUTPUT: output 'q': expected one of action, mode, margin, state_score"),
        (["action", "hyper_q"], "UNKNOWN_OUTPUT: output 'hyper_q': "),
        (["action"] * 2, "UNKNOWN_OUTPUT: output 'action': expected it once"),
        (["action"] * 100_000, "UNKNOWN_OUTPUT: output 'action': expected it once"),
    ):
        code, text = await refusal(stage, "ModelInfer", infer_request(outputs=outputs))
        assert code is INVALID
        assert text.startswith(start)


async def test_rule_7_the_actor_has_no_mode(stage: Stage) -> None:
    by_actor = {"lom_variant": ("string_param", "actor")}
    assert list(arrays_of(await stage.infer(infer_request(parameters=by_actor)))) == ["action", "state_score"]
    for name in ("mode", "margin"):
        code, text = await refusal(stage, "ModelInfer", infer_request(parameters=by_actor, outputs=[name]))
        assert code is INVALID
        assert text == f"UNKNOWN_OUTPUT: output '{name}': expected one of action, state_score"


async def test_rule_8_id_and_version(stage: Stage) -> None:
    assert (await stage.infer()).id == ""
    assert (await stage.infer(infer_request(id="\n" + "x" * 100))).id == "\n" + "x" * 100
    assert (await stage.infer()).model_version == "10"
    older = await stage.infer(infer_request(model_version="2"))
    assert older.model_version == "2"
    np.testing.assert_array_equal(arrays_of(older)["action"], [[0.25, 0.5]])


async def test_rule_9_an_answer_has_the_form_of_its_request(stage: Stage) -> None:
    explained = {"lom_explain": ("bool_param", True)}
    raw = await stage.infer(infer_request(parameters=explained))
    assert len(raw.raw_output_contents) == len(raw.outputs) == 8
    assert not any(output.HasField("contents") for output in raw.outputs)
    typed = await stage.infer(infer_request(raw=False, parameters=explained))
    assert not typed.raw_output_contents
    for output in typed.outputs:
        array = arrays_of(raw)[output.name]
        assert tuple(output.shape) == array.shape
        field = "int_contents" if output.name == "mode" else "fp32_contents"
        assert [descriptor.name for descriptor, _ in output.contents.ListFields()] == [field]
        np.testing.assert_array_equal(getattr(output.contents, field), array.ravel())


BAD_TENSORS: Mapping[str, tuple[Any, str]] = {
    "zero rows": (with_shape(0, 3), "SIZE_MISMATCH: "),
    "zero rows without data": (infer_request(np.zeros((0, 3))), "EMPTY_BATCH: "),
    "zero features": (infer_request(np.zeros((1, 0))), "BAD_SHAPE: input 'observation': expected [3] per row, got [0]"),
    "negative dim": (with_shape(-1, 3), "BAD_DIM: input 'observation': expected dimensions of 0 or more, got -1"),
    "overflow": (with_shape(2**30, 2**30, 2**30), "SHAPE_OVERFLOW: "),
    "2**31 rows": (with_shape(2**31, 3), "SHAPE_OVERFLOW: "),
    "no dims": (with_shape(), "BAD_RANK: "),
    "nine dims": (with_shape(1, 3, *[1] * 7), "BAD_RANK: "),
    "flat": (with_shape(3), "BAD_RANK: input 'observation': expected 2 dimensions, got 1"),
    "transposed": (with_shape(3, 1), "BAD_SHAPE: input 'observation': expected [3] per row, got [1]"),
    "a byte short": (with_datatype("FP32", b"\0" * 11), "SIZE_MISMATCH: input 'observation': expected 12 bytes, g"),
    "float64": (with_datatype("FP64", b"\0" * 24), "BAD_DTYPE: input 'observation': expected FP32, got 'FP64'"),
    "int32": (with_datatype("INT32"), "BAD_DTYPE: "),
    "bytes": (with_datatype("BYTES"), "BAD_DTYPE: "),
    "numpy's name": (with_datatype("float32"), "UNKNOWN_DTYPE: input 'observation': expected FP32, got 'float32'"),
    "no datatype": (with_datatype(""), "UNKNOWN_DTYPE: "),
    "too many rows": (
        infer_request(np.zeros((MAX_BATCH_ROWS + 1, 3))),
        "BATCH_TOO_LARGE: input 'observation': expected at most 16 rows, got 17",
    ),
    "NaN": (infer_request([[0, np.nan, 0]]), "NON_FINITE: input 'observation': "),
    "another name": (
        changed(infer_request(), lambda request: setattr(request.inputs[0], "name", "state\n")),
        r"UNKNOWN_INPUT: input 'state\n': expected one of 'observation'",
    ),
    "no inputs": (message_type("ModelInferRequest")(model_name=POLICY), "MISSING_INPUT: input 'observation'"),
    "the same input twice": (
        message_type("ModelInferRequest")(
            model_name=POLICY, inputs=list(infer_request().inputs) * 2, raw_input_contents=[b"\0" * 12] * 2
        ),
        "DUPLICATE_INPUT: input 'observation'",
    ),
    "the same input 50,000 times": (
        message_type("ModelInferRequest")(
            model_name=POLICY, inputs=list(infer_request().inputs) * 50_000, raw_input_contents=[b"\0" * 12] * 50_000
        ),
        "DUPLICATE_INPUT: input 'observation'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
async def test_rule_10_a_tensor_is_the_metadatas(stage: Stage, name: str) -> None:
    message, start = BAD_TENSORS[name]
    code, text = await refusal(stage, "ModelInfer", message)
    assert code is INVALID
    assert text.startswith(start)


async def test_what_is_too_many_is_not_looked_at(stage: Stage) -> None:
    """A message has room for a million tensors, each of which would cost as much as a good one."""
    request = infer_request()
    for name, datatype in (("x", "FP32"), ("y", "no such")):
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        request.raw_input_contents.append(b"\0" * 4)
    _, text = await refusal(stage, "ModelInfer", request)
    assert text.startswith("UNKNOWN_INPUT: input 'x': ")
    contradiction = option("lom_mode", "int64_param", 0, model_name=BY_ACTOR, outputs=["action", "action"])
    contradiction.outputs[1].parameters["lom_mode"].int64_param = 1
    _, text = await refusal(stage, "ModelInfer", contradiction)
    assert text.startswith("BAD_OPTION: variant 'actor': ")


async def test_rule_11_unknown_parameters(stage: Stage) -> None:
    response = await stage.infer(
        infer_request(parameters={"sequence_id": ("int64_param", 3), "triton_x": ("bool_param", True)})
    )
    assert "sequence_id" not in response.parameters
    code, text = await refusal(stage, "ModelInfer", option("lom_modes", "int64_param", 1))
    assert code is INVALID
    assert text.startswith("UNKNOWN_PARAMETER: parameter 'lom_modes': expected lom_variant, lom_contract_hash, ")


async def test_rule_11_an_option_of_a_tensor_is_a_typo(stage: Stage) -> None:
    for part in ("inputs", "outputs"):
        request = infer_request(outputs=["action"])
        getattr(request, part)[0].parameters["classification"].int64_param = 1
        await stage.infer(request)
        getattr(request, part)[0].parameters["lom_mode"].int64_param = 1
        code, text = await refusal(stage, "ModelInfer", request)
        assert code is INVALID
        assert text == "UNKNOWN_PARAMETER: parameter 'lom_mode': expected none of these on a tensor"


WRONG_TYPES = {
    "lom_variant": ("int64_param", 1),
    "lom_contract_hash": ("bool_param", True),
    "lom_explain": ("int64_param", 1),
    "lom_mode": ("uint64_param", 1),
    "lom_sampling_seed": ("double_param", 1.0),
    "lom_prev_mode": ("double_param", 1.0),
    "lom_hysteresis_width": ("int64_param", 1),
    "lom_priority": ("int64_param", 0),
    "timeout": ("string_param", "1"),
}


@pytest.mark.parametrize("key", WRONG_TYPES)
async def test_rule_13_a_parameter_has_its_type(stage: Stage, key: str) -> None:
    code, text = await refusal(stage, "ModelInfer", option(key, *WRONG_TYPES[key]))
    assert code is INVALID
    assert re.fullmatch(rf"BAD_OPTION: parameter {key}: expected \w+_param.*, got {WRONG_TYPES[key][0]}", text)


async def test_rule_13_a_parameter_without_a_value(stage: Stage) -> None:
    request = infer_request()
    request.parameters["lom_mode"].SetInParent()
    _, text = await refusal(stage, "ModelInfer", request)
    assert text == "BAD_OPTION: parameter lom_mode: expected int64_param, got no value"


async def test_parameters_are_bounded(stage: Stage) -> None:
    carriers: Sequence[Callable[[Any], Any]] = (
        lambda request: request,
        lambda request: request.inputs[0],
        lambda request: request.outputs[0],
    )
    for carrier in carriers:
        request = infer_request(outputs=["action"])
        for index in range(MAX_PARAMETERS):
            carrier(request).parameters[f"key {index}"].bool_param = True
        await stage.infer(request)
        carrier(request).parameters["one more"].bool_param = True
        code, text = await refusal(stage, "ModelInfer", request)
        assert code is INVALID
        assert text == "TOO_MANY_PARAMETERS: parameters: expected at most 10, got 11"


# The options.


async def test_a_forced_mode(stage: Stage) -> None:
    arrays = arrays_of(await stage.infer(option("lom_mode", "int64_param", 2)))
    np.testing.assert_array_equal(arrays["action"], COMPONENT_MEANS[[2]])
    np.testing.assert_array_equal(arrays["mode"], [2])


async def test_an_explanation(stage: Stage) -> None:
    arrays = arrays_of(await stage.infer(option("lom_explain", "bool_param", True)))
    assert list(arrays) == [
        "action", "mode", "margin", "state_score",
        "hyper_q", "mixing_weights", "component_means", "component_log_stds",
    ]  # fmt: skip
    np.testing.assert_allclose(arrays["hyper_q"], OBSERVATION)
    np.testing.assert_allclose(arrays["mixing_weights"], np.full((1, 3), 1 / 3), rtol=1e-6)
    np.testing.assert_array_equal(arrays["component_means"], COMPONENT_MEANS[np.newaxis])
    np.testing.assert_array_equal(arrays["component_log_stds"], np.full((1, 3, 2), COMPONENT_LOG_STD))
    not_explained = arrays_of(await stage.infer(option("lom_explain", "bool_param", False)))
    assert list(not_explained) == ["action", "mode", "margin", "state_score"]
    some = await stage.infer(option("lom_explain", "bool_param", True, outputs=["hyper_q", "action"]))
    assert list(arrays_of(some)) == ["hyper_q", "action"]


async def test_a_sample(stage: Stage) -> None:
    async def sampled(seed: int, field: str = "int64_param") -> Any:
        return arrays_of(await stage.infer(option("lom_sampling_seed", field, seed)))["action"]

    first = await sampled(0)
    assert not np.array_equal(first, [[0.0, 0.25]])
    np.testing.assert_array_equal(first, await sampled(0, "uint64_param"))
    assert not np.array_equal(first, await sampled(2**64 - 1, "uint64_param"))


@pytest.mark.parametrize(
    ("previous", "mode"),
    [(("int64_param", 2), [2, 2]), (("string_param", "2,-1"), [2, 1]), (("string_param", "-1,2"), [1, 2])],
)
async def test_hysteresis(stage: Stage, previous: tuple[str, Any], mode: list[int]) -> None:
    """Two equal rows whose own mode, 1, is better than mode 2 by 0.1."""
    observation = np.repeat(OBSERVATION, 2, axis=0)
    options = {"lom_prev_mode": previous, "lom_hysteresis_width": ("double_param", 0.2)}
    arrays = arrays_of(await stage.infer(infer_request(observation, parameters=options)))
    np.testing.assert_array_equal(arrays["mode"], mode)
    np.testing.assert_array_equal(arrays["action"], COMPONENT_MEANS[mode])
    options["lom_hysteresis_width"] = ("double_param", 0.05)
    arrays = arrays_of(await stage.infer(infer_request(observation, parameters=options)))
    np.testing.assert_array_equal(arrays["mode"], [1, 1])


async def test_a_previous_mode_of_rows_that_are_not_there(stage: Stage) -> None:
    """The array is sound and empty; one number for each of its rows would be sixteen gigabytes."""
    request = option("lom_prev_mode", "int64_param", 1)
    request.inputs[0].shape[:] = [2**31 - 1, 0]
    request.raw_input_contents[0] = b""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, text = await refusal(stage, "ModelInfer", request)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 64 * 1024
    assert code is INVALID
    assert text == "BAD_SHAPE: input 'observation': expected [3] per row, got [0]"


async def test_a_contract(stage: Stage) -> None:
    await stage.infer(option("lom_contract_hash", "string_param", toy_manifest().contract_hash))
    code, text = await refusal(stage, "ModelInfer", option("lom_contract_hash", "string_param", "f" * 64))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert text.startswith("CONTRACT_MISMATCH: ")


BAD_OPTIONS: Mapping[str, tuple[str, str, Any, str]] = {
    "unknown variant": ("lom_variant", "string_param", "best", "UNKNOWN_VARIANT: variant: expected one of "),
    "mode too high": ("lom_mode", "int64_param", 3, "BAD_OPTION: mode: expected 0 to 2, got 3"),
    "mode beyond int32": ("lom_mode", "int64_param", 2**62, "BAD_OPTION: mode: "),
    "negative mode": ("lom_mode", "int64_param", -1, "BAD_OPTION: mode: "),
    "negative seed": ("lom_sampling_seed", "int64_param", -1, "BAD_OPTION: parameter lom_sampling_seed: expected 0"),
    "previous mode too high": ("lom_prev_mode", "int64_param", 3, "BAD_OPTION: previous mode: expected -1 to 2"),
    "previous mode beyond int32": ("lom_prev_mode", "int64_param", 2**40, "BAD_OPTION: parameter lom_prev_mode: "),
    "previous mode below -1": ("lom_prev_mode", "int64_param", -2, "BAD_OPTION: parameter lom_prev_mode: "),
    "a previous mode too many": ("lom_prev_mode", "string_param", "1,1", "BAD_OPTION: parameter lom_prev_mode: "),
    "no previous mode": ("lom_prev_mode", "string_param", "", "BAD_OPTION: parameter lom_prev_mode: "),
    "words as previous mode": ("lom_prev_mode", "string_param", "one\n", r"BAD_OPTION: parameter lom_prev_mode: "),
    "Arabic digits": ("lom_prev_mode", "string_param", "\u0661", "BAD_OPTION: parameter lom_prev_mode: "),
    "previous mode of 5000 digits": ("lom_prev_mode", "string_param", "1" * 5000, "BAD_OPTION: parameter lom_prev"),
    "width alone": ("lom_hysteresis_width", "double_param", 0.1, "BAD_OPTION: hysteresis: "),
    "width NaN": ("lom_hysteresis_width", "double_param", float("nan"), "BAD_OPTION: hysteresis width: "),
    "priority": ("lom_priority", "string_param", "LIVE", "BAD_OPTION: parameter lom_priority: expected live or batch,"),
    "negative timeout": ("timeout", "int64_param", -1, "BAD_OPTION: parameter timeout: expected 0 or more, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
async def test_bad_options(stage: Stage, name: str) -> None:
    *parameter, start = BAD_OPTIONS[name]
    code, text = await refusal(stage, "ModelInfer", option(*parameter))
    assert code is INVALID
    assert text.startswith(start)


@pytest.mark.parametrize(
    "parameter",
    [("lom_mode", "int64_param", 0), ("lom_prev_mode", "int64_param", 0), ("lom_explain", "bool_param", True),
     ("lom_sampling_seed", "int64_param", 0)],
)  # fmt: skip
async def test_options_of_a_mode_contradict_the_actor(stage: Stage, parameter: tuple[str, str, Any]) -> None:
    for outputs in ([], ["action"]):
        code, text = await refusal(stage, "ModelInfer", option(*parameter, model_name=BY_ACTOR, outputs=outputs))
        assert code is INVALID
        assert text.startswith("BAD_OPTION: variant 'actor': ")


async def test_warnings_and_clamps_are_told(stage: Stage) -> None:
    """|1| + |0.8| + |0.8| is above the threshold of 2.5; one row of two is enough."""
    response = await stage.infer(infer_request([[1, 0.8, 0.8], [0, 0.1, 0]]))
    np.testing.assert_allclose(arrays_of(response)["state_score"], [2.6, 0.1], rtol=1e-6)
    assert values_of(response.parameters)["lom_warns"] == "state_score"
    async with burning_stage() as (burning, _):  # twice the observation, in actions of -10 to 10
        response = await burning.infer(infer_request([[6, 1, -6]]))
        assert values_of(response.parameters)["lom_clamped"] is True
        assert arrays_of(response)["action"].tolist() == [[10, 2, -10]]


async def test_priorities_reach_the_batcher() -> None:
    async with burning_stage() as (stage, engine):
        engine.gate.clear()
        running = asyncio.ensure_future(stage.infer(infer_request([[0, 0, 0]])))
        await until(lambda: len(engine.batches) == 1, "the engine to start")
        batch = asyncio.ensure_future(
            stage.infer(infer_request([[1, 1, 1]], parameters={"lom_priority": ("string_param", "batch")}))
        )
        await until(lambda: stage.batcher.waiting_rows == 1, "the batch request to wait")
        live = asyncio.ensure_future(
            stage.infer(infer_request([[2, 2, 2]], parameters={"lom_priority": ("string_param", "live")}))
        )
        await until(lambda: stage.batcher.waiting_rows == 2, "the live request to wait")
        engine.gate.set()
        await asyncio.gather(running, batch, live)
        assert [rows[:, 0].tolist() for rows in engine.batches] == [[0.0], [2.0], [1.0]]


async def test_a_timeout_is_a_deadline() -> None:
    async with burning_stage() as (stage, engine):
        engine.gate.clear()
        running = asyncio.ensure_future(stage.infer(option("timeout", "int64_param", 0)))  # stands for none
        await until(lambda: len(engine.batches) == 1, "the engine to start")
        late = asyncio.ensure_future(stage.infer(option("timeout", "int64_param", 20_000)))
        await until(lambda: stage.batcher.waiting_rows == 1, "the request to wait")
        late_by_ns = time.monotonic_ns() + 20_000_000
        await until(lambda: time.monotonic_ns() > late_by_ns, "its time to pass")
        engine.gate.set()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await late
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert str(error.value.details()).startswith("DEADLINE_EXCEEDED: ")
        await running
        assert len(engine.batches) == 1


# Refusals.


async def test_an_unknown_model_is_told_in_the_protocols_words(stage: Stage) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stage.infer(infer_request(model_name="other"))
    assert error.value.code() is NOT_FOUND
    assert str(error.value.details()) == "Request for unknown model: policy 'other' is not served here"
    trailers: Mapping[str, Any] = {str(key): value for key, value in error.value.trailing_metadata() or ()}
    status, info = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]), error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    assert info.reason == "MODEL_NOT_FOUND"


BAD_MODELS: Mapping[str, tuple[dict[str, Any], grpc.StatusCode, str]] = {
    "none": ({"model_name": ""}, INVALID, "MISSING_MODEL: "),
    "path": ({"model_name": "../x"}, INVALID, "BAD_MODEL_NAME: policy: expected [a-z0-9][a-z0-9_-]{0,63}, got '../x'"),
    "loading": ({"model_name": "loading"}, UNAVAILABLE, "MODEL_LOADING: "),
    "failed": ({"model_name": "failed"}, grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED: "),
    "unknown version": ({"model_version": "3"}, NOT_FOUND, "VERSION_NOT_FOUND: version: expected one of 2, 10, got 3"),
    "version 0": ({"model_version": "0"}, INVALID, "BAD_VERSION: model version: expected a decimal number of 1 or m"),
    "version -1": ({"model_version": "-1"}, INVALID, "BAD_VERSION: "),
    "version 02": ({"model_version": "02"}, INVALID, "BAD_VERSION: "),
    "version with a newline": ({"model_version": "2\n"}, INVALID, r"BAD_VERSION: "),
    "version 2**31": ({"model_version": str(2**31)}, INVALID, "BAD_VERSION: "),
    "version 2**63": ({"model_version": str(2**63)}, INVALID, "BAD_VERSION: "),
    "version of 5000 digits": ({"model_version": "1" * 5000}, INVALID, "BAD_VERSION: "),
    "version latest": ({"model_version": "latest"}, INVALID, "BAD_VERSION: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MODELS)
async def test_bad_models(stage: Stage, name: str) -> None:
    stage.service.withdraw("loading", Reason.MODEL_LOADING)
    stage.service.withdraw("failed", Reason.MODEL_FAILED)
    fields, expected_code, start = BAD_MODELS[name]
    code, text = await refusal(stage, "ModelInfer", infer_request(**fields))
    assert code is expected_code
    assert text.startswith(start)


@pytest.mark.parametrize(
    "message", [b"\xff\xff\xff\xff", infer_request().SerializeToString()[:-3], b"\x0a\x02\xff\xfe"]
)
async def test_bytes_that_are_no_message(stage: Stage, message: bytes) -> None:
    code, text = await refusal(stage, "ModelInfer", message)
    assert code is grpc.StatusCode.INTERNAL
    assert text == "BAD_MESSAGE: expected a inference.ModelInferRequest message"


async def test_a_model_has_to_be_named_even_where_there_is_one() -> None:
    async with burning_stage() as (stage, _):
        code, text = await refusal(stage, "ModelInfer", infer_request(model_name=""))
        assert code is INVALID
        assert text == "MISSING_MODEL: model name: expected a name, got none"


async def test_an_action_that_is_not_finite_is_never_sent(stage: Stage) -> None:
    code, text = await refusal(stage, "ModelInfer", infer_request([[101, 0, 0]], model_version="2"))
    assert code is grpc.StatusCode.INTERNAL
    assert text.startswith("NON_FINITE_ACTION: ")


async def test_every_request_is_counted_once(stage: Stage) -> None:
    await stage.infer()
    (answered,) = stage.observations.answers
    assert (answered.policy, answered.version) == (POLICY, 10)
    assert answered.client.startswith("ipv4:127.0.0.1:")
    bad_requests = [
        infer_request(model_name="other"), with_shape(), infer_request(outputs=["q"]), infer_request([[0, 0, np.inf]]),
    ]  # fmt: skip
    for request in bad_requests:
        await refusal(stage, "ModelInfer", request)
    assert stage.observations.refusals == [
        ("", Reason.MODEL_NOT_FOUND), (POLICY, Reason.BAD_RANK), (POLICY, Reason.UNKNOWN_OUTPUT),
        (POLICY, Reason.NON_FINITE),
    ]  # fmt: skip
    assert len(stage.observations.answers) == 1


# The stream.


async def test_a_stream_answers_in_the_order_of_its_requests() -> None:
    async with burning_stage() as (stage, engine):
        engine.gate.clear()
        stream = stage.stream()
        requests = [
            infer_request([[1, 0, 0]], id="a"),
            infer_request(model_name="other", id="b"),
            b"\xff\xff",
            infer_request([[2, 0, 0]], id="d"),
            infer_request([[3, 0, np.inf]], id="e"),
        ]
        for request in requests:
            await stream.write(request if isinstance(request, bytes) else request.SerializeToString())
        await stream.done_writing()
        await until(lambda: len(engine.batches) + stage.batcher.waiting_rows == 2, "both good ones to be accepted")
        engine.gate.set()
        responses = [message_type("ModelStreamInferResponse").FromString(message) async for message in stream]
        assert [response.infer_response.id for response in responses] == ["a", "b", "", "d", "e"]
        errors = [response.error_message for response in responses]
        assert [error.partition(":")[0] for error in errors] == [
            "", "Request for unknown model", "BAD_MESSAGE", "", "NON_FINITE",
        ]  # fmt: skip
        for error in filter(None, errors):
            assert_clean(error)
        assert arrays_of(responses[3].infer_response)["action"].tolist() == [[4, 0, 0]]
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_stream_answers_each_request_before_the_next_one_comes(stage: Stage) -> None:
    stream = stage.stream()
    for row in golden_observations():
        await stream.write(infer_request(row[np.newaxis]).SerializeToString())
        response = message_type("ModelStreamInferResponse").FromString(await stream.read())
        np.testing.assert_array_equal(arrays_of(response.infer_response)["action"], greedy_action(row[np.newaxis]))
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


class Handlers:
    """A listener that only keeps what is registered with it."""

    def add_service(self, name: str, *, unary: Any, streams: Any, role: Any) -> None:
        self.streams, self.role = streams, role


async def test_robots_may_ask() -> None:
    handlers: Any = Handlers()
    edge_of(PolicyService(batcher=MicroBatcher(max_batch_rows=1, max_queue_rows=1))).register(handlers)
    assert handlers.role is Role.ACT


async def test_every_request_of_a_stream_is_admitted_on_its_own(policies: Mapping[str, PolicyVersions]) -> None:
    batcher = MicroBatcher(max_batch_rows=MAX_BATCH_ROWS, max_queue_rows=4096)
    service = PolicyService(batcher=batcher)
    service.publish(POLICY, policies[POLICY])
    handlers: Any = Handlers()
    edge_of(service).register(handlers)
    charged = 0

    def charge() -> None:
        nonlocal charged
        charged += 1
        if charged == 2:
            raise PolicyError(Reason.RATE_LIMITED, "expected less", retry_after_ms=7)

    async def three() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield infer_request().SerializeToString()

    async def errors(call: Call) -> list[str]:
        answers = handlers.streams["ModelStreamInfer"](three(), call)
        return [message_type("ModelStreamInferResponse").FromString(answer).error_message async for answer in answers]

    forever_ns = 2**63 - 1
    limited = Call(deadline_ns=forever_ns, client="a test", charge=charge)
    assert await errors(limited) == ["", "RATE_LIMITED: expected less; retry_after_ms 7", ""]
    hurried = Call(deadline_ns=forever_ns, client="a test", default_budget_ns=1)
    assert [error.partition(":")[0] for error in await errors(hurried)] == ["DEADLINE_EXCEEDED"] * 3
    batcher.close()


async def test_a_stream_takes_no_more_than_it_can_answer() -> None:
    async with burning_stage() as (stage, engine):
        engine.gate.clear()
        handlers: Any = Handlers()
        edge_of(stage.service).register(handlers)
        taken = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal taken
            while True:
                taken += 1
                yield infer_request().SerializeToString()

        call = Call(deadline_ns=time.monotonic_ns() + int(PATIENCE_S * 1e9), client="a test")
        answers = handlers.streams["ModelStreamInfer"](endless(), call)
        tasks = asyncio.all_tasks()
        first = asyncio.ensure_future(anext(answers))
        await until(lambda: taken > MAX_OUTSTANDING, "the stream to be full")
        for _ in range(1000):
            await asyncio.sleep(0)
        assert taken == MAX_OUTSTANDING + 1  # the last of them in hand, not looked at
        engine.gate.set()
        await first
        await anext(answers)
        await until(lambda: taken == MAX_OUTSTANDING + 2, "an answer to make room for a request")
        await answers.aclose()
        await until(lambda: stage.batcher.waiting_rows == 0, "the rest to leave")
        await until(lambda: asyncio.all_tasks() <= tasks, "its tasks to end")


async def test_a_cancelled_stream_leaves_the_queue() -> None:
    async with burning_stage() as (stage, engine):
        engine.gate.clear()
        stream = stage.stream()
        for _ in range(5):
            await stream.write(infer_request().SerializeToString())
        await until(lambda: len(engine.batches) == 1, "the engine to start")
        running = len(engine.batches[0])
        await until(lambda: stage.batcher.waiting_rows == 5 - running, "the others to wait")
        stream.cancel()
        await until(lambda: stage.batcher.waiting_rows == 0, "them to leave")
        engine.gate.set()
        await stage.infer()
        assert [len(batch) for batch in engine.batches] == [running, 1]


async def test_a_draining_stream_is_answered_what_it_has_asked() -> None:
    async with burning_stage() as (stage, engine):
        engine.gate.clear()
        stream = stage.stream()
        for number in range(5):
            await stream.write(infer_request(id=str(number)).SerializeToString())
        await until(lambda: len(engine.batches) == 1, "the engine to start")
        running = len(engine.batches[0])
        await until(lambda: stage.batcher.waiting_rows == 5 - running, "the others to wait")
        draining = asyncio.create_task(stage.listener.drain(PATIENCE_S))
        engine.gate.set()
        responses = [message_type("ModelStreamInferResponse").FromString(await stream.read()) for _ in range(5)]
        assert [response.infer_response.id for response in responses] == ["0", "1", "2", "3", "4"]
        assert not any(response.error_message for response in responses)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stream.read()
        assert error.value.code() is UNAVAILABLE
        assert str(error.value.details()).startswith("DRAINING: ")
        assert await draining


async def test_a_message_that_cannot_be_read_is_counted(stage: Stage) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await stage.infer(b"\xff")
    stream = stage.stream()
    await stream.write(b"\xff")
    assert await stream.read() is not grpc.aio.EOF
    assert stage.observations.refusals == [("", Reason.BAD_MESSAGE)] * 2
