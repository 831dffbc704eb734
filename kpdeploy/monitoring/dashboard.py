"""A Grafana dashboard of the models of a repository, made with Grafana's own SDK.

tests/grafana_dashboard.schema.json, made of Grafana's types by scripts/grafana_schema.sh, says what Grafana takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, DynamicConfigValue

from kpdeploy.monitoring import metrics

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
MODEL = '{model=~"$model"}'


@dataclass(frozen=True, kw_only=True)
class PanelQuery:
    """One panel: its title, its unit in Grafana's names, and (legend, expression) of each line. `band` names two lines
    that are drawn as one area: the upper and the lower."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    band: tuple[str, str] | None = None


def rows(models: Mapping[str, Sequence[str]]) -> dict[str, tuple[PanelQuery, ...]]:
    """All panels by row, for models with the points of their golden requests."""
    return {
        "Overview": _overview(),
        **{f"Latency of {model}": _latency(model, points) for model, points in models.items()},
        "Server": _server(),
        "GPU": _gpu(),
    }


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


def _latency(model: str, points: Sequence[str]) -> tuple[PanelQuery, ...]:
    """A panel for each golden request: its p50 and p99, and those of the baseline as a band."""

    def lines(point: str) -> tuple[tuple[str, str], ...]:
        which = f'{{model="{model}",point="{point}"}}'
        named = (
            ("p50", "latency_p50_seconds:long"), ("p99", "latency_p99_seconds:long"),
            ("baseline p50", "baseline_p50_seconds"), ("baseline p99", "baseline_p99_seconds"),
        )  # fmt: skip
        return tuple((legend, f"max by (model, point) (kpdeploy:{record}{which})") for legend, record in named)

    return tuple(
        PanelQuery(title=f"{model}, {point}", unit="s", queries=lines(point), band=("baseline p99", "baseline p50"))
        for point in dict.fromkeys(points)
    )


def _server() -> tuple[PanelQuery, ...]:
    """By the counters of Triton, and by those of TorchServe: of the two that is not there the lines are empty."""

    def rate(name: str) -> str:
        return f"sum by (model, version) (rate(nv_inference_{name}{MODEL}[1m]))"

    def ts(name: str, label: str = "model_name") -> str:
        return f'sum by ({label}) (rate({name}{{{label}=~"$model"}}[1m]))'

    named = "{{model_name}}"
    queue, run = ts("ts_queue_latency_microseconds"), ts("ts_inference_latency_microseconds")
    rows, calls = (ts(f"kpdeploy_batch_rows_{kind}", "ModelName") for kind in ("sum", "count"))
    return (
        PanelQuery(
            title="Requests of all clients",
            unit="reqps",
            queries=(("{{model}}", rate("request_success")), (named, ts("ts_inference_requests_total"))),
        ),
        PanelQuery(
            title="Those that failed",
            unit="reqps",
            queries=(("{{model}}", rate("request_failure")), ("TorchServe", "sum(rate(Requests5XX[1m]))")),
        ),
        PanelQuery(
            title="Batch size",
            unit="short",
            queries=(
                ("{{model}}", f"{rate('count')} / {rate('exec_count')}"),
                ("{{ModelName}}", f"{rows} / {calls}"),
            ),
        ),
        PanelQuery(
            title="Queue's share of the time in the server",
            unit="percentunit",
            queries=(
                ("{{model}}", f"{rate('queue_duration_us')} / {rate('request_duration_us')}"),
                (named, f"{queue} / ({queue} + {run})"),
            ),
        ),
        PanelQuery(
            title="Memory",
            unit="bytes",
            queries=(
                ("server's processes", f"{metrics.MEMORY.name}{MODEL}"),
                ("machine", "nv_cpu_memory_used_bytes"),
            ),
        ),
        PanelQuery(title="CPU in use", unit="percentunit", queries=(("CPU", "nv_cpu_utilization"),)),
    )


def _gpu() -> tuple[PanelQuery, ...]:
    """By Triton's own metrics; without a GPU they are empty, and harm nothing."""
    each = "GPU {{gpu_uuid}}"
    return (
        PanelQuery(title="GPU in use", unit="percentunit", queries=((each, "nv_gpu_utilization"),)),
        PanelQuery(
            title="GPU memory",
            unit="bytes",
            queries=((each, "nv_gpu_memory_used_bytes"), (f"{each} total", "nv_gpu_memory_total_bytes")),
        ),
        PanelQuery(
            title="GPU power",
            unit="watt",
            queries=((each, "nv_gpu_power_usage"), (f"{each} limit", "nv_gpu_power_limit")),
        ),
    )


def dashboard(models: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The dashboard of models, with the points of their golden requests, as JSON values for Grafana's import."""
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
    for row, panels in rows(models).items():
        made = made.with_row(build.Row(row))
        for panel in panels:
            made = made.with_panel(_panel(panel).span(8 if len(panels) > 2 else 12))
    found: dict[str, Any] = _without_nulls(json.loads(json.dumps(made.build(), cls=JSONEncoder)))
    return _as_grafana_takes_it(found)


def _panel(panel: PanelQuery) -> timeseries.Panel:
    made = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(SOURCE).height(8).min(0)
    for number, (legend, expr) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + number))
        made = made.with_target(query)
    if panel.band is not None:
        upper, lower = panel.band
        edge = [DynamicConfigValue(id_val="custom.lineWidth", value=0)]
        area = [
            DynamicConfigValue(id_val="custom.fillBelowTo", value=lower),
            DynamicConfigValue(id_val="custom.fillOpacity", value=20),
        ]
        made = made.override_by_name(upper, [*edge, *area]).override_by_name(lower, edge)
    return made


def _as_grafana_takes_it(made: dict[str, Any]) -> dict[str, Any]:
    """Without what the SDK writes and Grafana's schema does not know (any more), and with the annotation's query where
    it belongs."""
    unknown = ("id", "auto", "auto_min", "auto_count")
    variables = [{k: v for k, v in entry.items() if k not in unknown} for entry in made["templating"]["list"]]
    annotations = [
        {**{k: v for k, v in entry.items() if k != "expr"}, "target": {"refId": "Anno", "expr": entry["expr"]}}
        for entry in made["annotations"]["list"]
    ]
    kept = {key: value for key, value in made.items() if key != "style"}
    return {**kept, "templating": {"list": variables}, "annotations": {"list": annotations}}


def _without_nulls(value: Any) -> Any:
    """Grafana's schema knows no null where a key may be absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
