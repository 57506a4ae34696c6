"""What is counted: by a worker per answer, by the supervisor per worker, and as Prometheus reads it.

Workers count in plain numbers and lists; a snapshot of them is plain JSON that travels to the supervisor, is summed
there, and only there turns into text. So the path of an answer meets no lock, and a scrape meets no worker.

No label comes from a caller: policies, versions, variants and scores are those of the loaded table, and no more than
`MAX_POLICIES` x `MAX_VERSIONS` of them. What is beyond is counted with an empty `policy`.
"""

import copy
import functools
import math
import os
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, Self, TypeAlias, TypedDict, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from lom_api.reasons import Reason
from lom_server.config import host_and_port
from lom_server.errors import StartError, log_incident
from lom_server.service import ActReply, ActRequest, PolicyVersions

OK = "OK"
MAX_POLICIES = 64
MAX_VERSIONS = 16

DURATION_BOUNDS_NS = tuple(
    1000 * microseconds
    for microseconds in (100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000)
)
BATCH_BOUNDS = tuple(2**power for power in range(17))
# Hyper-Q units, which are the environment's returns: their scale is not known here.
MARGIN_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

_PHASES = ("queue", "inference", "total")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SILENCE_LIMIT_S = 2.0
_MAX_SCRAPES = 8
_POLL_S = 0.1

_VARIANT_LABELS = ("policy", "version", "variant")

_Number = TypeVar("_Number", int, float)
_Version: TypeAlias = "tuple[str, int]"
_Variant: TypeAlias = "tuple[str, int, str]"


class Histogram(TypedDict):
    """How many values lie in each bucket, the last of them unbounded, and their sum."""

    buckets: list[float]
    sum: float


class VariantCounts(TypedDict):
    """What one variant of one version answered; all of it only ever grows.

    Attributes:
        last_ms: Unix time of the last answer; 0 before the first.
        queue, inference, total: by answer, nanoseconds.
        batches: rows of each run of the engine; the sum is the rows that were answered. Of a run that several requests
            shared, every answer counts its share, so that whole runs come out.
        batch_ns: nanoseconds of the runs in each bucket of `batches`.
        margin: by row, where there was a runner-up.
        modes: rows by the component that acted.
        mode_switches: rows whose previous mode was told and was another one.
        forced_modes: rows that were to act by a given component.
        clamped: answers whose action had to be cut to the action space.
        warnings: rows worth a warning, by score.
    """

    policy: str
    version: int
    variant: str
    last_ms: int
    queue: Histogram
    inference: Histogram
    total: Histogram
    batches: Histogram
    batch_ns: list[float]
    margin: Histogram
    modes: list[float]
    mode_switches: int
    forced_modes: int
    clamped: int
    warnings: dict[str, int]


class ServedVersion(TypedDict):
    """What can be asked for."""

    policy: str
    version: int
    digest: str
    provider: str
    default_variant: str
    is_default: bool


class Snapshot(TypedDict):
    """All that was counted so far, as plain JSON.

    Attributes:
        requests: by policy, by `OK` or reason.
        refusals: by reason; these stay when a policy is forgotten.
        loads: by `OK` or reason.
        counters, gauges: plain numbers of processes; a process that is gone leaves its counters only.
    """

    variants: list[VariantCounts]
    served: list[ServedVersion]
    requests: dict[str, dict[str, int]]
    refusals: dict[str, int]
    loads: dict[str, int]
    counters: dict[str, float]
    gauges: dict[str, float]


def empty_snapshot() -> Snapshot:
    """Nothing was counted yet."""
    return Snapshot(variants=[], served=[], requests={}, refusals={}, loads={}, counters={}, gauges={})


