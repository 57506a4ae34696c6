"""The dashboard and the alerts of `server/deploy` ask for what the server exposes, and fire when they should."""

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lom_api.reasons import Reason
from lom_server.metrics import RequestMetrics, Totals, expose
from lom_server.service import ActReply, ActRequest, PolicyVersions, ServedPolicy
from tests.support.bundles import POLICY, toy_manifest

DEPLOY = Path(__file__).parents[2] / "server" / "deploy"
DASHBOARD = DEPLOY / "grafana-dashboard.json"
ALERTS = DEPLOY / "prometheus-alerts.yaml"

TARGET_LABELS = {"job", "instance"}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")


@dataclass(frozen=True)
class Query:
    """A PromQL expression and where it stands."""

    place: str
    text: str


def dashboard() -> Mapping[str, Any]:
    document: Mapping[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def rules() -> list[Mapping[str, Any]]:
    document = yaml.safe_load(ALERTS.read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[Mapping[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    shown = [Query(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    marked = [Query(annotation["name"], annotation["expr"]) for annotation in dashboard()["annotations"]["list"]]
    chosen = [
        Query(variable["name"], variable["query"]["query"])
        for variable in dashboard()["templating"]["list"]
        if variable["type"] == "query"
    ]
    return [*shown, *marked, *chosen, *(Query(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules())]


def ids(query: Query) -> str:
    return query.place


def exposed_labels() -> dict[str, set[str]]:
    """Label names by series name, of a server to which everything has happened."""
    metrics = RequestMetrics()
    policy = ServedPolicy(
        name=POLICY,
        version=1,
        manifest=toy_manifest(),
        bundle_digest="ab" * 32,
        lanes={},
        provider="CPUExecutionProvider",
        max_batch_rows=8,
    )
    metrics.publish(POLICY, PolicyVersions(versions={1: policy}, default_version=1))
    metrics.answered(
        ActRequest(policy=POLICY, inputs=()),
        ActReply(
            action=np.zeros((1, 2), np.float32),
            mode=np.zeros(1, np.int32),
            margin=np.ones(1, np.float32),
            scores={},
            explanation={},
            is_clamped=False,
            policy=POLICY,
            version=1,
            variant="greedy_mode",
            bundle_digest="ab" * 32,
            queue_ns=1,
            inference_ns=1,
            batch_rows=1,
        ),
        1,
    )
    totals = Totals()
    totals.update(1, metrics.snapshot())
    return {sample.name: set(sample.labels) for family in expose(totals.total()) for sample in family.samples}


EXPOSED = exposed_labels()
RECORDED = {"lom:mode_share:rate30m": {"job", "policy", "version", "mode"}}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\blom[a-z0-9_:]+", re.sub(r'"[^"]*"', '""', text)))


@pytest.mark.parametrize("query", queries(), ids=ids)
def test_every_metric_that_is_asked_for_is_exposed(query: Query) -> None:
    names = names_in(query.text)
    assert names
    assert names <= set(EXPOSED) | set(RECORDED)


@pytest.mark.parametrize("query", queries(), ids=ids)
def test_every_label_that_is_asked_for_is_there(query: Query) -> None:
    labels = EXPOSED | RECORDED
    known = TARGET_LABELS.union(*(labels[name] for name in names_in(query.text)))
    for name, matchers in re.findall(r"(lom[a-z0-9_:]+)\{([^}]*)\}", query.text):
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', matchers)):
            assert label in labels[name] | TARGET_LABELS, f"{label} of {name}"
    for listed in re.findall(r"\b(?:by|on|ignoring|without|group_left)\s*\(([^)]*)\)", query.text):
        assert {label.strip() for label in listed.split(",") if label.strip()} <= known


@pytest.mark.parametrize("query", queries(), ids=ids)
def test_every_reason_that_is_asked_for_exists(query: Query) -> None:
    for values in re.findall(r'\b(?:reason|code)(?:=~|!~|!=|=)"([^"]*)"', query.text):
        assert set(values.split("|")) <= {"OK", *Reason}


@pytest.mark.parametrize("query", queries(), ids=ids)
def test_brackets_and_quotes_close(query: Query) -> None:
    assert query.text.count('"') % 2 == 0
    closing = {"(": ")", "[": "]", "{": "}"}
    expected = []
    for character in re.sub(r'"[^"]*"', "", query.text):
        if character in closing:
            expected.append(closing[character])
        elif character in closing.values():
            assert expected.pop() == character
    assert expected == []


@pytest.mark.parametrize("query", queries(), ids=ids)
def test_counters_are_read_by_their_growth_and_gauges_are_not(query: Query) -> None:
    over_time = set(re.findall(r"\b(?:rate|increase|changes)\((lom[a-z0-9_]+)", query.text))
    for name in names_in(query.text) & set(EXPOSED):
        only_grows = name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert (name in over_time) == only_grows


def test_everything_that_is_exposed_is_looked_at_somewhere() -> None:
    looked_at = set().union(*(names_in(query.text) for query in queries()))
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in EXPOSED}
    assert {family for family in families if not any(name.startswith(family) for name in looked_at)} == set()


def test_the_dashboard_goes_by_the_datasource_that_is_chosen() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
    names = {variable["name"] for variable in dashboard()["templating"]["list"]}
    asked_for = set(re.findall(r"\$\{?([a-z]+)\}?", " ".join(query.text for query in queries())))
    assert asked_for <= names
    assert dashboard()["id"] is None


def test_panels_have_a_place_of_their_own() -> None:
    every = dashboard()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + line)
        for panel in every
        for column, line in itertools.product(range(panel["gridPos"]["w"]), range(panel["gridPos"]["h"]))
    ]
    assert len(set(cells)) == len(cells)
    assert max(column for column, _ in cells) < 24


def test_each_panel_says_what_it_means() -> None:
    for panel in panels():
        assert panel["title"]
        assert panel["description"].endswith(".")
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_each_alert_says_what_happened_and_how_bad_it_is() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert label in rule["expr"] or label in TARGET_LABELS | {"policy", "version", "mode"}


def promtool(*arguments: str) -> None:
    assert PROMTOOL is not None
    ended = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@needs_promtool
def test_prometheus_accepts_the_alerts() -> None:
    promtool("check", "rules", str(ALERTS))


@needs_promtool
def test_prometheus_accepts_the_dashboards_queries(tmp_path: Path) -> None:
    records = [
        {"record": f"query:{number}", "expr": re.sub(r"\$__(rate_)?interval", "5m", target["expr"])}
        for number, target in enumerate(target for panel in panels() for target in panel["targets"])
    ]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": records}]}))
    promtool("check", "rules", str(path))


SERVER = 'job="lom",instance="a"'
VERSION = f'{SERVER},policy="toy",version="1"'
VARIANT = f'{VERSION},variant="greedy_mode"'
SERVING = {f"lom_workers{{{SERVER}}}": "1x2000", f"lom_policy_default{{{VERSION}}}": "1x2000"}


def quick(share_below_20_ms: float) -> dict[str, str]:
    durations = f'lom_request_duration_seconds_bucket{{{VARIANT},phase="total"'
    return {
        f'{durations},le="0.01"}}': f"0+{100 * share_below_20_ms:g}x2000",
        f'{durations},le="0.025"}}': "0+100x2000",
        f'{durations},le="+Inf"}}': "0+100x2000",
    }


def modes(yesterday: tuple[int, int], today: tuple[int, int]) -> dict[str, str]:
    """A day and an hour of minutes, and another hour."""
    return {
        f'lom_mode_selected_total{{{VARIANT},mode="{mode}"}}': f"0+{yesterday[mode]}x1440 "
        f"{1440 * yesterday[mode]}+{today[mode]}x120"
        for mode in (0, 1)
    }


@needs_promtool
@pytest.mark.parametrize(
    ("alert", "series", "minutes", "fires"),
    [
        ("LomAbsent", {}, 5, True),
        ("LomAbsent", SERVING, 5, False),
        ("LomNotServing", {f"lom_workers{{{SERVER}}}": "0x2000"}, 5, True),
        ("LomNotServing", SERVING | {f"lom_policy_default{{{VERSION}}}": "0x2000"}, 5, True),
        ("LomNotServing", SERVING, 5, False),
        ("LomLatencyHigh", quick(0.9), 20, True),
        ("LomLatencyHigh", quick(1.0), 20, False),
        (
            "LomRefusing",
            {
                f'lom_refusals_total{{{SERVER},reason="QUEUE_FULL"}}': "0+2x2000",
                f'lom_requests_total{{{SERVER},policy="toy",code="OK"}}': "0+98x2000",
            },
            20,
            True,
        ),
        (
            "LomRefusing",
            {
                f'lom_refusals_total{{{SERVER},reason="SUPERSEDED"}}': "0+50x2000",
                f'lom_requests_total{{{SERVER},policy="toy",code="OK"}}': "0+50x2000",
            },
            20,
            False,
        ),
        ("LomInternalErrors", {f'lom_refusals_total{{{SERVER},reason="INTERNAL_ERROR"}}': "0x10 1x20"}, 12, True),
        ("LomInternalErrors", {f'lom_refusals_total{{{SERVER},reason="QUEUE_FULL"}}': "0+9x2000"}, 12, False),
        (
            "LomWarningsHigh",
            {
                f'lom_warnings_total{{{VARIANT},score="state_score"}}': "0+20x2000",
                f"lom_batch_rows_sum{{{VARIANT}}}": "0+100x2000",
            },
            30,
            True,
        ),
        (
            "LomWarningsHigh",
            {
                f'lom_warnings_total{{{VARIANT},score="state_score"}}': "0+5x2000",
                f"lom_batch_rows_sum{{{VARIANT}}}": "0+100x2000",
            },
            30,
            False,
        ),
        ("LomModeShareDrifts", modes((50, 50), (90, 10)), 1540, True),
        ("LomModeShareDrifts", modes((50, 50), (55, 45)), 1540, False),
        ("LomWorkerRestarted", {f"lom_worker_restarts_total{{{SERVER}}}": "0x10 1x20"}, 12, True),
        ("LomWorkerRestarted", {f"lom_worker_restarts_total{{{SERVER}}}": "3x200"}, 12, False),
        (
            "LomProviderFallback",
            {
                f'lom_policy_info{{{VERSION},provider="CUDAExecutionProvider"}}': "1x30 stale",
                f'lom_policy_info{{{VERSION},provider="CPUExecutionProvider"}}': "_x30 1x60",
            },
            60,
            True,
        ),
        ("LomProviderFallback", {f'lom_policy_info{{{VERSION},provider="CPUExecutionProvider"}}': "1x60"}, 30, False),
    ],
)
def test_an_alert_fires_when_it_should(
    tmp_path: Path, alert: str, series: Mapping[str, str], minutes: int, fires: bool
) -> None:
    query = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) > bool 0 or vector(0)'
    case = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": f"{minutes}m",
                        "exp_samples": [{"labels": "{}", "value": int(fires)}],
                    }
                ],
            }
        ],
    }
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(case))
    promtool("test", "rules", str(path))
