"""tritonclient, unmodified and in the same process, against a real listener: over TCP and over a Unix socket."""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc as triton
from tritonclient.grpc import aio as triton_aio
from tritonclient.utils import InferenceServerException

from lom_bundle import SpaceSpec
from lom_server.batcher import Lane, MicroBatcher
from lom_server.config import ServerConfig
from lom_server.edges.listener import Listener, ListenerLimits
from lom_server.edges.open_inference import OpenInferenceEdge
from lom_server.loading import load_policy
from lom_server.metrics import RequestMetrics
from lom_server.service import PolicyService, PolicyVersions, ServedPolicy
from tests.support.bundles import (
    COMPONENT_MEANS,
    POLICY,
    actor_action,
    golden_observations,
    greedy_action,
    greedy_margin,
    greedy_mode,
    toy_manifest,
)
from tests.support.engines import BurningEngine
from tests.support.servers import wait_until

PATIENCE_S = 20.0
ROWS = golden_observations()
HELD = "held"


def held_policy(engine: BurningEngine) -> ServedPolicy:
    lane = Lane(engine=engine, graph="actor", outputs=("action",), inline_rows=0)
    return ServedPolicy(
        name=HELD,
        version=1,
        manifest=replace(
            toy_manifest(policy=HELD, default_variant="actor"),
            action=SpaceSpec(name="action", shape=(3,), low=(-10.0,) * 3, high=(10.0,) * 3),
        ),
        bundle_digest="0" * 64,
        lanes={"actor": lane},
        provider="CPUExecutionProvider",
        max_batch_rows=16,
    )


class Server:
    """The protocol's service over a toy policy and one that can be held, on an event loop in a thread of its own."""

    def __init__(self, bundle: Path, address: str) -> None:
        self.engine = BurningEngine()
        self._bundle = bundle
        self._address = address
        self._stop = asyncio.Event()
        self._ready: Future[str] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    def start(self) -> None:
        self._thread.start()
        self.address = self._ready.result(PATIENCE_S)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            config = ServerConfig(models=self._bundle, default_deadline_s=10)
            batcher = MicroBatcher(max_batch_rows=config.max_batch_rows, max_queue_rows=config.max_queue_rows)
            self.batcher = batcher
            metrics = RequestMetrics()
            service = PolicyService(batcher=batcher, observer=metrics)
            policy = load_policy(POLICY, 1, self._bundle, config).policy
            service.publish(POLICY, PolicyVersions(versions={1: policy}, default_version=1))
            metrics.publish(POLICY, service.policies[POLICY])
            service.publish(HELD, PolicyVersions(versions={1: held_policy(self.engine)}, default_version=1))
            listener = Listener(ListenerLimits.of(config))
            OpenInferenceEdge(
                service, server_version="1.2.3", max_parameters=config.max_parameters, statistics=metrics
            ).register(listener)
            self._ready.set_result(await listener.listen(self._address))
        except BaseException as error:
            self._ready.set_exception(error)
            raise
        await self._stop.wait()
        await listener.drain(0)
        batcher.close()


@pytest.fixture(scope="module", params=["tcp", "unix"])
def server(
    request: pytest.FixtureRequest, toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    socket = tmp_path_factory.mktemp("socket") / "oip"
    server = Server(toy_bundle, "127.0.0.1:0" if request.param == "tcp" else f"unix:{socket}")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def address(server: Server) -> str:
    return server.address


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address) as client:
        yield client


def observation_input(observation: Any = ROWS, datatype: str = "FP32") -> list[Any]:
    tensor = triton.InferInput("observation", list(observation.shape), datatype)
    tensor.set_data_from_numpy(observation)
    return [tensor]


def outputs(*names: str) -> list[Any]:
    return [triton.InferRequestedOutput(name) for name in names]


def assert_greedy(result: Any, observation: Any = ROWS) -> None:
    np.testing.assert_array_equal(result.as_numpy("action"), greedy_action(observation))
    np.testing.assert_array_equal(result.as_numpy("mode"), greedy_mode(observation))
    assert result.as_numpy("mode").dtype == np.int32
    np.testing.assert_allclose(result.as_numpy("margin"), greedy_margin(observation), rtol=1e-6)


