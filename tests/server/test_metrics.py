"""`lom_server.metrics`: what is counted, summed over workers, and exposed over a real socket."""

import asyncio
import http.client
import json
import math
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lom_api.reasons import Reason
from lom_server.batcher import MicroBatcher
from lom_server.config import ServerConfig
from lom_server.errors import PolicyError, StartError
from lom_server.loading import load_policy
from lom_server.metrics import (
    MAX_POLICIES,
    MAX_VERSIONS,
    Duration,
    RequestMetrics,
    Snapshot,
    Totals,
    VariantCounts,
    empty_snapshot,
    expose,
    merge,
    serve_metrics,
)
from lom_server.service import ActReply, ActRequest, PolicyService, PolicyVersions, Score, ServedPolicy
from tests.support.bundles import POLICY, toy_manifest
from tests.support.servers import wait_until

DIGEST = "ab" * 32
MICROSECOND = 1000
SCRAPES_AT_ONCE = 8


def table(*versions: int, name: str = POLICY, default: int = 0) -> PolicyVersions:
    served = {
        version: ServedPolicy(
            name=name,
            version=version,
            manifest=toy_manifest(policy=name),
            bundle_digest=DIGEST,
            lanes={},
            provider="CPUExecutionProvider",
            max_batch_rows=1024,
        )
        for version in versions
    }
    return PolicyVersions(versions=served, default_version=default or versions[-1])


def asking(**choices: Any) -> ActRequest:
    return ActRequest(policy=POLICY, inputs=(), **choices)


def answer(rows: int = 1, **changes: Any) -> ActReply:
    facts: dict[str, Any] = {
        "action": np.zeros((rows, 2), dtype=np.float32),
        "mode": np.zeros(rows, dtype=np.int32),
        "margin": np.full(rows, 0.2, dtype=np.float32),
        "scores": {},
        "explanation": {},
        "is_clamped": False,
        "policy": POLICY,
        "version": 1,
        "variant": "greedy_mode",
        "bundle_digest": DIGEST,
        "queue_ns": 0,
        "inference_ns": 0,
        "batch_rows": rows,
        **changes,
    }
    return ActReply(**facts)


def counts_of(
    snapshot: Snapshot, variant: str = "greedy_mode", policy: str = POLICY, version: int = 1
) -> VariantCounts:
    (counts,) = (
        counts
        for counts in snapshot["variants"]
        if (counts["policy"], counts["version"], counts["variant"]) == (policy, version, variant)
    )
    return counts


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


