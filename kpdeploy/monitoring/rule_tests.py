"""Unit tests of the rules, for `promtool test rules`: made-up series that must raise each alert, and that must not."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kpdeploy.baseline import BUCKETS_SECONDS
from kpdeploy.monitoring import metrics
from kpdeploy.monitoring.alerts import Alert, Intervals, Slo, Watched, alerts_everywhere, alerts_of

Series = dict[str, str]
"""Values by series, in promtool's notation."""

MINUTES = 12


def test_file(models: Sequence[Watched], *, slo: Slo, intervals: Intervals, runbook: str, rules: str) -> dict[str, Any]:
    """The contents of a file for `promtool test rules`: `rules` is the name of the rules file beside it."""
    cases = [case for model in models for case in _cases(model, slo, intervals, runbook)]
    cases += _memory_cases(intervals, runbook)
    return {"rule_files": [rules], "evaluation_interval": f"{intervals.every}s", "tests": cases}


test_file.__test__ = False  # type: ignore[attr-defined]  # pytest takes its name for a test's


def _cases(model: Watched, slo: Slo, intervals: Intervals, runbook: str) -> Iterator[dict[str, Any]]:
    alerts = {alert.name: alert for alert in alerts_of(model, slo=slo, intervals=intervals)}
    healthy = _healthy(model, intervals, slo)
    yield _case(model, "healthy", healthy, intervals, [(alert, False) for alert in alerts.values()], runbook)
    for name, harm in _harms(model, intervals, slo).items():
        if name in alerts:
            # Other latencies are other buckets: none of the healthy ones may stay.
            slow = any(key.startswith(metrics.LATENCY.name) for key in harm)
            kept = {k: v for k, v in healthy.items() if not (slow and k.startswith(metrics.LATENCY.name))}
            yield _case(model, name, {**kept, **harm}, intervals, [(alerts[name], True)], runbook)
    if model.served is not None and model.served.own:
        steps = MINUTES * 60 // intervals.every
        kept = {k: v for k, v in healthy.items() if not k.startswith(metrics.LATENCY.name)}
        busy = {**_latencies(model, steps, 2 * model.ratio, slo), **_own_latencies(model, steps, 0.8, slo)}
        quiet = [(alerts["KpdeployLatencyRegressed"], False)]
        yield _case(model, "slow because others have the cores", {**kept, **busy}, intervals, quiet, runbook)


def _case(
    model: Watched,
    name: str,
    series: Series,
    intervals: Intervals,
    expected: Sequence[tuple[Alert, bool]],
    runbook: str,
) -> dict[str, Any]:
    told = [(alert, [_expected(model, alert, runbook)] if fires else []) for alert, fires in expected]
    return _named_case(f"{model.name}: {name}", series, intervals, told)


def _named_case(
    name: str, series: Series, intervals: Intervals, expected: Sequence[tuple[Alert, list[dict[str, Any]]]]
) -> dict[str, Any]:
    return {
        "name": name,
        "interval": f"{intervals.every}s",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "alert_rule_test": [
            {"eval_time": f"{MINUTES}m", "alertname": alert.name, "exp_alerts": told} for alert, told in expected
        ],
    }


def _memory_cases(intervals: Intervals, runbook: str) -> Iterator[dict[str, Any]]:
    """The memory of a machine without a GPU, and of GPUs with room and without."""
    (alert,) = (alert for alert in alerts_everywhere() if alert.name == "KpdeployMemoryFull")
    rule, steps = alert.rule(runbook), MINUTES * 60 // intervals.every
    kinds = (("a machine without a GPU", "cpu", "", 50), ("a GPU with room", "gpu", "GPU-1", 50))
    for name, kind, uuid, percent in (*kinds, ("a full GPU", "gpu", "GPU-1", 96), ("a full machine", "cpu", "", 96)):
        labels = {"gpu_uuid": uuid} if uuid else {}
        told = {"exp_labels": {**rule["labels"], **labels}, "exp_annotations": rule["annotations"]}
        series = {
            f"nv_{kind}_memory_{what}_bytes{_braced(labels)}": f"{size}x{steps}"
            for what, size in (("used", percent), ("total", 100))
        }
        yield _named_case(name, series, intervals, [(alert, [told] if percent > 95 else [])])


def _expected(model: Watched, alert: Alert, runbook: str) -> dict[str, Any]:
    rule = alert.rule(runbook)
    # The version comes with the series, but for Triton's own counters, which are summed over versions.
    version = {} if alert.name == "KpdeployTrafficErrors" else {"version": str(model.deployment.version)}
    return {"exp_labels": {**rule["labels"], **version}, "exp_annotations": rule["annotations"]}


def _labels(model: Watched, **more: str) -> str:
    return _braced({"model": model.deployment.model, "version": str(model.deployment.version), **more})