def test_who_is_there(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(POLICY)
    assert client.is_model_ready(POLICY, "1")
    assert not client.is_model_ready(POLICY, "2")
    assert not client.is_model_ready("other")
    server = client.get_server_metadata(as_json=True)
    assert (server["name"], server["version"]) == ("lom", "1.2.3")
    model = client.get_model_metadata(POLICY, as_json=True)
    assert model["inputs"] == [{"name": "observation", "datatype": "FP32", "shape": ["-1", "3"]}]
    assert [tensor["name"] for tensor in model["outputs"]] == ["action", "mode", "margin", "state_score"]
    config = client.get_model_config(POLICY).config
    assert (config.name, config.max_batch_size, config.backend) == (POLICY, 1024, "onnxruntime")
    assert [(entry.name, list(entry.dims)) for entry in config.input] == [("observation", [3])]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    index = client.get_model_repository_index(as_json=True)
    assert index == {"models": [{"name": name, "version": "1", "state": "READY"} for name in (POLICY, HELD)]}


def test_infer(client: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert_greedy(client.infer(POLICY, observation_input()))
    chosen = client.infer(
        POLICY, observation_input(), "1", outputs("margin", "action"), request_id="17", client_timeout=PATIENCE_S
    )
    response = chosen.get_response()
    assert [output.name for output in response.outputs] == ["margin", "action"]
    assert (response.model_name, response.model_version, response.id) == (POLICY, "1", "17")
    assert chosen.as_numpy("mode") is None
    np.testing.assert_array_equal(chosen.as_numpy("action"), greedy_action(ROWS))
    assert capfd.readouterr() == ("", "")


def test_every_type_of_parameter(client: Any) -> None:
    result = client.infer(
        POLICY,
        observation_input(),
        parameters={
            "lom_explain": True,
            "lom_prev_mode": ",".join(["2"] * len(ROWS)),
            "lom_hysteresis_width": 10.0,
            "lom_sampling_seed": 3,
            "somebody_elses": "ignored",
        },
    )
    np.testing.assert_array_equal(result.as_numpy("mode"), [2] * len(ROWS))
    assert result.as_numpy("component_means").shape == (len(ROWS), 3, 2)
    assert not np.array_equal(result.as_numpy("action"), np.broadcast_to(COMPONENT_MEANS[2], (len(ROWS), 2)))
    acted = client.infer(
        POLICY,
        observation_input(),
        priority=1,
        timeout=10_000_000,
        parameters={"lom_variant": "actor", "lom_contract_hash": toy_manifest().contract_hash},
    )
    np.testing.assert_allclose(acted.as_numpy("action"), actor_action(ROWS), rtol=1e-6)
    parameters = acted.get_response().parameters
    assert parameters["lom_variant"].string_param == "actor"
    assert parameters["lom_batch_rows"].int64_param == len(ROWS)
    assert not parameters["lom_clamped"].bool_param


def test_rule_12_our_keys_are_none_that_the_client_keeps_for_itself(client: Any) -> None:
    for key in ("priority", "timeout", "triton_x"):
        with pytest.raises(InferenceServerException, match="reserved parameter"):
            client.infer(POLICY, observation_input(), parameters={key: 1})
    client.infer(POLICY, observation_input(), parameters={"lom_mode": 1})


def test_statistics(client: Any) -> None:
    (before,) = client.get_inference_statistics(POLICY).model_stats
    client.infer(POLICY, observation_input())
    with pytest.raises(InferenceServerException):
        client.infer(POLICY, [])
    (after,) = client.get_inference_statistics(POLICY, "1").model_stats
    assert (after.name, after.version) == (POLICY, "1")
    assert after.inference_count - before.inference_count == 1
    assert after.execution_count - before.execution_count == 1
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert after.last_inference > 0
    assert [batch.batch_size for batch in after.batch_stats if batch.batch_size == len(ROWS)] == [len(ROWS)]


def test_async_infer(client: Any) -> None:
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    for row in ROWS:
        client.async_infer(
            POLICY, observation_input(row[np.newaxis]), callback=lambda result, error: answers.put((result, error))
        )
    results = [answers.get(timeout=PATIENCE_S) for _ in ROWS]
    assert all(error is None for _, error in results)
    actions = sorted(result.as_numpy("action")[0].tolist() for result, _ in results)
    assert actions == sorted(greedy_action(ROWS).tolist())


def test_stream(client: Any) -> None:
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for number, row in enumerate(ROWS):
        client.async_stream_infer(POLICY, observation_input(row[np.newaxis]), request_id=str(number))
        if number == 7:
            client.async_stream_infer("other", observation_input())
            client.async_stream_infer(POLICY, observation_input(), enable_empty_final_response=True, timeout=10**7)
    received = [answers.get(timeout=PATIENCE_S) for _ in range(len(ROWS) + 2)]
    client.stop_stream()
    (nothing, error), (of_all_rows, _) = received[8:10]
    assert nothing is None
    assert error.message().startswith("Request for unknown model")
    assert_greedy(of_all_rows)
    for row, (result, _) in zip(ROWS, received[:8] + received[10:], strict=True):
        assert_greedy(result, row[np.newaxis])
    ids = [result.get_response().id for result, _ in received[:8] + received[10:]]
    assert ids == [str(number) for number in range(len(ROWS))]


async def test_aio(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_model_ready(POLICY)
        results = await asyncio.gather(
            *(client.infer(POLICY, observation_input(row[np.newaxis]), client_timeout=PATIENCE_S) for row in ROWS)
        )
        for row, result in zip(ROWS, results, strict=True):
            assert_greedy(result, row[np.newaxis])
        with pytest.raises(InferenceServerException) as error:
            await client.infer("other", observation_input())
        assert error.value.status() == "StatusCode.NOT_FOUND"


async def test_aio_stream(address: str) -> None:
    async def requests() -> Any:
        for row in ROWS:
            yield {"model_name": POLICY, "inputs": observation_input(row[np.newaxis])}
        yield {"model_name": POLICY, "inputs": observation_input(ROWS[:, :2].copy())}

    async with triton_aio.InferenceServerClient(address) as client:
        received = [answer async for answer in client.stream_infer(requests())]
    *good, (nothing, error) = received
    for row, (result, no_error) in zip(ROWS, good, strict=True):
        assert no_error is None
        assert_greedy(result, row[np.newaxis])
    assert nothing is None
    assert error.message().startswith("BAD_SHAPE: ")


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model_name": "other"}, "NOT_FOUND", "Request for unknown model"),
        ({"model_version": "7"}, "NOT_FOUND", "VERSION_NOT_FOUND: "),
        ({"inputs": observation_input(ROWS.astype(np.float64), "FP64")}, "INVALID_ARGUMENT", "BAD_DTYPE: "),
        ({"inputs": observation_input(np.full((2, 3), b"x"), "BYTES")}, "INVALID_ARGUMENT", "BAD_DTYPE: "),
        ({"inputs": observation_input(ROWS * np.inf)}, "INVALID_ARGUMENT", "NON_FINITE: "),
        ({"inputs": observation_input() * 2}, "INVALID_ARGUMENT", "DUPLICATE_INPUT: "),
        ({"inputs": []}, "INVALID_ARGUMENT", "MISSING_INPUT: "),
        ({"outputs": outputs("q")}, "INVALID_ARGUMENT", "UNKNOWN_OUTPUT: "),
        ({"parameters": {"lom_mode": "1"}}, "INVALID_ARGUMENT", "BAD_OPTION: "),
        ({"parameters": {"lom_mod": 1}}, "INVALID_ARGUMENT", "UNKNOWN_PARAMETER: "),
        ({"parameters": {f"key {index}": 1 for index in range(33)}}, "INVALID_ARGUMENT", "TOO_MANY_PARAMETERS: "),
        ({"parameters": {"lom_contract_hash": "0"}}, "FAILED_PRECONDITION", "CONTRACT_MISMATCH: "),
        ({"timeout": 1}, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED: "),
    ],
)
def test_errors(client: Any, change: dict[str, Any], status: str, message: str) -> None:
    arguments = {"model_name": POLICY, "inputs": observation_input()} | change
    with pytest.raises(InferenceServerException) as error:
        client.infer(**arguments, client_timeout=PATIENCE_S)
    assert error.value.status() == f"StatusCode.{status}"
    assert error.value.message().startswith(message)


def test_a_client_timeout_is_a_deadline(server: Server, client: Any) -> None:
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    first = len(server.engine.batches)
    server.engine.gate.clear()
    try:
        client.async_infer(HELD, observation_input(ROWS[:1]), lambda result, error: answers.put((result, error)))
        wait_until(lambda: len(server.engine.batches) == first + 1, "the engine to start")
        with pytest.raises(InferenceServerException) as error:
            client.infer(HELD, observation_input(ROWS[:2]), client_timeout=0.1)
        assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        # The caller's clock may be the first to say so.
        wait_until(lambda: server.batcher.waiting_rows == 0, "the expired request to leave")
    finally:
        server.engine.gate.set()
    answers.get(timeout=PATIENCE_S)
    client.infer(HELD, observation_input(ROWS[:3]))
    assert [len(batch) for batch in server.engine.batches[first:]] == [1, 3]


def test_what_the_server_does_not_do(client: Any) -> None:
    calls: Sequence[Callable[[], object]] = (
        lambda: client.load_model(POLICY),
        lambda: client.unload_model(POLICY),
        lambda: client.register_system_shared_memory("region", "/key", 4),
        lambda: client.get_trace_settings(),
        lambda: client.get_log_settings(),
    )
    for call in calls:
        with pytest.raises(InferenceServerException) as error:
            call()
        assert error.value.status() == "StatusCode.UNIMPLEMENTED"


def test_shared_memory_is_not_read(client: Any) -> None:
    tensor = triton.InferInput("observation", [1, 3], "FP32")
    tensor.set_shared_memory("region", 12)
    with pytest.raises(InferenceServerException) as error:
        client.infer(POLICY, [tensor])
    assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "unable to find data" in error.value.message()