class _Families(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        return expose(self._snapshot)


def exposed(snapshot: Snapshot) -> str:
    registry = CollectorRegistry()
    registry.register(_Families(snapshot))
    return generate_latest(registry).decode()


def scraped(address: str, path: str = "/metrics", method: str = "GET", **headers: str) -> str:
    status, text = fetched(address, path, method, **headers)
    assert status == 200, text
    return text


def fetched(address: str, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.fixture
def metrics() -> RequestMetrics:
    metrics = RequestMetrics()
    metrics.publish(POLICY, table(1))
    return metrics


# Counting


def test_each_phase_has_its_histogram_and_a_bound_belongs_to_its_bucket(metrics: RequestMetrics) -> None:
    metrics.answered(
        asking(), answer(queue_ns=100 * MICROSECOND, inference_ns=100 * MICROSECOND + 1), 2_000_000 * MICROSECOND
    )
    text = exposed(metrics.snapshot())
    labels = {"policy": POLICY, "version": "1", "variant": "greedy_mode"}

    def bucket(phase: str, bound: str) -> float:
        return value(text, "lom_request_duration_seconds_bucket", **labels, phase=phase, le=bound)

    assert bucket("queue", "0.0001") == 1
    assert bucket("inference", "0.0001") == 0
    assert bucket("inference", "0.00025") == 1
    assert bucket("total", "1.0") == 0
    assert bucket("total", "+Inf") == 1
    assert value(text, "lom_request_duration_seconds_sum", **labels, phase="queue") == pytest.approx(1e-4)
    assert value(text, "lom_request_duration_seconds_sum", **labels, phase="total") == pytest.approx(2.0)
    assert value(text, "lom_request_duration_seconds_count", **labels, phase="total") == 1


def test_a_run_that_seven_requests_shared_counts_once(metrics: RequestMetrics) -> None:
    for _ in range(7):  # seven sevenths are a little less than one
        metrics.answered(asking(), answer(1, batch_rows=7, inference_ns=900), 1000)
    metrics.answered(asking(), answer(2, batch_rows=2, inference_ns=500), 1000)
    text = exposed(metrics.snapshot())
    labels = {"policy": POLICY, "version": "1", "variant": "greedy_mode"}
    assert value(text, "lom_batch_rows_bucket", **labels, le="2.0") == 1
    assert value(text, "lom_batch_rows_bucket", **labels, le="4.0") == 1
    assert value(text, "lom_batch_rows_bucket", **labels, le="8.0") == 2
    assert value(text, "lom_batch_rows_count", **labels) == 2
    assert value(text, "lom_batch_rows_sum", **labels) == 9
    assert metrics.statistics(POLICY, 1).runs == {2: Duration(count=1, ns=500), 8: Duration(count=1, ns=900)}


def test_rows_are_counted_by_mode_and_no_mode_beyond_the_components(metrics: RequestMetrics) -> None:
    modes = np.array([2, 2, 0, -1, 3, 2**31 - 1], dtype=np.int32)
    metrics.answered(asking(), answer(6, mode=modes), 0)
    assert counts_of(metrics.snapshot())["modes"] == [1, 0, 2]


def test_a_switch_is_a_known_previous_mode_that_did_not_act(metrics: RequestMetrics) -> None:
    modes = np.array([0, 1, 2, 2], dtype=np.int32)
    previous = np.array([-1, 1, 0, 2], dtype=np.int32)
    metrics.answered(asking(), answer(4, mode=modes), 0)
    metrics.answered(asking(previous_mode=previous), answer(4, mode=modes), 0)
    assert counts_of(metrics.snapshot())["mode_switches"] == 1


def test_forced_rows_clamped_answers_and_warned_rows_are_counted(metrics: RequestMetrics) -> None:
    metrics.answered(asking(mode=0), answer(3), 0)
    score = Score(values=np.zeros(3, np.float32), threshold=1.0, warns=np.array([True, False, True]))
    metrics.answered(asking(), answer(3, scores={"state_score": score, "not in the manifest": score}), 0)
    metrics.answered(asking(), answer(3, is_clamped=True), 0)
    counts = counts_of(metrics.snapshot())
    assert counts["forced_modes"] == 3
    assert counts["warnings"] == {"state_score": 2}
    assert counts["clamped"] == 1


def test_a_row_without_a_runner_up_has_no_margin(metrics: RequestMetrics) -> None:
    metrics.answered(asking(), answer(3, margin=np.array([math.nan, 0.5, 250.0], dtype=np.float32)), 0)
    text = exposed(metrics.snapshot())
    labels = {"policy": POLICY, "version": "1", "variant": "greedy_mode"}
    assert value(text, "lom_margin_count", **labels) == 2
    assert value(text, "lom_margin_sum", **labels) == 250.5
    assert value(text, "lom_margin_bucket", **labels, le="0.3") == 0
    assert value(text, "lom_margin_bucket", **labels, le="1.0") == 1
    assert value(text, "lom_margin_bucket", **labels, le="100.0") == 1


def test_a_variant_without_modes_has_no_series_of_them(metrics: RequestMetrics) -> None:
    metrics.answered(asking(), answer(variant="actor", mode=None, margin=None), 0)
    names = {name for name, labels in samples(exposed(metrics.snapshot())) if ("variant", "actor") in labels}
    assert "lom_request_duration_seconds_count" in names
    assert not names & {"lom_mode_selected_total", "lom_mode_switch_total", "lom_margin_count"}


def test_requests_are_counted_by_code_and_refusals_by_reason(metrics: RequestMetrics) -> None:
    metrics.answered(asking(), answer(), 0)
    metrics.refused(POLICY, Reason.QUEUE_FULL)
    metrics.refused(POLICY, Reason.DEADLINE_EXCEEDED)
    metrics.refused("", Reason.MODEL_NOT_FOUND)
    text = exposed(metrics.snapshot())
    assert value(text, "lom_requests_total", policy=POLICY, code="OK") == 1
    assert value(text, "lom_requests_total", policy=POLICY, code="QUEUE_FULL") == 1
    assert value(text, "lom_requests_total", policy="", code="MODEL_NOT_FOUND") == 1
    assert value(text, "lom_deadline_missed_total", policy=POLICY) == 1
    assert value(text, "lom_refusals_total", reason="MODEL_NOT_FOUND") == 1


def test_what_never_happened_is_exposed_as_zero(metrics: RequestMetrics) -> None:
    """Prometheus sees no increase in a series that begins with 1."""
    text = exposed(metrics.snapshot())
    for reason in Reason:
        assert value(text, "lom_refusals_total", reason=reason) == 0
    assert value(text, "lom_requests_total", policy=POLICY, code="OK") == 0
    labels = {"policy": POLICY, "version": "1", "variant": "greedy_mode"}
    assert value(text, "lom_mode_selected_total", **labels, mode="2") == 0
    assert value(text, "lom_warnings_total", **labels, score="state_score") == 0


def test_counting_keeps_neither_observation_nor_answer(metrics: RequestMetrics) -> None:
    observation, action = np.zeros((1, 3), dtype=np.float32), np.zeros((1, 2), dtype=np.float32)
    alive = [weakref.ref(observation), weakref.ref(action)]
    metrics.answered(ActRequest(policy=POLICY, inputs=[("observation", observation)]), answer(action=action), 0)
    del observation, action
    assert [array() for array in alive] == [None, None]


def test_statistics_are_those_of_one_version(metrics: RequestMetrics) -> None:
    metrics.publish(POLICY, table(1, 2))
    before_ms = time.time_ns() // 1_000_000
    metrics.answered(asking(), answer(2, queue_ns=10, inference_ns=20), 100)
    metrics.answered(asking(), answer(variant="actor", queue_ns=1, inference_ns=2), 50)
    metrics.answered(asking(), answer(version=2), 7)
    metrics.refused(POLICY, Reason.QUEUE_FULL)
    statistics = metrics.statistics(POLICY, 1)
    assert statistics.answered == Duration(count=2, ns=150)
    assert statistics.queued == Duration(count=2, ns=11)
    assert statistics.inferred == Duration(count=2, ns=22)
    assert statistics.refused == Duration(count=1, ns=0)
    assert statistics.runs == {1: Duration(count=1, ns=2), 2: Duration(count=1, ns=20)}
    assert before_ms <= statistics.last_answer_ms <= time.time_ns() // 1_000_000
    assert metrics.statistics("another", 1).last_answer_ms == 0


async def test_a_service_tells_what_it_did(toy_bundle: Path) -> None:
    metrics = RequestMetrics()
    batcher = MicroBatcher(max_batch_rows=8, max_queue_rows=8)
    service = PolicyService(batcher=batcher, observer=metrics)
    loaded = load_policy(POLICY, 1, toy_bundle, ServerConfig(models=toy_bundle, provider="cpu", max_batch_rows=8))
    service.publish(POLICY, PolicyVersions(versions={1: loaded.policy}, default_version=1))
    metrics.publish(POLICY, service.policies[POLICY])
    # Modes 2 and 0; |1| + |1| + |1.5| is above the threshold of 2.5, the other row is not.
    observation = np.array([[1, 1, 1.5], [0.5, 0, 0]], dtype=np.float32)
    deadline_ns = time.monotonic_ns() + 10_000_000_000
    request = ActRequest(policy=POLICY, inputs=[("observation", observation)])
    await asyncio.gather(service.act(request, deadline_ns), service.act(request, deadline_ns))
    with pytest.raises(PolicyError):
        await service.act(ActRequest(policy=POLICY, inputs=()), deadline_ns)
    with pytest.raises(PolicyError):
        await service.act(ActRequest(policy="made-up", inputs=()), deadline_ns)
    batcher.close()
    snapshot = metrics.snapshot()
    counts = counts_of(snapshot)
    assert counts["modes"] == [2, 0, 2]
    assert counts["warnings"] == {"state_score": 2}
    assert (sum(counts["batches"]["buckets"]), counts["batches"]["sum"]) == (1, 4)
    assert 0 < counts["inference"]["sum"] < counts["total"]["sum"]
    assert snapshot["requests"] == {POLICY: {"OK": 2, "MISSING_INPUT": 1}, "": {"OK": 0, "MODEL_NOT_FOUND": 1}}


# The loaded table


def test_what_can_be_asked_for_is_exposed_until_it_is_withdrawn(metrics: RequestMetrics) -> None:
    metrics.publish(POLICY, table(3, 4, default=3))
    metrics.answered(asking(), answer(version=4), 0)
    text = exposed(metrics.snapshot())
    info = {"policy": POLICY, "digest": DIGEST, "provider": "CPUExecutionProvider", "default_variant": "greedy_mode"}
    assert value(text, "lom_policy_info", **info, version="3") == 1
    assert value(text, "lom_policy_info", **info, version="4") == 1
    assert value(text, "lom_policy_default", policy=POLICY, version="3") == 1
    assert value(text, "lom_policy_default", policy=POLICY, version="4") == 0
    assert ("lom_policy_default", frozenset({("policy", POLICY), ("version", "1")})) not in samples(text)
    metrics.withdraw(POLICY)
    text = exposed(metrics.snapshot())
    assert "lom_policy_info{" not in text
    assert value(text, "lom_requests_total", policy=POLICY, code="OK") == 1


def test_a_version_that_is_published_again_goes_on_counting(metrics: RequestMetrics) -> None:
    score = Score(values=np.zeros(1, np.float32), threshold=1.0, warns=np.array([True]))
    metrics.answered(asking(), answer(scores={"state_score": score}), 0)
    metrics.withdraw(POLICY)
    metrics.publish(POLICY, table(1))
    metrics.answered(asking(), answer(), 0)
    counts = counts_of(metrics.snapshot())
    assert counts["modes"] == [2, 0, 0]
    assert counts["warnings"] == {"state_score": 1}


def test_a_version_that_is_replaced_by_a_bundle_of_more_components_counts_them_all(metrics: RequestMetrics) -> None:
    metrics.answered(asking(), answer(), 0)
    larger = table(1)
    policy = larger.versions[1]
    manifest = replace(policy.manifest, num_components=5)
    metrics.publish(POLICY, replace(larger, versions={1: replace(policy, manifest=manifest)}))
    metrics.answered(asking(), answer(mode=np.array([4], dtype=np.int32)), 0)
    assert counts_of(metrics.snapshot())["modes"] == [1, 0, 0, 0, 1]


def test_ten_thousand_made_up_names_add_no_series(metrics: RequestMetrics) -> None:
    def number_of_series() -> int:
        return len(samples(exposed(metrics.snapshot())))

    metrics.answered(asking(), answer(policy="made-up"), 0)
    metrics.refused("made-up", Reason.MODEL_NOT_FOUND)
    before = number_of_series()
    for number in range(10_000):
        metrics.refused(f"made-up-{number}", Reason.MODEL_NOT_FOUND)
        metrics.answered(asking(), answer(policy=f"made-up-{number}", version=number, variant=f"v{number}"), 0)
    assert number_of_series() == before
    assert value(exposed(metrics.snapshot()), "lom_requests_total", policy="", code="MODEL_NOT_FOUND") == 10_001


def test_no_more_policies_and_versions_have_labels_than_there_is_room_for() -> None:
    metrics = RequestMetrics()
    for number in range(MAX_POLICIES + 1):
        metrics.publish(f"p{number}", table(1, name=f"p{number}"))
    metrics.publish("p0", table(*range(1, MAX_VERSIONS + 2), name="p0"))
    metrics.answered(asking(), answer(policy=f"p{MAX_POLICIES}"), 0)
    snapshot = merge(empty_snapshot(), metrics.snapshot())
    policies = [counts["policy"] for counts in snapshot["variants"]]
    assert len(set(policies) - {""}) == MAX_POLICIES
    assert len({counts["version"] for counts in snapshot["variants"] if counts["policy"] == "p0"}) == MAX_VERSIONS
    assert policies.count("") == 1
    assert counts_of(snapshot, policy="", version=0, variant="")["total"]["buckets"][0] == 1
    assert len(snapshot["requests"]) == MAX_POLICIES + 1


def test_versions_that_are_served_have_labels_before_those_that_were() -> None:
    metrics = RequestMetrics()
    for version in range(1, 101):
        metrics.publish(POLICY, table(version))
        metrics.answered(asking(), answer(version=version), 0)
    metrics.publish(POLICY, table(200, 201))
    versions = {counts["version"] for counts in metrics.snapshot()["variants"]}
    assert versions >= {200, 201}
    assert len(versions) == MAX_VERSIONS
    assert metrics.snapshot()["requests"][POLICY]["OK"] == 100


# Snapshots


def test_a_snapshot_survives_a_pipe_and_does_not_change_later(metrics: RequestMetrics) -> None:
    metrics.answered(asking(), answer(), 5)
    metrics.refused(POLICY, Reason.QUEUE_FULL)
    snapshot = metrics.snapshot(queue_rows=3, streams=2, dropped_log_lines=7)
    text = json.dumps(snapshot)
    assert json.loads(text) == snapshot
    metrics.answered(asking(), answer(), 5)
    metrics.refused(POLICY, Reason.QUEUE_FULL)
    assert json.dumps(snapshot) == text


def test_a_snapshot_knows_its_process(metrics: RequestMetrics) -> None:
    snapshot = metrics.snapshot(queue_rows=3, streams=2, dropped_log_lines=7)
    assert snapshot["gauges"] | {"resident_bytes": 0} == {
        "workers": 1,
        "queue_rows": 3,
        "streams": 2,
        "resident_bytes": 0,
    }
    assert 2**20 < snapshot["gauges"]["resident_bytes"] < 2**40
    assert 0 < snapshot["counters"]["cpu_seconds"] <= time.process_time()
    assert snapshot["counters"]["dropped_log_lines"] == 7


def test_merging_adds_everything_and_shares_nothing() -> None:
    first, second = RequestMetrics(), RequestMetrics()
    first.publish(POLICY, table(1))
    second.publish(POLICY, table(1, 2, default=1))
    score = Score(values=np.zeros(1, np.float32), threshold=1.0, warns=np.array([True]))
    for metrics in (first, second):
        reply = answer(is_clamped=True, queue_ns=3, inference_ns=4, scores={"state_score": score})
        metrics.answered(asking(mode=0, previous_mode=np.array([1], np.int32)), reply, 5)
        metrics.refused(POLICY, Reason.QUEUE_FULL)
    second.answered(asking(), answer(version=2), 0)
    a, b = first.snapshot(queue_rows=1, streams=2), second.snapshot(queue_rows=3, streams=4)
    before = json.dumps([a, b])
    both = merge(a, b)
    counts = counts_of(both)
    assert (counts["queue"]["sum"], counts["inference"]["sum"], counts["total"]["sum"]) == (6, 8, 10)
    assert (counts["queue"]["buckets"][0], counts["batches"]["buckets"][0], counts["batches"]["sum"]) == (2, 2, 2)
    assert (counts["modes"], counts["mode_switches"], counts["forced_modes"]) == ([2, 0, 0], 2, 2)
    assert (counts["clamped"], counts["warnings"], counts["batch_ns"][0]) == (2, {"state_score": 2}, 8)
    assert (sum(counts["margin"]["buckets"]), counts["last_ms"]) == (2, counts_of(b)["last_ms"])
    assert counts_of(both, version=2)["modes"] == [1, 0, 0]
    assert both["requests"][POLICY] == {"OK": 3, "QUEUE_FULL": 2}
    assert both["refusals"] == {"QUEUE_FULL": 2}
    assert (both["gauges"]["workers"], both["gauges"]["queue_rows"], both["gauges"]["streams"]) == (2, 4, 6)
    assert [(entry["version"], entry["is_default"]) for entry in both["served"]] == [(1, True), (2, False)]
    for counts in both["variants"]:
        counts["modes"].append(99)
    both["served"][0]["digest"] = "changed"
    both["requests"][POLICY]["OK"] = 99
    assert json.dumps([a, b]) == before


def counted(answers: int, *, queue_rows: int = 0) -> Snapshot:
    metrics = RequestMetrics()
    metrics.publish(POLICY, table(1))
    for _ in range(answers):
        metrics.answered(asking(), answer(), 0)
    return metrics.snapshot(queue_rows=queue_rows)


def test_what_a_worker_counted_outlives_it_and_what_it_held_does_not() -> None:
    totals = Totals()
    totals.update(1, counted(5, queue_rows=7))
    totals.update(2, counted(3, queue_rows=1))
    totals.update(1, counted(6, queue_rows=9))
    before = totals.total()
    assert before["requests"][POLICY]["OK"] == 9
    assert (before["gauges"]["workers"], before["gauges"]["queue_rows"]) == (2, 10)
    totals.retire(1)
    totals.restarted()
    after = totals.total()
    assert after["requests"][POLICY]["OK"] == 9
    assert counts_of(after)["modes"] == [9, 0, 0]
    assert after["counters"]["cpu_seconds"] == pytest.approx(before["counters"]["cpu_seconds"])
    assert (after["gauges"]["workers"], after["gauges"]["queue_rows"]) == (1, 1)
    totals.update(3, counted(2))
    assert totals.total()["requests"][POLICY]["OK"] == 11
    text = exposed(totals.total())
    assert value(text, "lom_worker_restarts_total") == 1
    assert value(text, "lom_workers") == 2


def test_a_measurement_under_way_when_its_worker_went_is_not_counted_twice() -> None:
    totals = Totals()
    totals.update(1, counted(5))
    totals.retire(1)
    totals.update(1, counted(5))
    totals.retire(1)
    totals.retire(9)
    assert totals.total()["requests"][POLICY]["OK"] == 5


def test_what_only_dead_workers_served_is_no_longer_offered() -> None:
    totals = Totals()
    totals.update(1, counted(1))
    totals.retire(1)
    assert totals.total()["served"] == []


def test_totals_stay_within_the_caps_over_many_generations_of_workers() -> None:
    totals = Totals()
    for generation in range(1, 41):
        metrics = RequestMetrics()
        metrics.publish(POLICY, table(generation))
        metrics.answered(asking(), answer(version=generation), 0)
        totals.update(generation, metrics.snapshot())
        totals.retire(generation)
    total = totals.total()
    assert len({counts["version"] for counts in total["variants"]}) == MAX_VERSIONS
    assert total["requests"][POLICY]["OK"] == 40


def test_policies_of_long_ago_leave_totals() -> None:
    totals = Totals()
    for generation in range(MAX_POLICIES + 10):
        metrics = RequestMetrics()
        metrics.publish(f"p{generation}", table(1, name=f"p{generation}"))
        metrics.answered(asking(), answer(policy=f"p{generation}"), 0)
        metrics.refused(f"p{generation}", Reason.QUEUE_FULL)
        totals.update(generation, metrics.snapshot())
        totals.retire(generation)
    total = totals.total()
    assert len(total["requests"]) <= MAX_POLICIES + 1
    assert total["refusals"] == {"QUEUE_FULL": MAX_POLICIES + 10}


def test_between_two_workers_a_swap_shows_both_defaults() -> None:
    old, new = RequestMetrics(), RequestMetrics()
    old.publish(POLICY, table(1, 2, default=1))
    new.publish(POLICY, table(1, 2, default=2))
    both = merge(old.snapshot(), new.snapshot())
    assert [(entry["version"], entry["is_default"]) for entry in both["served"]] == [(1, True), (2, True)]


def test_loads_swaps_and_restarts_begin_at_zero() -> None:
    totals = Totals()
    text = exposed(totals.total())
    assert value(text, "lom_loads_total", result="OK") == 0
    assert value(text, "lom_swaps_total") == value(text, "lom_worker_restarts_total") == 0
    totals.loaded()
    totals.loaded(Reason.SELF_TEST_FAILED)
    totals.swapped()
    text = exposed(totals.total())
    assert value(text, "lom_loads_total", result="OK") == 1
    assert value(text, "lom_loads_total", result="SELF_TEST_FAILED") == 1
    assert value(text, "lom_swaps_total") == 1


# Exposition


def test_the_page_is_sound_in_both_text_formats(metrics: RequestMetrics) -> None:
    for rows in (1, 3, 5):
        metrics.answered(asking(), answer(rows, batch_rows=7), 1234)
    snapshot = metrics.snapshot()
    with serve_metrics("127.0.0.1:0", lambda: snapshot) as server:
        plain = scraped(server.address)
        openmetrics = scraped(server.address, Accept="application/openmetrics-text; version=1.0.0")
    # The parser of the second format is a strict one: cumulative buckets, whole counts, every name once.
    families = {family.name for family in openmetrics_families(openmetrics)}  # type: ignore[no-untyped-call]
    assert {family.name for family in expose(snapshot)} <= families
    assert value(plain, "lom_batch_rows_count", policy=POLICY, version="1", variant="greedy_mode") == 1


def test_a_server_without_a_worker_has_a_page() -> None:
    assert value(exposed(empty_snapshot()), "lom_workers") == 0


@pytest.fixture
def failing() -> Iterator[tuple[str, list[Snapshot | None]]]:
    outcomes: list[Snapshot | None] = []

    def collect() -> Snapshot:
        outcome = outcomes.pop(0)
        if outcome is None:
            raise RuntimeError("secret of the inside")
        return outcome

    with serve_metrics("127.0.0.1:0", collect) as server:
        yield server.address, outcomes


def test_a_failed_collection_is_503_without_a_word_of_the_inside(
    failing: tuple[str, list[Snapshot | None]], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    address, outcomes = failing
    outcomes[:] = [None, empty_snapshot()]
    status, text = fetched(address)
    assert status == 503
    assert text.startswith("METRICS_UNAVAILABLE: ")
    assert "secret" not in text
    assert "Traceback" not in text
    assert "secret of the inside" in caplog.text
    assert "secret" not in capfd.readouterr().err
    assert fetched(address)[0] == 200


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/metrics?name[]=lom_workers", "GET", 200),
        ("/metrics?name[]=made_up", "GET", 200),
        ("/favicon.ico", "GET", 200),
        ("/metrics", "POST", 405),
    ],
)
def test_whatever_is_asked_for_is_answered(path: str, method: str, status: int) -> None:
    with serve_metrics("127.0.0.1:0", empty_snapshot) as server:
        assert fetched(server.address, path, method)[0] == status


def test_part_of_the_page_may_be_asked_for() -> None:
    with serve_metrics("127.0.0.1:0", empty_snapshot) as server:
        text = scraped(server.address, "/metrics?name[]=lom_workers")
    assert set(samples(text)) == {("lom_workers", frozenset())}


def test_a_taken_port_is_said_and_a_closed_one_is_free_again() -> None:
    with serve_metrics("127.0.0.1:0", empty_snapshot) as server:
        with pytest.raises(StartError, match="ADDRESS_UNAVAILABLE") as error:
            serve_metrics(server.address, empty_snapshot)
        assert server.address in str(error.value)
    with serve_metrics(server.address, empty_snapshot) as again:
        assert again.address == server.address


def test_ipv6_is_served() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with serve_metrics("[::1]:0", empty_snapshot) as server:
        assert server.address.startswith("[::1]:")
        assert fetched(server.address)[0] == 200


def test_connections_that_ask_nothing_take_no_more_than_their_share(capfd: pytest.CaptureFixture[str]) -> None:
    with serve_metrics("127.0.0.1:0", empty_snapshot) as server:
        host, _, port = server.address.rpartition(":")
        threads_before = threading.active_count()
        idle = [socket.create_connection((host, int(port))) for _ in range(SCRAPES_AT_ONCE)]
        wait_until(lambda: threading.active_count() == threads_before + SCRAPES_AT_ONCE, "every idle one has a thread")
        with socket.create_connection((host, int(port))) as surplus:
            assert surplus.recv(1) == b""
        assert threading.active_count() == threads_before + SCRAPES_AT_ONCE
        for connection in idle:
            connection.close()
        wait_until(lambda: threading.active_count() == threads_before, "the idle ones are gone")
        assert fetched(server.address)[0] == 200
    assert capfd.readouterr().err == ""


def test_a_connection_that_asks_nothing_is_closed(capfd: pytest.CaptureFixture[str]) -> None:
    with serve_metrics("127.0.0.1:0", empty_snapshot) as server:
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as idle:
            assert idle.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_many_scrapes_at_once_of_a_server_that_counts_are_all_sound() -> None:
    totals = Totals()
    stop = threading.Event()

    def count() -> None:
        worker = 0
        while not stop.is_set():
            worker += 1
            totals.update(worker, counted(1))
            totals.retire(worker)

    counting = threading.Thread(target=count)
    with serve_metrics("127.0.0.1:0", totals.total) as server:
        counting.start()
        try:
            seen = [answered_requests(scraped(server.address)) for _ in range(50)]
        finally:
            stop.set()
            counting.join()
    assert seen == sorted(seen)
    assert seen[-1] > 0


def answered_requests(text: str) -> float:
    known: Mapping[tuple[str, frozenset[tuple[str, str]]], float] = samples(text)
    return known.get(("lom_requests_total", frozenset({("policy", POLICY), ("code", "OK")})), 0)