def _braced(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


def _healthy(model: Watched, intervals: Intervals, slo: Slo) -> Series:
    """A model that does what it should: one request a scrape and point, as fast as its baseline."""
    steps = MINUTES * 60 // intervals.every
    # As fast as the baseline and as was promised, whichever is less.
    quick = slo.seconds / max(expected.p50 for expected in model.expected.values()) if slo.seconds else 1.0
    outputs = [spec.name for spec in model.deployment.manifest.signature.outputs]
    series = {
        metrics.REQUESTS.name + _labels(model): f"0+{len(model.expected)}x{steps}",
        metrics.WRONG.name + _labels(model): f"0x{steps}",
        metrics.UP.name + _labels(model): f"1x{steps}",
        metrics.READY.name + _labels(model): f"1x{steps}",
        metrics.DEMAND.name + _labels(model): f"0.1x{steps}",
    }
    for source in metrics.SOURCES:
        series[metrics.ARTIFACT_MATCHES.name + _labels(model, source=source)] = f"1x{steps}"
    for reason in metrics.REASONS:
        series[metrics.ERRORS.name + _labels(model, reason=reason)] = f"0x{steps}"
    for output in outputs:
        series[metrics.DRIFT.name + _labels(model, output=output)] = f"0.0000001x{steps}"
        series[metrics.DRIFT_TOLERANCE.name + _labels(model, output=output)] = f"0.00001x{steps}"
    return {**series, **_latencies(model, steps, min(0.8, quick), slo)}


def _bounds(seconds: float, slo: Slo) -> list[float]:
    """The few buckets that matter: those around a latency and that of the objective. All of them would take minutes."""
    above = bisect.bisect_left(BUCKETS_SECONDS, seconds)
    wanted = {*BUCKETS_SECONDS[max(0, above - 1) : above + 1], float("inf")}
    return sorted(wanted | ({slo.bucket} if slo.seconds else set()))


def _latencies(model: Watched, steps: int, factor: float, slo: Slo) -> Series:
    """Every request takes `factor` times its baseline."""
    taken = {point: factor * expected.p50 for point, expected in model.expected.items()}
    return _histograms(model, metrics.LATENCY, taken, steps, slo)


def _own_latencies(model: Watched, steps: int, factor: float, slo: Slo) -> Series:
    """The same without what is waited for cores; nothing where that is not known."""
    known = {point: expected.own_p50 for point, expected in model.expected.items()}
    taken = {point: factor * seconds for point, seconds in known.items() if seconds is not None}
    return _histograms(model, metrics.OWN_LATENCY, taken, steps, slo)


def _histograms(model: Watched, metric: metrics.Metric, taken: Mapping[str, float], steps: int, slo: Slo) -> Series:
    """One request a step at each point, which takes these seconds."""
    series = {}
    for point, seconds in taken.items():
        for bound in _bounds(seconds, slo):
            le = "+Inf" if bound == float("inf") else str(bound)
            values = f"0+1x{steps}" if bound >= seconds else f"0x{steps}"
            series[f"{metric.name}_bucket" + _labels(model, point=point, le=le)] = values
        series[f"{metric.name}_count" + _labels(model, point=point)] = f"0+1x{steps}"
    return series


def _harms(model: Watched, intervals: Intervals, slo: Slo) -> dict[str, Series]:
    """What changes in the healthy series, by the alert that it must raise."""
    steps = MINUTES * 60 // intervals.every
    output = model.deployment.manifest.signature.outputs[0].name
    all_fail = f"0+{len(model.expected)}x{steps}"
    return {
        "KpdeployServerDown": {metrics.UP.name + _labels(model): f"0x{steps}"},
        "KpdeployModelNotReady": {metrics.READY.name + _labels(model): f"0x{steps}"},
        "KpdeployStubDead": {metrics.ERRORS.name + _labels(model, reason="stub_dead"): all_fail},
        "KpdeployErrors": {metrics.ERRORS.name + _labels(model, reason="refused"): all_fail},
        "KpdeployWrongAnswers": {metrics.DRIFT.name + _labels(model, output=output): f"0.5x{steps}"},
        "KpdeployWrongArtifact": {metrics.ARTIFACT_MATCHES.name + _labels(model, source="server"): f"0x{steps}"},
        "KpdeploySloAvailabilityPage": {metrics.ERRORS.name + _labels(model, reason="timeout"): all_fail},
        "KpdeploySloAvailabilityTicket": {metrics.WRONG.name + _labels(model): all_fail},
        "KpdeploySloLatencyPage": _latencies(model, steps, 1e9, slo),
        **_counted(model, steps),
        "KpdeployLatencyRegressed": {
            **_latencies(model, steps, 2 * model.ratio, slo),
            **_own_latencies(model, steps, 2 * model.ratio, slo),
        },
    }


def _counted(model: Watched, steps: int) -> dict[str, Series]:
    """Harms that the server's own counters show (see kpdeploy.monitoring.counters)."""
    hundred = f"0+100x{steps}"
    if model.deployment.manifest.target == "torchserve":
        labels = f'{{model_name="{model.deployment.model}",model_version="default"}}'
        return {
            "KpdeployQueueing": {
                f"ts_queue_latency_microseconds{labels}": f"0+900x{steps}",
                f"ts_inference_latency_microseconds{labels}": hundred,
                f"ts_inference_requests_total{labels}": hundred,
            },
            "KpdeployTrafficErrors": {'Requests2XX{Level="Host"}': hundred, 'Requests5XX{Level="Host"}': hundred},
        }
    return {
        "KpdeployQueueing": {
            "nv_inference_queue_duration_us" + _labels(model): f"0+900x{steps}",
            "nv_inference_request_duration_us" + _labels(model): f"0+1000x{steps}",
            "nv_inference_request_success" + _labels(model): hundred,
        },
        "KpdeployTrafficErrors": {
            "nv_inference_request_success" + _labels(model): hundred,
            "nv_inference_request_failure" + _labels(model, reason="BACKEND"): hundred,
        },
    }
