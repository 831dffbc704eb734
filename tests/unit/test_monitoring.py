"""Rules, baseline and probe without a server: what is judged, and by which numbers."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fastjsonschema
import numpy as np
import pytest
from tiny_version import manifest

from kpdeploy.baseline import BUCKETS_SECONDS, Windows, histogram
from kpdeploy.deployment import Deployment
from kpdeploy.errors import BaselineUnusable, ClockSkewed, ModelNotServed, RulesBroken, UnknownName, Unreachable
from kpdeploy.monitoring import metrics, stack
from kpdeploy.monitoring.alerts import Expected, Intervals, Slo, Watched, alerts_of, rule_groups, watched
from kpdeploy.monitoring.dashboard import dashboard, rows
from kpdeploy.monitoring.machine import Waits
from kpdeploy.monitoring.probe import reason_of, schedule
from kpdeploy.monitoring.rule_tests import test_file as rule_test_file
from kpdeploy.monitoring.served import PointLatency, ServedBaseline, quantile

DEPLOYMENT = Deployment(repository="models", manifest=manifest())
NEEDS_PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="NOT RUN: promtool is not installed")


def served(**changes: object) -> ServedBaseline:
    values = tuple(0.004 + 0.0001 * (i % 3) for i in range(20))
    point = PointLatency(
        point="batch=1,width=3", p50_seconds=values, p99_seconds=values, counts=histogram(values),
        own_p50_seconds=values, own_counts=histogram(values),
    )  # fmt: skip
    found = ServedBaseline(
        model="tiny", version=0, digest=DEPLOYMENT.manifest.digest, recorded="2026-01-01T00:00:00+00:00", rate=1.0,
        points=(point,), demand=(0.1,) * 20,
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


def model(target: str = "triton") -> Watched:
    deployment = replace(DEPLOYMENT, manifest=replace(DEPLOYMENT.manifest, target=target))
    return watched(deployment, (), (), served())


def test_buckets_tell_a_shift_of_a_quarter_apart() -> None:
    steps = [high / low for low, high in itertools.pairwise(BUCKETS_SECONDS)]
    assert max(steps) < 1.2
    assert (BUCKETS_SECONDS[0], BUCKETS_SECONDS[-1] > 60) == (0.0005, True)


def test_a_quantile_of_the_histogram_is_near_that_of_the_values() -> None:
    values = np.random.default_rng(0).lognormal(-5, 0.3, 5000)
    for q in (0.5, 0.99):
        assert quantile(q, histogram(list(values))) == pytest.approx(np.quantile(values, q), rel=0.05)


@NEEDS_PROMTOOL
@pytest.mark.parametrize("target", ["triton", "torchserve"])
def test_promtool_accepts_the_rules_and_their_tests_pass(target: str, tmp_path: Path) -> None:
    slo = Slo.parse("p99=50ms", 99.9)
    rules, tests = tmp_path / "rules.yml", tmp_path / "rules_test.yml"
    rules.write_text(stack.to_yaml(rule_groups([model(target)], slo=slo, intervals=Intervals())))
    cases = rule_test_file([model(target)], slo=slo, intervals=Intervals(), runbook="docs/runbook.md", rules=rules.name)
    tests.write_text(stack.to_yaml(cases))
    stack.check_rules(rules)
    stack.run_rule_tests(tests)


@NEEDS_PROMTOOL
def test_a_rule_test_fails_where_its_alert_does_not_come(tmp_path: Path) -> None:
    groups = rule_groups([model()], slo=Slo(), intervals=Intervals())
    cases = rule_test_file([model()], slo=Slo(), intervals=Intervals(), runbook="docs/runbook.md", rules="rules.yml")
    text = stack.to_yaml(groups).replace("kpdeploy_probe_up", "kpdeploy_probe_gone")
    (tmp_path / "rules.yml").write_text(text)
    (tmp_path / "tests.yml").write_text(stack.to_yaml(cases))
    with pytest.raises(RulesBroken, match=r"tests\.yml") as error:
        stack.run_rule_tests(tmp_path / "tests.yml")
    assert "KpdeployServerDown" in error.value.why


@NEEDS_PROMTOOL
def test_broken_rules_are_told_in_promtools_words(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text("groups: [{name: x, rules: [{record: a, expr: 'rate('}]}]")
    with pytest.raises(RulesBroken) as error:
        stack.check_rules(tmp_path / "rules.yml")
    assert "parse error" in error.value.why


def test_every_alert_says_what_it_means_and_what_to_do_and_stands_in_the_runbook() -> None:
    runbook = (Path(__file__).parents[2] / "docs" / "runbook.md").read_text()
    for group in rule_groups([model()], slo=Slo.parse("p99=50ms", 99.9), intervals=Intervals())["groups"]:
        for rule in group["rules"]:
            if name := rule.get("alert"):
                said = rule["annotations"]
                assert all(said[key] for key in ("summary", "description", "causes", "next", "runbook_url"))
                assert f"\n## {name}\n" in runbook


def test_without_a_served_baseline_the_export_is_an_upper_bound_and_the_alert_says_so() -> None:
    point = {"batch": 1, "width": 9}
    timed = Windows.of([4.0, 4.0, 4.0, 5.0], point=point, rows=1, memory_bytes=0, count=1)
    slower = Windows.of([40.0] * 4, point={"batch": 1, "width": 90}, rows=1, memory_bytes=0, count=1)
    found = watched(DEPLOYMENT, (slower, timed), ("batch=1,width=3", "batch=8,width=9"), None)
    (expected,) = found.expected.items()
    assert expected == ("batch=1,width=3", Expected(p50=pytest.approx(0.018), p99=pytest.approx(0.01994)))
    (alert,) = (a for a in alerts_of(found, slo=Slo(), intervals=Intervals()) if a.name == "KpdeployLatencyRegressed")
    assert "no served baseline" in alert.meaning


def test_without_any_baseline_there_are_no_rules() -> None:
    with pytest.raises(BaselineUnusable, match="has no baseline") as error:
        watched(DEPLOYMENT, (), ("batch=1,width=3",), None)
    assert "kpdeploy monitor baseline" in error.value.next_step


def test_a_noisy_baseline_asks_for_a_larger_shift() -> None:
    values = tuple(0.004 * factor for factor in (1, 1.3, 0.8, 1.2, 0.7) * 4)
    noisy = PointLatency(point="p", p50_seconds=values, p99_seconds=values, counts=histogram(values))
    assert model().ratio == 1.25
    assert watched(DEPLOYMENT, (), (), served(points=(noisy,))).ratio > 1.5


def test_what_is_judged_is_without_what_was_waited_for_cores_where_it_is_known() -> None:
    ratios = {r["record"]: r["expr"] for g in rule_groups([model()], slo=Slo(), intervals=Intervals())["groups"]
              for r in g["rules"] if "ratio" in r.get("record", "")}  # fmt: skip
    assert metrics.OWN_LATENCY.name in ratios["kpdeploy:own_latency_ratio:short"]
    assert metrics.OWN_LATENCY.name not in ratios["kpdeploy:latency_ratio:short"]
    (point,) = served().points
    elsewhere = served(points=(replace(point, own_p50_seconds=(), own_counts=()),))
    assert not elsewhere.own
    rules = json.dumps(rule_groups([watched(DEPLOYMENT, (), (), elsewhere)], slo=Slo(), intervals=Intervals()))
    assert metrics.OWN_LATENCY.name not in rules


def test_a_request_is_timed_without_waiting_for_cores() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        # This process is its own server: what it works and sleeps is its own, what it waits for a core is not.
        waits = Waits(f"127.0.0.1:{server.getsockname()[1]}")
        waits.begin()
        start, used = time.monotonic(), time.process_time()
        time.sleep(0.05)
        while time.process_time() - used < 0.05:
            pass
        took = time.monotonic() - start
        own = waits.own_seconds()
    if own is None:
        pytest.skip("NOT RUN: this kernel does not tell what threads wait for a core")
    assert 0.09 <= own <= took + 0.01
    elsewhere = Waits("192.0.2.1:8001")
    elsewhere.begin()
    assert elsewhere.own_seconds() is None


def test_a_served_baseline_is_read_back_and_refused_for_another_artifact(tmp_path: Path) -> None:
    path = tmp_path / "served.json"
    served().write(path)
    assert ServedBaseline.read(path, DEPLOYMENT) == served()
    other = Deployment(repository="models", manifest=replace(DEPLOYMENT.manifest, version=2))
    with pytest.raises(BaselineUnusable, match="baseline of tiny version 0"):
        ServedBaseline.read(path, other)
    path.write_text("{")
    with pytest.raises(BaselineUnusable, match="cannot be read"):
        ServedBaseline.read(path, DEPLOYMENT)


def test_a_baseline_from_the_future_is_a_wrong_clock(tmp_path: Path) -> None:
    served(recorded="2999-01-01T00:00:00+00:00").write(tmp_path / "served.json")
    with pytest.raises(ClockSkewed, match="2999"):
        ServedBaseline.read(tmp_path / "served.json", DEPLOYMENT)


@pytest.mark.parametrize("text", ["p99", "p99=50", "99=50ms", "p99=0ms", "p99=999s"])
def test_an_objective_of_another_form_is_an_error(text: str) -> None:
    with pytest.raises(UnknownName):
        Slo.parse(text, None)


def test_late_requests_are_due_when_they_were_due() -> None:
    moments = schedule(0.01, threading.Event())
    _, first = next(moments)
    time.sleep(0.1)
    dues = [next(moments)[1] - first for _ in range(5)]
    assert dues == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unreachable("x", why="Deadline Exceeded"), "timeout"),
        (Unreachable("x", why="failed to connect to all addresses"), "unreachable"),
        (ModelNotServed("x", why="Stub process 'tiny_0_0' is not healthy."), "stub_dead"),
        (ModelNotServed("x", why="Request for unknown model: 'tiny' version 3 is not at ready state"), "not_served"),
        (ModelNotServed("x", why="invalid argument"), "refused"),
    ],
)
def test_reasons(error: Unreachable | ModelNotServed, reason: str) -> None:
    assert reason_of(error) == reason
    assert reason in metrics.REASONS


GRAFANA = json.loads((Path(__file__).parents[1] / "grafana_dashboard.schema.json").read_text())
MODELS = {"tiny": ("batch=1,width=3", "batch=8,width=3"), "other": ("fixed",)}


def grafana_takes(made: dict[str, Any]) -> None:
    fastjsonschema.compile(GRAFANA, use_default=False)(made)


def test_the_dashboard_is_what_grafana_takes_and_holds_every_panel() -> None:
    made = dashboard(MODELS)
    grafana_takes(made)
    titles = [panel["title"] for panel in made["panels"]]
    assert len(titles) == len(set(titles))
    for row, panels in rows(MODELS).items():
        assert {row, *(panel.title for panel in panels)} <= set(titles)


def test_panels_do_not_overlap() -> None:
    taken = set()
    for panel in dashboard(MODELS)["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        cells = {(column, line) for column in range(x, x + w) for line in range(y, y + h)}
        assert x + w <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("style",), "dark"),
        (("panels", 1, "type"), "graph"),
        (("panels", 1, "targets", 0, "expr"), None),
        (("panels", 1, "gridPos", "w"), "wide"),
        (("panels", 1, "fieldConfig", "defaults", "unknown"), 1),
        (("annotations", "list", 0, "expr"), "up"),
    ],
)
def test_the_schema_of_grafana_refuses_what_it_does_not_know(place: tuple[str | int, ...], value: object) -> None:
    made: Any = dashboard(MODELS)
    where = made
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = value
    with pytest.raises(fastjsonschema.JsonSchemaValueException):
        grafana_takes(made)


@NEEDS_PROMTOOL
def test_prometheus_reads_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(stack.to_yaml({"groups": []}))
    config = stack.prometheus_config(
        rules=tmp_path / "rules.yml", alertmanager="127.0.0.1:9093", targets={"p": "127.0.0.1:1"}, every_seconds=5
    )
    (tmp_path / "prometheus.yml").write_text(stack.to_yaml(config))
    subprocess.run(["promtool", "check", "config", str(tmp_path / "prometheus.yml")], check=True, capture_output=True)


# The compose file


def test_the_files_of_the_compose_file_are_what_monitor_up_runs_with(tmp_path: Path) -> None:
    import yaml

    folder = Path(__file__).parents[2] / "docker"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert {"triton", "probe", "prometheus", "alertmanager"} <= services.keys()
    # Nothing is open to the network.
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    config = yaml.safe_load((folder / "monitoring" / "prometheus.yml").read_text())
    assert config == stack.prometheus_config(
        rules=Path("/etc/prometheus/rules/rules.yml"),
        alertmanager="alertmanager:9093",
        targets={"kpdeploy-probe": "triton:9105", "triton": "triton:8002"},
        every_seconds=5,
    )
    told = yaml.safe_load((folder / "monitoring" / "alertmanager.yml").read_text())
    assert told == stack.alertmanager_config("http://webhook.example:8080/")
    mounted = [v.partition(":")[0] for s in services.values() for v in s.get("volumes", ()) if v.startswith("./")]
    assert all((folder / path).is_file() for path in mounted)
    assert len(mounted) == 2