def merge(a: Snapshot, b: Snapshot) -> Snapshot:
    """Both together, sharing nothing with either; no more policies and versions than are exposed."""
    variants: dict[_Variant, VariantCounts] = {}
    for counts in (*a["variants"], *b["variants"]):
        key = (counts["policy"], counts["version"], counts["variant"])
        variants[key] = _summed_variants(variants[key], counts) if key in variants else copy.deepcopy(counts)
    served = {(entry["policy"], entry["version"]): entry.copy() for entry in a["served"]}
    for entry in b["served"]:
        known = served.setdefault((entry["policy"], entry["version"]), entry.copy())
        known["is_default"] |= entry["is_default"]
    ranked = ((counts["policy"], counts["version"], counts["last_ms"]) for counts in variants.values())
    kept = _kept_versions(ranked, served)
    listed = {"", *(policy for policy, _ in kept)}
    return Snapshot(
        variants=[counts for key, counts in variants.items() if not key[0] or key[:2] in kept],
        served=[entry for key, entry in served.items() if key in kept],
        requests={
            policy: _summed(a["requests"].get(policy, {}), b["requests"].get(policy, {}))
            for policy in sorted(a["requests"] | b["requests"])
            if policy in listed
        },
        refusals=_summed(a["refusals"], b["refusals"]),
        loads=_summed(a["loads"], b["loads"]),
        counters=_summed(a["counters"], b["counters"]),
        gauges=_summed(a["gauges"], b["gauges"]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """How often something happened, and how long it took in all."""

    count: int
    ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyStatistics:
    """What became of the requests of one version of a policy since this process started.

    Attributes:
        last_answer_ms: Unix time; 0 where there was none.
        answered: requests, from their arrival to their end.
        refused: requests for any version of the policy, since a refused one need not have named one; of no length.
        queued, inferred: the parts of the answered ones before and in the engine.
        runs: runs of the engine by their rows, rounded up to a power of two; sizes without any are left out.
    """

    last_answer_ms: int
    answered: Duration
    refused: Duration
    queued: Duration
    inferred: Duration
    runs: Mapping[int, Duration]


def _no_values(bounds: Sequence[float]) -> list[float]:
    return [0] * (len(bounds) + 1)


@dataclass(kw_only=True, slots=True)
class _Tally:
    """`VariantCounts` while they grow: attributes and lists, and neither numpy nor anything put off until later.

    Between everything else that a server does, a call of numpy or a look at an answer of some while ago costs several
    times what it does alone.
    """

    policy: str
    version: int
    variant: str
    last_ns: int = 0
    queue: list[float] = field(default_factory=functools.partial(_no_values, DURATION_BOUNDS_NS))
    queue_ns: int = 0
    inference: list[float] = field(default_factory=functools.partial(_no_values, DURATION_BOUNDS_NS))
    inference_ns: int = 0
    total: list[float] = field(default_factory=functools.partial(_no_values, DURATION_BOUNDS_NS))
    total_ns: int = 0
    batches: list[float] = field(default_factory=functools.partial(_no_values, BATCH_BOUNDS))
    batch_ns: list[float] = field(default_factory=functools.partial(_no_values, BATCH_BOUNDS))
    rows: int = 0
    margin: list[float] = field(default_factory=functools.partial(_no_values, MARGIN_BOUNDS))
    margin_sum: float = 0.0
    modes: list[float] = field(default_factory=list)
    mode_switches: int = 0
    forced_modes: int = 0
    clamped: int = 0
    warnings: dict[str, int] = field(default_factory=dict)

    def make_room(self, components: int, scores: Iterable[str]) -> None:
        """For so many components, and for `scores`; a version may be replaced under its number."""
        self.modes += [0] * (components - len(self.modes))
        self.warnings = dict.fromkeys(scores, 0) | self.warnings

    def count(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        """Takes an answer in."""
        self.last_ns = time.time_ns()
        queue_ns, inference_ns = reply.queue_ns, reply.inference_ns
        self.queue[bisect_left(DURATION_BOUNDS_NS, queue_ns)] += 1
        self.queue_ns += queue_ns
        self.inference[bisect_left(DURATION_BOUNDS_NS, inference_ns)] += 1
        self.inference_ns += inference_ns
        self.total[bisect_left(DURATION_BOUNDS_NS, total_ns)] += 1
        self.total_ns += total_ns
        rows = len(reply.action)
        self.rows += rows
        batch, share = bisect_left(BATCH_BOUNDS, reply.batch_rows), rows / reply.batch_rows
        self.batches[batch] += share
        self.batch_ns[batch] += share * inference_ns
        if reply.is_clamped:
            self.clamped += 1
        for name, score in reply.scores.items():
            if name in self.warnings:
                self.warnings[name] += sum(score.warns.tolist())
        if request.mode is not None:
            self.forced_modes += rows
        if reply.mode is not None:
            modes = reply.mode.tolist()
            for mode in modes:
                if 0 <= mode < len(self.modes):
                    self.modes[mode] += 1
            if request.previous_mode is not None:
                for mode, previous in zip(modes, request.previous_mode.tolist(), strict=True):
                    self.mode_switches += previous not in (-1, mode)
        if reply.margin is not None:
            for margin in reply.margin.tolist():
                if math.isfinite(margin):
                    self.margin[bisect_left(MARGIN_BOUNDS, margin)] += 1
                    self.margin_sum += margin

    def counts(self) -> VariantCounts:
        """The numbers so far."""
        return VariantCounts(
            policy=self.policy,
            version=self.version,
            variant=self.variant,
            last_ms=self.last_ns // 1_000_000,
            queue=Histogram(buckets=self.queue.copy(), sum=self.queue_ns),
            inference=Histogram(buckets=self.inference.copy(), sum=self.inference_ns),
            total=Histogram(buckets=self.total.copy(), sum=self.total_ns),
            batches=Histogram(buckets=self.batches.copy(), sum=self.rows),
            batch_ns=self.batch_ns.copy(),
            margin=Histogram(buckets=self.margin.copy(), sum=self.margin_sum),
            modes=self.modes.copy(),
            mode_switches=self.mode_switches,
            forced_modes=self.forced_modes,
            clamped=self.clamped,
            warnings=self.warnings.copy(),
        )


class RequestMetrics:
    """Counts the requests of one worker; a `lom_server.service.Observer`.

    Threads: belongs to one event loop.
    """

    def __init__(self) -> None:
        self._unlisted = _Tally(policy="", version=0, variant="")
        self._tallies: dict[_Variant, _Tally] = {}
        self._served: dict[str, list[ServedVersion]] = {}
        self._requests: dict[str, dict[str, int]] = {"": {OK: 0}}
        self._refusals: dict[str, int] = {}

    def publish(self, name: str, policy: PolicyVersions) -> None:
        """Counts for `policy` under its own labels from now on; to be told of every change of the loaded table."""
        self._served[name] = [
            ServedVersion(
                policy=name,
                version=version,
                digest=served.bundle_digest,
                provider=served.provider,
                default_variant=served.manifest.default_variant,
                is_default=version == policy.default_version,
            )
            for version, served in policy.versions.items()
        ]
        for version, served in policy.versions.items():
            manifest = served.manifest
            for variant, graph in manifest.variants.items():
                self._tallies.setdefault(
                    (name, version, variant), _Tally(policy=name, version=version, variant=variant)
                ).make_room(
                    manifest.num_components if "mode" in graph.outputs else 0,
                    [score for score, warning in manifest.warnings.items() if variant in warning.thresholds],
                )
        kept = _kept_versions(
            ((tally.policy, tally.version, tally.last_ns) for tally in self._tallies.values()),
            {(entry["policy"], entry["version"]) for entries in self._served.values() for entry in entries},
        )
        self._tallies = {key: tally for key, tally in self._tallies.items() if key[:2] in kept}
        self._requests = {name: self._requests.get(name, {OK: 0}) for name in ("", *(name for name, _ in kept))}

    def withdraw(self, name: str) -> None:
        """No version of the policy can be asked for any longer; what it answered stays counted."""
        self._served.pop(name, None)

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        """Counts an answer."""
        tally = self._tallies.get((reply.policy, reply.version, reply.variant), self._unlisted)
        self._requests[tally.policy][OK] += 1
        tally.count(request, reply, total_ns)

    def refused(self, policy: str, reason: Reason) -> None:
        """Counts a refusal; of a policy that is not listed, without a name."""
        codes = self._requests.get(policy) or self._requests[""]
        codes[reason] = codes.get(reason, 0) + 1
        self._refusals[reason] = self._refusals.get(reason, 0) + 1

    def snapshot(
        self,
        *,
        queue_rows: int = 0,
        streams: int = 0,
        dropped_log_lines: int = 0,
        recorded: int = 0,
        unrecorded: int = 0,
    ) -> Snapshot:
        """What this worker counted since its start, and what it holds now."""
        tallies = [*self._tallies.values(), *([self._unlisted] if self._requests[""][OK] else [])]
        return Snapshot(
            variants=[tally.counts() for tally in tallies],
            served=[entry.copy() for entries in self._served.values() for entry in entries],
            requests=copy.deepcopy(self._requests),
            refusals=self._refusals.copy(),
            loads={},
            counters={
                "cpu_seconds": time.process_time(),
                "dropped_log_lines": dropped_log_lines,
                "recorded": recorded,
                "unrecorded": unrecorded,
            },
            gauges={"workers": 1, "queue_rows": queue_rows, "streams": streams, "resident_bytes": _resident_bytes()},
        )

    def statistics(self, policy: str, version: int) -> PolicyStatistics:
        """The numbers of one version, all its variants together; zeros where nothing was counted."""
        counts = _Tally(policy=policy, version=version, variant="").counts()
        for (name, number, _), tally in self._tallies.items():
            if (name, number) == (policy, version):
                counts = _summed_variants(counts, tally.counts())
        refusals = sum(count for code, count in self._requests.get(policy, {}).items() if code != OK)
        sizes = (*BATCH_BOUNDS, 2 * BATCH_BOUNDS[-1])
        runs = zip(sizes, counts["batches"]["buckets"], counts["batch_ns"], strict=True)
        return PolicyStatistics(
            last_answer_ms=counts["last_ms"],
            answered=_duration(counts["total"]),
            refused=Duration(count=refusals, ns=0),
            queued=_duration(counts["queue"]),
            inferred=_duration(counts["inference"]),
            runs={rows: Duration(count=round(count), ns=round(ns)) for rows, count, ns in runs if round(count)},
        )


class Totals:
    """The whole server's numbers: those of the workers that live, of those that are gone, and the supervisor's own.

    Threads: any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past = empty_snapshot()
        self._past["counters"] = dict.fromkeys(
            ("worker_restarts", "swaps", "cpu_seconds", "dropped_log_lines", "recorded", "unrecorded"), 0
        )
        self._past["gauges"] = {"workers": 0, "queue_rows": 0, "streams": 0, "resident_bytes": 0}
        self._past["loads"] = {OK: 0}
        self._live: dict[int, Snapshot] = {}
        self._retired: set[int] = set()

    def update(self, worker: int, snapshot: Snapshot) -> None:
        """Takes the latest snapshot of a worker in place of its last one."""
        with self._lock:
            if worker not in self._retired:  # one under way when the worker went would be counted twice
                self._live[worker] = snapshot

    def retire(self, worker: int) -> None:
        """Keeps what a worker counted, now that it is gone. Its successor counts from zero, under another number."""
        with self._lock:
            self._retired.add(worker)
            last = self._live.pop(worker, None)
            if last is not None:
                last = last.copy()
                last["served"], last["gauges"] = [], {}
                self._past = merge(self._past, last)

    def restarted(self) -> None:
        """A worker was replaced."""
        with self._lock:
            self._past["counters"]["worker_restarts"] += 1

    def swapped(self) -> None:
        """Another version became a policy's default."""
        with self._lock:
            self._past["counters"]["swaps"] += 1

    def loaded(self, result: str = OK) -> None:
        """A bundle was loaded, or refused with the reason `result`."""
        with self._lock:
            self._past["loads"][result] = self._past["loads"].get(result, 0) + 1

    def total(self) -> Snapshot:
        """The sum."""
        with self._lock:
            total = merge(empty_snapshot(), self._past)
            for snapshot in self._live.values():
                total = merge(total, snapshot)
            return total


class MetricsServer:
    """Answers HTTP GET with the metrics, in threads of its own.

    Attributes:
        address: HOST:PORT, with the port that the system gave.
    """

    def __init__(self, address: str, server: "_HttpServer") -> None:
        self.address = address
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="lom-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_metrics(address: str, collect: Callable[[], Snapshot]) -> MetricsServer:
    """Exposes what `collect` returns, asked anew for every scrape, on `address` (HOST:PORT).

    Where `collect` raises, a scrape is answered 503 and the log says why.

    Raises:
        StartError: ADDRESS_UNAVAILABLE, where somebody else has the port or the host is not this machine's.
    """
    host, port = host_and_port("metrics_listen", address)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SnapshotCollector(collect))
    ProcessCollector(registry=registry)
    page = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            content: Iterable[bytes] = page(environ, start_response)
        except Exception as error:
            incident = log_incident("metrics could not be collected", error)
            start_response("503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
            content = [f"METRICS_UNAVAILABLE: the metrics could not be collected, id {incident}\n".encode()]
        return content

    printable_host = f"[{host}]" if ":" in host else host
    server_type = _Ipv6HttpServer if ":" in host else _HttpServer
    try:
        server = make_server(host, port, answer, server_type, _QuietHandler)
    except OSError as error:
        raise StartError(
            "ADDRESS_UNAVAILABLE",
            f"could not listen for metrics on {printable_host}:{port}; expected a free port of this machine",
        ) from error
    return MetricsServer(f"{printable_host}:{server.server_port}", server)


def expose(snapshot: Snapshot) -> Iterator[Metric]:
    """The metric families of `snapshot`.

    Codes and reasons that never occurred are there with 0, so that the first one is an increase.
    """
    yield from _variant_families(snapshot["variants"])
    yield from _request_families(snapshot)
    yield from _served_families(snapshot["served"])
    yield from _process_families(snapshot)


class _SnapshotCollector(Collector):
    def __init__(self, collect: Callable[[], Snapshot]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return expose(self._collect())

    def describe(self) -> Iterable[Metric]:
        return expose(empty_snapshot())


class _HttpServer(ThreadingWSGIServer):
    """As many scrapes at once as anybody needs; connections beyond them are closed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._free = threading.BoundedSemaphore(_MAX_SCRAPES)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a scraper that went away is no event, and a traceback for everyone who does is a flood."""


class _Ipv6HttpServer(_HttpServer):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = _SILENCE_LIMIT_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def _variant_families(variants: Sequence[VariantCounts]) -> Iterator[Metric]:
    durations = HistogramMetricFamily(
        "lom_request_duration_seconds",
        "Answers by the time they took: waiting for a batch, the batch's run, and all of it.",
        labels=(*_VARIANT_LABELS, "phase"),
    )
    batches = HistogramMetricFamily("lom_batch_rows", "Rows of each run of the engine.", labels=_VARIANT_LABELS)
    margins = HistogramMetricFamily("lom_margin", "Best minus second-best hyper-Q, by row.", labels=_VARIANT_LABELS)
    modes = CounterMetricFamily(
        "lom_mode_selected", "Rows by the component that acted.", labels=(*_VARIANT_LABELS, "mode")
    )
    switches = CounterMetricFamily(
        "lom_mode_switch", "Rows whose previous mode was told and was another one.", labels=_VARIANT_LABELS
    )
    forced = CounterMetricFamily(
        "lom_mode_forced", "Rows that had to act by a given component.", labels=_VARIANT_LABELS
    )
    warnings = CounterMetricFamily("lom_warnings", "Rows worth a warning.", labels=(*_VARIANT_LABELS, "score"))
    clamped = CounterMetricFamily(
        "lom_action_clamped", "Answers whose action was cut to the action space.", labels=_VARIANT_LABELS
    )
    for counts in variants:
        labels = (counts["policy"], str(counts["version"]), counts["variant"])
        by_phase = zip(_PHASES, (counts["queue"], counts["inference"], counts["total"]), strict=True)
        for phase, histogram in by_phase:
            _add_histogram(durations, (*labels, phase), DURATION_BOUNDS_NS, histogram, unit=1e9)
        _add_histogram(batches, labels, BATCH_BOUNDS, counts["batches"])
        if counts["modes"]:
            _add_histogram(margins, labels, MARGIN_BOUNDS, counts["margin"])
            switches.add_metric(labels, counts["mode_switches"])
            forced.add_metric(labels, counts["forced_modes"])
        for mode, rows in enumerate(counts["modes"]):
            modes.add_metric((*labels, str(mode)), rows)
        for score, rows in counts["warnings"].items():
            warnings.add_metric((*labels, score), rows)
        clamped.add_metric(labels, counts["clamped"])
    yield from (durations, batches, margins, modes, switches, forced, warnings, clamped)


def _request_families(snapshot: Snapshot) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "lom_requests", "Requests for actions, by OK or the reason of their refusal.", labels=("policy", "code")
    )
    missed = CounterMetricFamily(
        "lom_deadline_missed", "Accepted requests whose deadline passed before they ran.", labels=("policy",)
    )
    for policy, codes in snapshot["requests"].items():
        for code, count in codes.items():
            requests.add_metric((policy, code), count)
        missed.add_metric((policy,), codes.get(Reason.DEADLINE_EXCEEDED, 0))
    refusals = CounterMetricFamily("lom_refusals", "Refused requests, by reason.", labels=("reason",))
    for reason, count in (dict.fromkeys(Reason, 0) | snapshot["refusals"]).items():
        refusals.add_metric((reason,), count)
    loads = CounterMetricFamily("lom_loads", "Bundles that were loaded (OK) or refused, by reason.", labels=("result",))
    for result, count in snapshot["loads"].items():
        loads.add_metric((result,), count)
    yield from (requests, missed, refusals, loads)


def _served_families(served: Sequence[ServedVersion]) -> Iterator[Metric]:
    info = InfoMetricFamily("lom_policy", "What can be asked for.")
    default = GaugeMetricFamily(
        "lom_policy_default", "1 for the version that answers whoever names none.", labels=("policy", "version")
    )
    for entry in served:
        policy, version = entry["policy"], str(entry["version"])
        info.add_metric(
            (),
            {
                "policy": policy,
                "version": version,
                "digest": entry["digest"],
                "provider": entry["provider"],
                "default_variant": entry["default_variant"],
            },
        )
        default.add_metric((policy, version), int(entry["is_default"]))
    yield from (info, default)


def _process_families(snapshot: Snapshot) -> Iterator[Metric]:
    for key, name, help_text in (
        ("worker_restarts", "lom_worker_restarts", "Workers that were replaced."),
        ("swaps", "lom_swaps", "Times that another version became a policy's default."),
        ("cpu_seconds", "lom_worker_cpu_seconds", "Processor time of all workers so far."),
        ("dropped_log_lines", "lom_log_lines_dropped", "Log lines of all workers that were not written."),
        ("recorded", "lom_recorded_answers", "Answers of all workers that were taken into the recording."),
        ("unrecorded", "lom_unrecorded_answers", "Answers that --record should have recorded and did not."),
    ):
        yield CounterMetricFamily(name, help_text, value=snapshot["counters"].get(key, 0))
    for key, name, help_text in (
        ("workers", "lom_workers", "Workers that live."),
        ("queue_rows", "lom_queue_rows", "Rows that wait for the engine."),
        ("streams", "lom_streams", "Streams that are open."),
        ("resident_bytes", "lom_worker_resident_memory_bytes", "Resident memory of all workers."),
    ):
        yield GaugeMetricFamily(name, help_text, value=snapshot["gauges"].get(key, 0))


def _add_histogram(
    family: HistogramMetricFamily,
    labels: Sequence[str],
    bounds: Sequence[float],
    histogram: Histogram,
    *,
    unit: float = 1,
) -> None:
    names = [*(str(bound / unit) for bound in bounds), "+Inf"]
    # Rounded after adding up: whole runs are made of shares, and cumulative counts must not fall.
    cumulative = [round(count) for count in accumulate(histogram["buckets"])]
    family.add_metric(labels, list(zip(names, cumulative, strict=True)), histogram["sum"] / unit)


def _duration(histogram: Histogram) -> Duration:
    return Duration(count=round(sum(histogram["buckets"])), ns=round(histogram["sum"]))


def _summed_variants(a: VariantCounts, b: VariantCounts) -> VariantCounts:
    return VariantCounts(
        policy=a["policy"],
        version=a["version"],
        variant=a["variant"],
        last_ms=max(a["last_ms"], b["last_ms"]),
        queue=_summed_histograms(a["queue"], b["queue"]),
        inference=_summed_histograms(a["inference"], b["inference"]),
        total=_summed_histograms(a["total"], b["total"]),
        batches=_summed_histograms(a["batches"], b["batches"]),
        batch_ns=_summed_lists(a["batch_ns"], b["batch_ns"]),
        margin=_summed_histograms(a["margin"], b["margin"]),
        modes=_summed_lists(a["modes"], b["modes"]),
        mode_switches=a["mode_switches"] + b["mode_switches"],
        forced_modes=a["forced_modes"] + b["forced_modes"],
        clamped=a["clamped"] + b["clamped"],
        warnings=_summed(a["warnings"], b["warnings"]),
    )


def _summed_histograms(a: Histogram, b: Histogram) -> Histogram:
    return Histogram(buckets=_summed_lists(a["buckets"], b["buckets"]), sum=a["sum"] + b["sum"])


def _summed_lists(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]


def _summed(a: Mapping[str, _Number], b: Mapping[str, _Number]) -> dict[str, _Number]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in (*a, *b)}


def _kept_versions(answered: Iterable[tuple[str, int, int]], served: Collection[_Version]) -> set[_Version]:
    """The versions with labels of their own: before all others those that are served, then those that answered last.

    Args:
        answered: policy, version and the time of its last answer; several for one version where it has variants.
    """
    rank: dict[_Version, tuple[bool, int]] = {}
    for policy, version, last in answered:
        key = policy, version
        if policy:
            rank[key] = max(rank.get(key, (False, 0)), (key in served, last))
    versions_kept: Counter[str] = Counter()
    kept: set[_Version] = set()
    for policy, version in sorted(rank, key=lambda key: rank[key], reverse=True):
        has_room = policy in versions_kept or len(versions_kept) < MAX_POLICIES
        if has_room and versions_kept[policy] < MAX_VERSIONS:
            versions_kept[policy] += 1
            kept.add((policy, version))
    return kept


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
