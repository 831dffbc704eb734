"""A Grafana dashboard of the models of a repository, made with Grafana's own SDK."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

from kpdeploy.monitoring import metrics

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")


@dataclass(frozen=True, kw_only=True)
class PanelQuery:
    """One panel: its title, its unit in Grafana's names, and (legend, expression) of each line."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


MODEL = '{model=~"$model"}'


def rows() -> dict[str, tuple[PanelQuery, ...]]:
    """All panels by row."""
    return {"Overview": _overview(), "Latency": _latency(), "Server": _server()}


def _overview() -> tuple[PanelQuery, ...]:
    served = f"{metrics.UP.name}{MODEL}", f"{metrics.READY.name}{MODEL}", f"{metrics.ARTIFACT_MATCHES.name}{MODEL}"
    return (
        PanelQuery(
            title="Up, ready, right artifact",
            unit="short",
            queries=(
                ("{{model}} up", served[0]),
                ("{{model}} ready", served[1]),
                ("{{model}} artifact ({{source}})", served[2]),
            ),
        ),
        PanelQuery(
            title="Errors of golden requests by reason",
            unit="reqps",
            queries=(("{{model}} {{reason}}", f"rate({metrics.ERRORS.name}{MODEL}[1m])"),),
        ),
        PanelQuery(
            title="Distance from the golden answers",
            unit="sci",
            queries=(
                ("{{model}} {{output}}", f"{metrics.DRIFT.name}{MODEL}"),
                ("{{model}} {{output}} tolerance", f"{metrics.DRIFT_TOLERANCE.name}{MODEL}"),
            ),
        ),
        PanelQuery(
            title="Versions served",
            unit="short",
            queries=(("{{model}} v{{served_version}}", metrics.ARTIFACT.name + MODEL),),
        ),
    )


def _latency() -> tuple[PanelQuery, ...]:
    p50, p99 = (f"kpdeploy:latency_{q}_seconds:long{MODEL}" for q in ("p50", "p99"))
    base = f"kpdeploy:baseline_p50_seconds{MODEL}"
    return (
        PanelQuery(
            title="p50 of golden requests, and its baseline",
            unit="s",
            queries=(
                ("{{model}} {{point}}", p50),
                ("baseline {{point}}", base),
                ("baseline × 1.25 {{point}}", f"1.25 * {base}"),
            ),
        ),
        PanelQuery(title="p99 of golden requests", unit="s", queries=(("{{model}} {{point}}", p99),)),
        PanelQuery(
            title="Times its baseline",
            unit="short",
            queries=(
                ("{{model}}", f"kpdeploy:latency_ratio:long{MODEL}"),
                ("{{model}} without waiting for cores", f"kpdeploy:own_latency_ratio:long{MODEL}"),
            ),
        ),
        PanelQuery(
            title="The machine: tasks a core, slowdown of the server",
            unit="short",
            queries=(
                ("tasks a core", f"{metrics.DEMAND.name}{MODEL}"),
                ("slowdown", f"{metrics.SLOWDOWN.name}{MODEL}"),
            ),
        ),
    )


def _server() -> tuple[PanelQuery, ...]:
    def rate(name: str) -> str:
        return f"sum by (model, version) (rate(nv_inference_{name}{MODEL}[1m]))"

    return (
        PanelQuery(title="Requests of all clients", unit="reqps", queries=(("{{model}}", rate("request_success")),)),
        PanelQuery(
            title="Batch size", unit="short", queries=(("{{model}}", f"{rate('count')} / {rate('exec_count')}"),)
        ),
        PanelQuery(
            title="Queue's share of the time in the server",
            unit="percentunit",
            queries=(("{{model}}", f"{rate('queue_duration_us')} / {rate('request_duration_us')}"),),
        ),
        PanelQuery(
            title="Memory",
            unit="bytes",
            queries=(
                ("server's processes", f"{metrics.MEMORY.name}{MODEL}"),
                ("machine", "nv_cpu_memory_used_bytes"),
                ("GPU {{gpu_uuid}}", "nv_gpu_memory_used_bytes"),
            ),
        ),
        PanelQuery(
            title="CPU and GPU in use",
            unit="percentunit",
            queries=(("CPU", "nv_cpu_utilization"), ("GPU {{gpu_uuid}}", "nv_gpu_utilization")),
        ),
    )


def dashboard(models: Sequence[str]) -> dict[str, Any]:
    """The dashboard as JSON values, for Grafana's import."""
    made = (
        build.Dashboard("kpdeploy: " + ", ".join(models))
        .uid("kpdeploy-" + "-".join(models)[:30])
        .tags(["kpdeploy"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(build.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(
            build.QueryVariable("model").label("Model").datasource(SOURCE)
            .query(f"label_values({metrics.UP.name}, model)").multi(True).include_all(True)
        )
        .annotation(
            build.AnnotationQuery().name("Deploys").datasource(SOURCE).enable(True).icon_color("blue")
            .expr(f"{metrics.ARTIFACT.name}{MODEL} unless {metrics.ARTIFACT.name}{MODEL} offset 1m")
        )
    )  # fmt: skip
    for row, panels in rows().items():
        made = made.with_row(build.Row(row))
        for panel in panels:
            made = made.with_panel(_panel(panel))
    found: dict[str, Any] = _without_nulls(json.loads(json.dumps(made.build(), cls=JSONEncoder)))
    return found


def _panel(panel: PanelQuery) -> timeseries.Panel:
    made = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(SOURCE).height(8).span(12).min(0)
    for number, (legend, expr) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + number))
        made = made.with_target(query)
    return made


def _without_nulls(value: Any) -> Any:
    """Grafana's schema knows no null where a key may be absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
