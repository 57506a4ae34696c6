"""`lom_server.tracing`: spans that continue the caller's trace, through a real socket."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.propagate import inject
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lom_api.reasons import Reason
from lom_server.batcher import MicroBatcher
from lom_server.config import ServerConfig
from lom_server.edges.authentication import Role
from lom_server.edges.listener import Call, Listener, ListenerLimits
from lom_server.errors import PolicyError, StartError
from lom_server.loading import load_policy
from lom_server.metrics import RequestMetrics
from lom_server.service import ActRequest, PolicyService, PolicyVersions
from lom_server.status import status_of
from lom_server.tracing import Tracer, create_tracer
from tests.support.bundles import POLICY

METHOD = "lom_api.v1.PolicyService/Act"
OBSERVATION = np.array([[0.1, 0.2, 0.3]], dtype=np.float32)


class Spans:
    """Two sides of a wire, and what each of them exported."""

    def __init__(self) -> None:
        self.client, self._client_exporter = _provider()
        provider, self._server_exporter = _provider()
        self.tracer = Tracer(provider)

    @property
    def of_client(self) -> Sequence[ReadableSpan]:
        return self._client_exporter.get_finished_spans()

    @property
    def of_server(self) -> Sequence[ReadableSpan]:
        return self._server_exporter.get_finished_spans()


def _provider() -> tuple[TracerProvider, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


@pytest.fixture
def spans() -> Spans:
    return Spans()


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


def identity(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


@pytest.fixture
async def service(toy_bundle: Path, spans: Spans) -> AsyncIterator[PolicyService]:
    loaded = load_policy(POLICY, 1, toy_bundle, ServerConfig(models=toy_bundle, provider="cpu", max_batch_rows=8))
    batcher = MicroBatcher(max_batch_rows=8, max_queue_rows=16)
    service = PolicyService(batcher=batcher, observer=spans.tracer.observing(RequestMetrics()))
    service.publish(POLICY, PolicyVersions(versions={1: loaded.policy}, default_version=1))
    yield service
    batcher.close()


def asking(**choices: Any) -> ActRequest:
    return ActRequest(**{"policy": POLICY, "inputs": [("observation", OBSERVATION)], **choices})


def deadline_ns() -> int:
    return time.monotonic_ns() + 10_000_000_000


async def test_over_a_socket_the_clients_span_is_the_parent_of_the_servers(
    service: PolicyService, spans: Spans
) -> None:
    async def act(message: bytes, context: Any) -> bytes:
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        with spans.tracer.start_span(METHOD, metadata):
            await service.act(asking(), deadline_ns())
            return message

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Act": grpc.unary_unary_rpc_method_handler(act)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("lom_api.v1.PolicyService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with spans.client.get_tracer("robot").start_as_current_span("tick"):
            carrier: dict[str, str] = {}
            inject(carrier)
            call: Any = channel.unary_unary("/" + METHOD)
            await call(b"", metadata=tuple(carrier.items()))
    await server.stop(None)

    (of_client,) = spans.of_client
    request, rpc = spans.of_server
    assert parent(rpc) == identity(of_client)
    assert parent(request) == identity(rpc)
    assert (rpc.name, rpc.kind, rpc.status.status_code) == (METHOD, SpanKind.SERVER, StatusCode.UNSET)
    assert attributes(rpc) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD,
        "rpc.response.status_code": "OK",
    }


async def test_a_request_is_a_span_with_what_it_took(service: PolicyService, spans: Spans) -> None:
    before_ns = time.time_ns()
    with spans.tracer.start_span(METHOD, {}):
        reply = await service.act(asking(), deadline_ns())
    request, _ = spans.of_server
    facts = attributes(request)
    assert facts == {
        "lom.policy": POLICY,
        "lom.version": 1,
        "lom.variant": "greedy_mode",
        "lom.bundle_digest": reply.bundle_digest,
        "lom.rows": 1,
        "lom.batch_rows": 1,
        "lom.queue_ns": reply.queue_ns,
        "lom.inference_ns": reply.inference_ns,
    }
    assert request.start_time is not None
    assert request.end_time is not None
    assert before_ns - 1_000_000 < request.start_time
    assert request.end_time - request.start_time >= reply.queue_ns + reply.inference_ns


async def test_requests_of_a_stream_are_spans_of_one_rpc(service: PolicyService, spans: Spans) -> None:
    with spans.tracer.start_span("lom_api.v1.PolicyService/ActStream", {}):
        await asyncio.gather(*(service.act(asking(), deadline_ns()) for _ in range(3)))
        with pytest.raises(PolicyError):
            await asyncio.create_task(service.act(asking(variant="made-up"), deadline_ns()))
    *requests, rpc = spans.of_server
    assert [parent(request) for request in requests] == [identity(rpc)] * 4
    assert attributes(requests[-1]) == {"lom.policy": POLICY, "error.type": "UNKNOWN_VARIANT"}


async def test_the_other_observer_is_told_too(toy_bundle: Path, spans: Spans, service: PolicyService) -> None:
    metrics = RequestMetrics()
    metrics.publish(POLICY, service.policies[POLICY])
    service.observer = spans.tracer.observing(metrics)
    await service.act(asking(), deadline_ns())
    with pytest.raises(PolicyError):
        await service.act(asking(variant="made-up"), deadline_ns())
    assert metrics.snapshot()["requests"][POLICY] == {"OK": 1, "UNKNOWN_VARIANT": 1}


@pytest.mark.parametrize(
    ("reason", "code", "is_error"),
    [
        (Reason.BAD_SHAPE, "INVALID_ARGUMENT", False),
        (Reason.QUEUE_FULL, "RESOURCE_EXHAUSTED", False),
        (Reason.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", True),
        (Reason.NON_FINITE_ACTION, "INTERNAL", True),
        (Reason.DRAINING, "UNAVAILABLE", True),
    ],
)
def test_a_refusal_ends_the_span_with_its_status(spans: Spans, reason: Reason, code: str, is_error: bool) -> None:
    with spans.tracer.start_span(METHOD, {}) as span:
        span.set_refused(status_of(PolicyError(reason, "the observation is forty-two")))
    (rpc,) = spans.of_server
    assert attributes(rpc)["rpc.response.status_code"] == code
    assert attributes(rpc)["error.type"] == reason
    assert (rpc.status.status_code is StatusCode.ERROR) is is_error
    assert "forty-two" not in rpc.to_json()


async def test_a_cancelled_call_is_a_cancelled_span(spans: Spans) -> None:
    async def handle() -> None:
        with spans.tracer.start_span(METHOD, {}):
            await asyncio.Event().wait()

    call = asyncio.create_task(handle())
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    (rpc,) = spans.of_server
    assert attributes(rpc)["rpc.response.status_code"] == "CANCELLED"
    assert rpc.status.status_code is StatusCode.UNSET


def test_an_exceptions_text_does_not_travel(spans: Spans) -> None:
    with pytest.raises(ValueError), spans.tracer.start_span(METHOD, {}):  # noqa: PT011
        raise ValueError("the observation is forty-two")
    (rpc,) = spans.of_server
    assert "forty-two" not in rpc.to_json()


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "x" * 8000])
def test_who_sends_no_sound_parent_begins_a_trace(spans: Spans, traceparent: str) -> None:
    with spans.tracer.start_span(METHOD, {"traceparent": traceparent}):
        pass
    (rpc,) = spans.of_server
    assert rpc.parent is None


def test_calls_at_the_same_time_do_not_become_each_others_parents(spans: Spans) -> None:
    async def handle() -> None:
        with spans.tracer.start_span(METHOD, {}):
            await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(handle(), handle())

    asyncio.run(both())
    assert [span.parent for span in spans.of_server] == [None, None]


# Where spans go


@pytest.mark.parametrize(
    ("environment", "service_name"), [({}, "lom-serve"), ({"OTEL_SERVICE_NAME": "robot-7"}, "robot-7")]
)
def test_the_environment_says_where_spans_go_and_from_whom(environment: Mapping[str, str], service_name: str) -> None:
    program = (
        "from lom_server.tracing import create_tracer\n"
        "tracer = create_tracer()\n"
        "with tracer.start_span('lom_api.v1.PolicyService/Act', {}):\n"
        "    pass\n"
        "tracer.close()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "console", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    span = json.loads(ended.stdout)
    assert span["name"] == METHOD
    assert span["resource"]["attributes"]["service.name"] == service_name


def test_an_exporter_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "made\nup")
    with pytest.raises(StartError, match=r"TRACING_UNAVAILABLE: OTEL_TRACES_EXPORTER: .*console.* got 'made\\nup'"):
        create_tracer()


def test_without_opentelemetry_one_line_names_the_extra() -> None:
    program = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from lom_server.errors import StartError\n"
        "try:\n"
        "    import lom_server.tracing\n"
        "except StartError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "TRACING_UNAVAILABLE: traces: expected what pip install 'lom[tracing]' installs\n"


async def test_the_listener_makes_a_span_of_every_call(spans: Spans) -> None:
    listener = Listener(ListenerLimits.of(ServerConfig(models=Path("unused"))), tracer=spans.tracer)

    async def answer(message: bytes, _: Call) -> bytes:
        if message == b"bad":
            raise PolicyError(Reason.NON_FINITE, "expected finite values")
        return message

    listener.add_service("lom_api.v1.PolicyService", unary={"Act": answer}, role=Role.ACT)
    address = await listener.listen("127.0.0.1:0")
    carrier: dict[str, str] = {}
    with spans.client.get_tracer("robot").start_as_current_span("tick"):
        inject(carrier)
        async with grpc.aio.insecure_channel(address) as channel:
            call: Any = channel.unary_unary(f"/{METHOD}")
            assert await call(b"good", metadata=tuple(carrier.items())) == b"good"
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"bad", metadata=tuple(carrier.items()))
    await listener.drain(0)
    (tick,) = spans.of_client
    good, bad = spans.of_server
    for span in (good, bad):
        assert (span.name, span.kind) == (METHOD, SpanKind.SERVER)
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == identity(tick)
    assert attributes(good)["rpc.response.status_code"] == "OK"
    assert attributes(bad)["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert attributes(bad)["error.type"] == "NON_FINITE"
