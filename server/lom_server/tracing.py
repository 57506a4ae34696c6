"""Spans for OpenTelemetry that continue the trace of whoever called.

The only file that imports OpenTelemetry, an optional part of an installation: to be imported where traces are asked for
and nowhere else. Where spans go is what the standard OTEL_* environment variables say.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points

import grpc

from lom_api.reasons import Reason
from lom_server.errors import StartError, quoted
from lom_server.service import ActReply, ActRequest, Observer
from lom_server.status import Status

try:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import Span, SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError:
    raise StartError("TRACING_UNAVAILABLE", "traces: expected what pip install 'lom[tracing]' installs") from None

SERVICE_NAME = "lom-serve"

# What the conventions for gRPC call an error of a server; everything else was the caller's.
_SERVER_ERRORS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)


class ServerSpan:
    """The span of one RPC."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._code = grpc.StatusCode.OK

    def set_refused(self, status: Status) -> None:
        """Ends as `status` says, instead of OK."""
        self._code = status.code
        self._span.set_attribute("error.type", str(status.reason))
        if status.code in _SERVER_ERRORS:
            self._span.set_status(StatusCode.ERROR, str(status.reason))

    def set_cancelled(self) -> None:
        """Ends as CANCELLED: the caller no longer wants to know."""
        self._code = grpc.StatusCode.CANCELLED

    @property
    def code(self) -> str:
        """The gRPC status so far."""
        return self._code.name


class Tracer:
    """Makes spans and hands them to OpenTelemetry, which exports them in a thread of its own.

    Threads: any.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("lom_server")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def start_span(self, method: str, metadata: Mapping[str, str]) -> Iterator[ServerSpan]:
        """Around the handling of one RPC; the current span of everything that runs inside.

        Args:
            method: package.Service/Method.
            metadata: of the call; its `traceparent`, where there is a sound one, names the parent.
        """
        with self._tracer.start_as_current_span(
            method,
            context=self._propagator.extract(metadata),
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
            # An exception's text may hold what its caller sent.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            server_span = ServerSpan(span)
            try:
                yield server_span
            except asyncio.CancelledError:
                server_span.set_cancelled()
                raise
            finally:
                span.set_attribute("rpc.response.status_code", server_span.code)

    def observing(self, observer: Observer) -> Observer:
        """An observer that makes a span of every request for an action, inside its RPC's, and tells `observer` too.

        A stream is one RPC with many of them.
        """
        return _TracingObserver(self, observer)

    def record_request(self, attributes: Mapping[str, str | int], total_ns: int) -> None:
        """A span that took the last `total_ns`, inside the current one."""
        end_ns = time.time_ns()
        span = self._tracer.start_span("lom.act", start_time=end_ns - total_ns, attributes=dict(attributes))
        span.end(end_ns)

    def close(self) -> None:
        """Exports what is left. Blocks."""
        self._provider.shutdown()


class _TracingObserver:
    def __init__(self, tracer: Tracer, observer: Observer) -> None:
        self._tracer = tracer
        self._observer = observer

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        self._observer.answered(request, reply, total_ns)
        self._tracer.record_request(
            {
                "lom.policy": reply.policy,
                "lom.version": reply.version,
                "lom.variant": reply.variant,
                "lom.bundle_digest": reply.bundle_digest,
                "lom.rows": len(reply.action),
                "lom.batch_rows": reply.batch_rows,
                "lom.queue_ns": reply.queue_ns,
                "lom.inference_ns": reply.inference_ns,
            },
            total_ns,
        )

    def refused(self, policy: str, reason: Reason) -> None:
        self._observer.refused(policy, reason)
        self._tracer.record_request({"lom.policy": policy, "error.type": str(reason)}, 0)


def create_tracer() -> Tracer:
    """A tracer as the OTEL_* environment variables describe it.

    Raises:
        StartError: TRACING_UNAVAILABLE, where OTEL_TRACES_EXPORTER (by default `otlp`) names none that is installed.
    """
    name = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    installed = entry_points(group="opentelemetry_traces_exporter")
    if name not in installed.names:
        raise StartError(
            "TRACING_UNAVAILABLE",
            f"OTEL_TRACES_EXPORTER: expected one of {', '.join(sorted(installed.names))}, got {quoted(name)}",
        )
    named = Resource.create().merge(Resource({"service.name": SERVICE_NAME}))
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(installed[name].load()()))
    return Tracer(provider)
