"""Open Inference Protocol v2 (`inference.GRPCInferenceService`): the same answers for clients that speak it.

A model is a policy, a model's version a policy's version in decimal. Requests reach the same `PolicyService` as those
of `lom_api.v1`; what is checked here is only what this protocol adds: how arrays, options and names are written.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from lom_api.codec import CodecError, unpack_tensor
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_bundle import EXPLAIN_SUFFIX
from lom_server.batcher import Array, Priority
from lom_server.edges.authentication import Role
from lom_server.edges.listener import Call, Listener, UnaryHandler, parsed
from lom_server.edges.oip_schema import SERVICE, message_type
from lom_server.errors import PolicyError, quoted
from lom_server.metrics import Duration, PolicyStatistics
from lom_server.service import EXPLANATION_OUTPUTS, ActReply, ActRequest, PolicyService, ServedPolicy
from lom_server.status import status_of

# Classes of the private pool exist at run time only.
Message: TypeAlias = Any

SERVER_NAME = "lom"
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
EXTENSIONS = ("model_configuration", "model_repository", "parameters", "statistics")
MAX_OUTSTANDING = 64
"""Requests of one stream that are being answered; the next one is not looked at before the first of them has gone."""

_SIZED_DATATYPES = {f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)}
_DATATYPES = frozenset({*_SIZED_DATATYPES, "BOOL", "FP16", "BF16", "FP32", "FP64", "BYTES"})
_INPUT_DATATYPE = "FP32"
_INPUT_CONTENTS = "fp32_contents"
# By numpy's name: the protocol's, its field of typed contents, its name in a model's configuration.
_OUTPUT_DATATYPES: Mapping[str, tuple[str, str, str]] = {
    "float32": ("FP32", "fp32_contents", "TYPE_FP32"),
    "int32": ("INT32", "int_contents", "TYPE_INT32"),
}

_VERSION = re.compile(r"[1-9][0-9]{0,9}")
_LARGEST_MODE = 2**31 - 1
_MODES = re.compile(r"-?[0-9]{1,10}(,-?[0-9]{1,10})*")

_OWN_PREFIX = "lom_"
# The parameters of a request that mean something here, and the types that they travel as.
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "lom_variant": ("string_param",),
    "lom_contract_hash": ("string_param",),
    "lom_explain": ("bool_param",),
    "lom_mode": ("int64_param",),
    "lom_sampling_seed": ("int64_param", "uint64_param"),
    "lom_prev_mode": ("int64_param", "string_param"),
    "lom_hysteresis_width": ("double_param",),
    "lom_priority": ("string_param",),
    "timeout": ("int64_param", "uint64_param"),
}
_PRIORITIES: Mapping[str, Priority] = {"live": Priority.LIVE, "batch": Priority.BATCH}

# A well-formed question whether something is ready has an answer: no.
_NOT_READY = frozenset(
    {Reason.MODEL_NOT_FOUND, Reason.VERSION_NOT_FOUND, Reason.MODEL_LOADING, Reason.MODEL_FAILED, Reason.DRAINING}
)


class Statistics(Protocol):
    """Who has counted."""

    def statistics(self, policy: str, version: int) -> PolicyStatistics:
        """What was counted so far; zeros for what was never asked."""
        ...


class UnknownModelError(PolicyError):
    """A model that is not served here, in the words by which clients of this protocol recognise it."""

    def __str__(self) -> str:
        return f"Request for unknown model: {self.detail}"


class OpenInferenceEdge:
    """The protocol's methods, and those of its extensions that only read, on top of one `PolicyService`.

    Threads: belongs to the service's event loop.
    """

    def __init__(
        self, service: PolicyService, *, server_version: str, max_parameters: int, statistics: Statistics
    ) -> None:
        """`max_parameters` bounds those of a request, and those of each of its tensors."""
        self._service = service
        self._server_version = server_version
        self._max_parameters = max_parameters
        self._statistics = statistics

    def register(self, listener: Listener) -> None:
        """Has `listener` answer the methods; what changes a server, or its memory, is not among them."""
        at_once: Mapping[str, Callable[[Message], Message]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
        }
        listener.add_service(
            SERVICE.full_name,
            unary={method: _handler(method, answer) for method, answer in at_once.items()}
            | {"ModelInfer": self._model_infer},
            streams={"ModelStreamInfer": self._model_stream_infer},
            role=Role.ACT,
        )

    def _server_live(self, request: Message) -> Message:
        return message_type("ServerLiveResponse")(live=True)

    def _server_ready(self, request: Message) -> Message:
        return message_type("ServerReadyResponse")(
            ready=any(self._is_ready(name, "") for name in self._service.policies)
        )

    def _model_ready(self, request: Message) -> Message:
        return message_type("ModelReadyResponse")(ready=self._is_ready(request.name, request.version))

    def _is_ready(self, name: str, version: str) -> bool:
        try:
            self._find(name, version)
        except PolicyError as error:
            if error.reason in _NOT_READY:
                return False
            raise
        return True

    def _server_metadata(self, request: Message) -> Message:
        return message_type("ServerMetadataResponse")(
            name=SERVER_NAME, version=self._server_version, extensions=EXTENSIONS
        )

    def _model_metadata(self, request: Message) -> Message:
        policy = self._find(request.name, request.version)
        manifest = policy.manifest
        tensor = message_type("ModelMetadataResponse.TensorMetadata")
        return message_type("ModelMetadataResponse")(
            name=policy.name,
            versions=[str(version) for version in sorted(self._service.policies[policy.name].versions)],
            platform=PLATFORM,
            inputs=[
                tensor(name=space.name, datatype=_INPUT_DATATYPE, shape=(-1, *space.shape)) for space in manifest.inputs
            ],
            outputs=[
                tensor(name=name, datatype=datatype, shape=(-1, *shape))
                for name, (datatype, _, _), shape in _described_outputs(policy)
            ],
            properties={
                "variants": ",".join(sorted(manifest.variants)),
                "default_variant": manifest.default_variant,
                "num_components": str(manifest.num_components),
                "bundle_digest": policy.bundle_digest,
                "contract_hash": policy.contract_hash,
                "execution_provider": policy.provider,
            },
        )

    def _model_config(self, request: Message) -> Message:
        policy = self._find(request.name, request.version)
        model_input, model_output = message_type("ModelInput"), message_type("ModelOutput")
        config = message_type("ModelConfig")(
            name=policy.name,
            platform=PLATFORM,
            backend=BACKEND,
            max_batch_size=policy.max_batch_rows,
            input=[
                model_input(name=space.name, data_type="TYPE_FP32", dims=space.shape)
                for space in policy.manifest.inputs
            ],
            output=[
                model_output(name=name, data_type=data_type, dims=shape)
                for name, (_, _, data_type), shape in _described_outputs(policy)
            ],
            dynamic_batching=message_type("ModelDynamicBatching")(),
        )
        return message_type("ModelConfigResponse")(config=config)

    def _model_statistics(self, request: Message) -> Message:
        if request.name:
            policy = self._find(request.name, request.version)
            asked = [
                (policy.name, version)
                for version in sorted(self._service.policies[policy.name].versions)
                if not request.version or version == policy.version
            ]
        else:
            asked = self._served()
        return message_type("ModelStatisticsResponse")(
            model_stats=[_statistics_message(*served, self._statistics.statistics(*served)) for served in asked]
        )

    def _repository_index(self, request: Message) -> Message:
        if request.repository_name:
            raise PolicyError(
                Reason.UNSUPPORTED,
                f"repository_name: expected none, as there is one, got {quoted(request.repository_name)}",
            )
        index = message_type("RepositoryIndexResponse.ModelIndex")
        models = [index(name=name, version=str(version), state="READY") for name, version in self._served()]
        if not request.ready:
            models += [
                index(
                    name=name, state="LOADING" if reason is Reason.MODEL_LOADING else "UNAVAILABLE", reason=str(reason)
                )
                for name, reason in self._service.missing.items()
            ]
        return message_type("RepositoryIndexResponse")(models=models)

    def _served(self) -> list[tuple[str, int]]:
        return [
            (name, version) for name, policy in self._service.policies.items() for version in sorted(policy.versions)
        ]

    def _find(self, name: str, version: str) -> ServedPolicy:
        if not name:
            raise PolicyError(Reason.MISSING_MODEL, "model name: expected a name, got none")
        if version and not _VERSION.fullmatch(version):
            raise PolicyError(
                Reason.BAD_VERSION, f"model version: expected a decimal number of 1 or more, got {quoted(version)}"
            )
        try:
            return self._service.find(name, int(version or 0))
        except PolicyError as error:
            if error.reason is Reason.MODEL_NOT_FOUND:
                raise UnknownModelError(error.reason, error.detail) from None
            raise

    async def _model_infer(self, message: bytes, call: Call) -> bytes:
        deadline_ns = call.admit()
        request = self._parsed(message)
        return _serialised(await self._infer(request, deadline_ns, call.client))

    async def _model_stream_infer(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
        """Answers in the order of the requests: clients of this protocol count on it, as not all of them set an id."""
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_OUTSTANDING)

        async def accept() -> None:
            try:
                async for message in messages:
                    await room.acquire()
                    answers.put_nowait(asyncio.create_task(self._answer_in_stream(message, call)))
            finally:
                answers.put_nowait(None)

        accepting = asyncio.create_task(accept())
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                room.release()
            await accepting
        finally:
            accepting.cancel()
            while not answers.empty():
                if (answer := answers.get_nowait()) is not None:
                    answer.cancel()

    async def _answer_in_stream(self, message: bytes, call: Call) -> bytes:
        response_type = message_type("ModelStreamInferResponse")
        request_id = ""
        try:
            deadline_ns = call.admit()
            request = self._parsed(message)
            request_id = request.id
            return _serialised(response_type(infer_response=await self._infer(request, deadline_ns, call.client)))
        except Exception as error:
            # The id tells a caller whose requests are several which one it was.
            return _serialised(response_type(error_message=status_of(error).message, infer_response={"id": request_id}))

    def _parsed(self, message: bytes) -> Message:
        with self._service.counting_refusals():
            return parsed(message_type("ModelInferRequest"), message)

    async def _infer(self, request: Message, deadline_ns: int, client: str) -> Message:
        arrived_ns = time.monotonic_ns()
        with self._service.counting_refusals(request.model_name):
            policy = self._find(request.model_name, request.model_version)
            options = self._options(request.parameters, _PARAMETERS)
            deadline_ns = _shortened(deadline_ns, arrived_ns, options)
            # Of a million tensors, one more than the policy has is enough for the service to see what is wrong.
            tensors = request.inputs[: len(policy.manifest.inputs) + 1]
            act_request = _act_request(policy, _inputs(request, tensors), options, client)
            offered = _offered_outputs(policy, act_request)
            requested = request.outputs[: len(offered) + 1]
            names = _checked_names([output.name for output in requested], offered)
            for tensor in (*tensors, *requested):
                self._options(tensor.parameters, {})
        return _response(request, await self._service.act(act_request, deadline_ns), names)

    def _options(self, parameters: Mapping[str, Message], known: Mapping[str, tuple[str, ...]]) -> Mapping[str, Any]:
        """The values of the `known` parameters, by key; unknown ones of ours are refused, others are not looked at.

        A typo must not move a robot.
        """
        if len(parameters) > self._max_parameters:
            raise PolicyError(
                Reason.TOO_MANY_PARAMETERS,
                f"parameters: expected at most {self._max_parameters}, got {len(parameters)}",
            )
        values = {}
        for key, parameter in parameters.items():
            if key not in known:
                if key.startswith(_OWN_PREFIX):
                    expected = ", ".join(name for name in known if name.startswith(_OWN_PREFIX))
                    raise PolicyError(
                        Reason.UNKNOWN_PARAMETER,
                        f"parameter {quoted(key)}: expected {expected or 'none of these on a tensor'}",
                    )
                continue
            kind = parameter.WhichOneof("parameter_choice")
            if kind not in known[key]:
                raise _bad_option(key, " or ".join(known[key]), kind or "no value")
            values[key] = getattr(parameter, kind)
        return values


def _handler(method: str, answer: Callable[[Message], Message]) -> UnaryHandler:
    request_type = message_type(f"{method}Request")

    async def handle(message: bytes, _: Call) -> bytes:
        return _serialised(answer(parsed(request_type, message)))

    return handle


def _serialised(message: Message) -> bytes:
    content: bytes = message.SerializeToString()
    return content


def _act_request(
    policy: ServedPolicy, inputs: Sequence[tuple[str, Array]], options: Mapping[str, Any], client: str
) -> ActRequest:
    # No more than the service takes: an array without columns has as many rows as its sender likes.
    count = min(len(inputs[0][1]), policy.max_batch_rows) if inputs else 0
    return ActRequest(
        policy=policy.name,
        version=policy.version,
        inputs=inputs,
        variant=options.get("lom_variant", ""),
        contract_hash=options.get("lom_contract_hash", ""),
        explain=options.get("lom_explain", False),
        mode=options.get("lom_mode"),
        sampling_seed=_sampling_seed(options),
        previous_mode=_previous_mode(options, count),
        hysteresis_width=options.get("lom_hysteresis_width", 0.0),
        priority=_priority(options),
        client=client,
    )


def _bad_option(key: str, expected: str, got: object) -> PolicyError:
    return PolicyError(Reason.BAD_OPTION, f"parameter {key}: expected {expected}, got {got}")


def _sampling_seed(options: Mapping[str, Any]) -> int | None:
    seed: int | None = options.get("lom_sampling_seed")
    if seed is not None and seed < 0:
        raise _bad_option("lom_sampling_seed", "0 or more", seed)
    return seed


def _previous_mode(options: Mapping[str, Any], count: int) -> Array | None:
    """int32[B] of one mode for all rows, or of a text with one for each."""
    value: int | str | None = options.get("lom_prev_mode")
    if value is None:
        return None
    if isinstance(value, str):
        if value.count(",") + 1 != count or not _MODES.fullmatch(value):
            raise _bad_option(
                "lom_prev_mode", f"{count} modes with commas between them, one for each row", quoted(value)
            )
        modes = [int(mode) for mode in value.split(",")]
    else:
        modes = [value] * count
    if any(not -1 <= mode <= _LARGEST_MODE for mode in modes):
        raise _bad_option("lom_prev_mode", "-1, or a mode, for each row", quoted(str(value)))
    return np.array(modes, dtype=np.int32)


def _priority(options: Mapping[str, Any]) -> Priority:
    name = options.get("lom_priority", "live")
    if name not in _PRIORITIES:
        raise _bad_option("lom_priority", " or ".join(_PRIORITIES), quoted(name))
    return _PRIORITIES[name]


def _shortened(deadline_ns: int, arrived_ns: int, options: Mapping[str, Any]) -> int:
    """The earlier of the call's deadline and the request's own `timeout`, in microseconds; 0 stands for none."""
    timeout_us: int = options.get("timeout", 0)
    if timeout_us < 0:
        raise _bad_option("timeout", "0 or more", timeout_us)
    return min(deadline_ns, arrived_ns + 1000 * timeout_us) if timeout_us else deadline_ns


def _inputs(request: Message, tensors: Sequence[Message]) -> list[tuple[str, Array]]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise PolicyError(
            Reason.SIZE_MISMATCH,
            f"raw_input_contents: expected {len(request.inputs)} entries, one for each input, got {len(raw)}",
        )
    return [_unpacked(tensor, raw[index] if raw else None) for index, tensor in enumerate(tensors)]


def _unpacked(tensor: Message, raw: bytes | None) -> tuple[str, Array]:
    """Name and array of a tensor whose data is `raw`, or else in its `contents`."""
    if tensor.datatype != _INPUT_DATATYPE:
        is_known = tensor.datatype in _DATATYPES
        raise _bad_tensor(
            tensor, Reason.BAD_DTYPE if is_known else Reason.UNKNOWN_DTYPE, _INPUT_DATATYPE, quoted(tensor.datatype)
        )
    if raw is None:
        data = _typed_data(tensor)
    elif tensor.HasField("contents"):
        raise _bad_tensor(tensor, Reason.BAD_OPTION, "contents or raw_input_contents", "both")
    else:
        data = raw
    try:
        return tensor.name, unpack_tensor(
            policy_pb2.Tensor(dtype=policy_pb2.DATA_TYPE_FLOAT32, shape=tensor.shape, data=data)
        )
    except CodecError as error:
        raise PolicyError(error.reason, f"input {quoted(tensor.name)}: {error.detail}") from None


def _typed_data(tensor: Message) -> bytes:
    if not tensor.HasField("contents"):
        raise PolicyError(
            Reason.MISSING_INPUT,
            f"input {quoted(tensor.name)}: unable to find data: expected contents or raw_input_contents, got neither",
        )
    fields = [field.name for field, _ in tensor.contents.ListFields()]
    if fields and fields != [_INPUT_CONTENTS]:
        raise _bad_tensor(tensor, Reason.BAD_DTYPE, f"{_INPUT_CONTENTS} alone", " and ".join(fields))
    values = tensor.contents.fp32_contents
    return np.fromiter(values, "<f4", len(values)).tobytes()


def _bad_tensor(tensor: Message, reason: Reason, expected: str, got: str) -> PolicyError:
    return PolicyError(reason, f"input {quoted(tensor.name)}: expected {expected}, got {got}")


def _offered_outputs(policy: ServedPolicy, request: ActRequest) -> tuple[str, ...]:
    """Names of what a reply to `request` holds; none where there is no graph for it, which the service then refuses."""
    variant = request.variant or policy.manifest.default_variant
    lane = policy.lanes.get(variant + EXPLAIN_SUFFIX if request.has_mode_options else variant)
    if lane is None:
        return ()
    scores = [name for name, warning in policy.manifest.warnings.items() if variant in warning.thresholds]
    names = ("action", "mode", "margin", *scores, *(EXPLANATION_OUTPUTS if request.explain else ()))
    return tuple(name for name in names if name in lane.outputs)


def _checked_names(requested: Sequence[str], offered: Sequence[str]) -> Sequence[str]:
    """What to answer with, in the order asked for; everything where nothing is."""
    if not requested or not offered:
        return offered
    for index, name in enumerate(requested):
        if name not in offered:
            raise PolicyError(Reason.UNKNOWN_OUTPUT, f"output {quoted(name)}: expected one of {', '.join(offered)}")
        if name in requested[:index]:
            raise PolicyError(Reason.UNKNOWN_OUTPUT, f"output {quoted(name)}: expected it once")
    return requested


def _described_outputs(policy: ServedPolicy) -> list[tuple[str, tuple[str, str, str], tuple[int, ...]]]:
    """Name, datatype and shape without the batch axis of what a request without options is answered with."""
    return [
        (
            name,
            _OUTPUT_DATATYPES["int32" if name == "mode" else "float32"],
            policy.manifest.action.shape if name == "action" else (),
        )
        for name in _offered_outputs(policy, ActRequest(policy=policy.name, inputs=()))
    ]


def _response(request: Message, reply: ActReply, names: Sequence[str]) -> Message:
    """In the form of the request: raw answers raw data, typed contents answer typed contents."""
    arrays: Mapping[str, Array | None] = {
        "action": reply.action,
        "mode": reply.mode,
        "margin": reply.margin,
        **{name: score.values for name, score in reply.scores.items()},
        **reply.explanation,
    }
    response = message_type("ModelInferResponse")(
        model_name=reply.policy, model_version=str(reply.version), id=request.id
    )
    for name in names:
        array = arrays[name]
        assert array is not None, f"{name} is offered where there is none"
        datatype, contents, _ = _OUTPUT_DATATYPES[array.dtype.name]
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if request.raw_input_contents:
            response.raw_output_contents.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        else:
            getattr(output.contents, contents).extend(array.ravel().tolist())
    parameters = response.parameters
    parameters["lom_variant"].string_param = reply.variant
    parameters["lom_bundle_digest"].string_param = reply.bundle_digest
    parameters["lom_clamped"].bool_param = reply.is_clamped
    parameters["lom_warns"].string_param = ",".join(name for name, score in reply.scores.items() if score.warns.any())
    parameters["lom_queue_ns"].int64_param = reply.queue_ns
    parameters["lom_inference_ns"].int64_param = reply.inference_ns
    parameters["lom_batch_rows"].int64_param = reply.batch_rows
    return response


def _statistics_message(name: str, version: int, statistics: PolicyStatistics) -> Message:
    duration, batch = message_type("StatisticDuration"), message_type("InferBatchStatistics")

    def message(value: Duration) -> Message:
        return duration(count=value.count, ns=value.ns)

    return message_type("ModelStatistics")(
        name=name,
        version=str(version),
        last_inference=statistics.last_answer_ms,
        inference_count=statistics.answered.count,
        execution_count=sum(run.count for run in statistics.runs.values()),
        inference_stats=message_type("InferStatistics")(
            success=message(statistics.answered),
            fail=message(statistics.refused),
            queue=message(statistics.queued),
            compute_infer=message(statistics.inferred),
        ),
        batch_stats=[
            batch(batch_size=rows, compute_infer=message(run)) for rows, run in sorted(statistics.runs.items())
        ],
    )
