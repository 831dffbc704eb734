"""Prometheus rules for the models of a repository: what is recorded, what is an alert, and what to do then.

Latencies are compared like with like: with the served baseline, which came through the probe's own path, and only while
the machine is not much busier than it was then. Where none was recorded, the windows that the export took of the
packaged artifact are an upper bound.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpdeploy.baseline import BUCKETS_SECONDS, Windows
from kpdeploy.deployment import Deployment
from kpdeploy.errors import BaselineUnusable, UnknownName
from kpdeploy.monitoring import metrics
from kpdeploy.monitoring.counters import BY, counters_of
from kpdeploy.monitoring.served import ServedBaseline, quantile

RUNBOOK = "docs/runbook.md"
RATIO = 1.25
"""A latency this many times its baseline is a regression; more where the baseline's own windows vary much."""
MOST_RATIO = 2.0
SPREADS, OWN_SPREADS = 3, 2
"""So many spreads of the baseline's windows of 15 s are noise. An alert looks at 30 s and 60 s together, whose means
vary half as much where windows are independent: those without what was waited for cores nearly are."""
BUSIER = 1.25
"""Latencies are not judged while the demand on the machine is this many times that of the baseline, and a quarter of a
core for each core more."""
ALLOWANCE_RATIO = 2.0
ALLOWANCE_SECONDS = 0.010
"""Without a served baseline: what serving may add to a time taken in process (network, queue, batching)."""
SLOW_EFFECT = 1.05
SLOW_Z = 3.5
SLOW_WINDOWS = 30
SLOW_HOLD_SECONDS = 600
"""The slow alert looks again every minute for ever: benchmarks/detectors.py has its false alarms and its power."""
AUTOCORRELATION = 0.7
"""Of neighbouring windows' medians on real machines: n windows tell as much as n (1 - ρ) / (1 + ρ) independent ones."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Lengths of the windows, in seconds. The defaults want a scrape and an evaluation every 5 s."""

    every: int = 5
    short: int = 30
    long: int = 60
    hold: int = 10
    dead: int = 15


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What users were promised: `quantile` of the requests within `seconds`, and `availability` of them answered."""

    quantile: float | None = None
    seconds: float = 0.0
    availability: float | None = None

    @classmethod
    def parse(cls, latency: str | None, availability: float | None) -> Slo:
        """From texts such as "p99=50ms" and a percentage such as 99.9.

        Raises:
            UnknownName: a text of another form, or a promise that is none.
        """
        if availability is not None and not 50 <= availability < 100:
            raise UnknownName(
                f"an availability of {availability:g} % is no objective", next_step="give one such as 99.9"
            )
        share = availability / 100 if availability is not None else None
        if latency is None:
            return cls(availability=share)
        found = re.fullmatch(r"p(\d{2}(?:\.\d+)?|\d{3,4})=(\d+(?:\.\d+)?)(ms|s)", latency.strip())
        if found is None:
            raise UnknownName(f"{latency!r} is no objective of latency", next_step="write it as p99=50ms")
        digits = found[1]
        quantile = float(f"0.{digits.replace('.', '')}")
        seconds = float(found[2]) / (1000 if found[3] == "ms" else 1)
        if not BUCKETS_SECONDS[0] <= seconds <= BUCKETS_SECONDS[-1]:
            raise UnknownName(
                f"{latency!r} cannot be judged",
                why=f"the histogram reaches from {BUCKETS_SECONDS[0]:g} s to {BUCKETS_SECONDS[-1]:g} s",
            )
        return cls(quantile=quantile, seconds=seconds, availability=share)

    @property
    def bucket(self) -> float:
        """The bound at which latency is judged: the histogram's next one."""
        return next(bound for bound in BUCKETS_SECONDS if bound >= self.seconds)


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One alert: when, how urgent, and what a person needs at three in the morning."""

    name: str
    expr: str
    hold: int
    severity: str
    summary: str
    meaning: str
    causes: str
    command: str
    labels: Mapping[str, str]

    def rule(self, runbook: str) -> dict[str, Any]:
        annotations = {
            "summary": self.summary,
            "description": self.meaning,
            "causes": self.causes,
            "next": self.command,
            "runbook_url": f"{runbook}#{self.name.lower()}",
        }
        rule: dict[str, Any] = {"alert": self.name, "expr": self.expr}
        if self.hold:
            rule["for"] = f"{self.hold}s"
        return {**rule, "labels": {"severity": self.severity, **self.labels}, "annotations": annotations}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a golden request should take, in seconds. `own_p50` is without what is waited for cores; None: not known."""

    p50: float
    p99: float
    own_p50: float | None = None


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One deployment with what its latencies are compared with, by the label of the golden request's point."""

    deployment: Deployment
    expected: Mapping[str, Expected]
    served: ServedBaseline | None

    @property
    def selector(self) -> str:
        return f'{{model="{self.deployment.model}",version="{self.deployment.version}"}}'

    @property
    def every_version(self) -> str:
        """For what must hold of any version, those that are published after the rules were written too."""
        return f'{{model="{self.deployment.model}"}}'

    @property
    def name(self) -> str:
        return f"{self.deployment.model} version {self.deployment.version}"

    @property
    def ratio(self) -> float:
        """How much slower is an alert: RATIO, or more where the baseline's own windows vary."""
        if self.served is None:
            return 1.0
        noise = (OWN_SPREADS if self.served.own else SPREADS) * self.served.spread
        return round(min(MOST_RATIO, max(RATIO, 1 + noise)), 3)

    @property
    def demand(self) -> float:
        """Above this more is asked of the machine than when the baseline was recorded, and times do not compare."""
        known = sorted(self.served.demand) if self.served is not None else []
        usual = known[int(0.9 * (len(known) - 1))] if known else 0.25
        return round(BUSIER * usual + BUSIER - 1, 3)

    @property
    def against(self) -> str:
        if self.served is not None:
            return f"the served baseline of {self.served.recorded}, at {self.served.rate:g} requests/s"
        return (
            f"the export's in-process times for requests at least as large, × {ALLOWANCE_RATIO:g} "
            f"and {ALLOWANCE_SECONDS * 1e3:g} ms for serving (no served baseline is recorded)"
        )


def watched(
    deployment: Deployment, windows: Sequence[Windows], points: Sequence[str], served: ServedBaseline | None
) -> Watched:
    """What each golden request should take: as served, else an upper bound from the export.

    Raises:
        BaselineUnusable: there is neither.
    """
    if served is not None:
        taken = {
            p.point: Expected(
                p50=p.median,
                p99=quantile(0.99, p.counts),
                own_p50=quantile(0.5, p.own_counts) if served.own else None,
            )
            for p in served.points
        }
        return Watched(deployment=deployment, served=served, expected=taken)
    expected = {point: bound for point in points if (bound := _bound(point, windows)) is not None}
    if not expected:
        raise BaselineUnusable(
            f"{deployment.model} version {deployment.version} has no baseline",
            why="neither a served one is recorded, nor has the export timed a request as large as a golden one",
            next_step=f"kpdeploy monitor baseline {deployment.repository} --url HOST:PORT",
        )
    return Watched(deployment=deployment, served=None, expected=expected)


def _bound(point: str, windows: Sequence[Windows]) -> Expected | None:
    """The shortest times that the export took for a request at least as large in every axis, with the allowance."""
    sizes = dict(part.split("=") for part in point.split(",") if "=" in part)
    larger = [e for e in windows if all(e.point.get(axis, 0) >= int(size) for axis, size in sizes.items())]
    if not larger:
        return None
    p50, p99 = (
        min(map(statistics.median, taken)) for taken in zip(*((e.p50_ms, e.p99_ms) for e in larger), strict=True)
    )
    return Expected(
        p50=ALLOWANCE_RATIO * p50 / 1e3 + ALLOWANCE_SECONDS, p99=ALLOWANCE_RATIO * p99 / 1e3 + ALLOWANCE_SECONDS
    )


def rule_groups(models: Sequence[Watched], *, slo: Slo, intervals: Intervals, runbook: str = RUNBOOK) -> dict[str, Any]:
    """The contents of a Prometheus rules file."""
    groups = []
    for model in models:
        name = f"kpdeploy-{model.deployment.model}"
        alerts = [alert.rule(runbook) for alert in alerts_of(model, slo=slo, intervals=intervals)]
        every = f"{intervals.every}s"
        groups.append({"name": name, "interval": every, "rules": [*recorded(model, intervals, slo), *alerts]})
        groups.append({"name": f"{name}-windows", "interval": "60s", "rules": list(_windows(model))})
    others = [alert.rule(runbook) for alert in alerts_everywhere()]
    groups.append({"name": "kpdeploy", "interval": f"{intervals.every}s", "rules": others})
    return {"groups": groups}


def recorded(model: Watched, intervals: Intervals, slo: Slo) -> Iterator[dict[str, Any]]:
    """Baselines as constants, and the latencies as the alerts and the dashboard read them."""
    labels = {"model": model.deployment.model, "version": str(model.deployment.version)}
    source = "served" if model.served is not None else "export"
    for point, expected in model.expected.items():
        for name, seconds in (("p50", expected.p50), ("p99", expected.p99), ("own_p50", expected.own_p50)):
            if seconds is not None:
                yield {
                    "record": f"kpdeploy:baseline_{name}_seconds",
                    "expr": f"vector({seconds:.6g})",
                    "labels": {**labels, "point": point, "source": source},
                }
    bucket = f"{metrics.LATENCY.name}_bucket{model.selector}"
    for name, seconds in (("short", intervals.short), ("long", intervals.long)):
        for q in (0.5, 0.99):
            yield {
                "record": f"kpdeploy:latency_p{q * 100:.0f}_seconds:{name}",
                "expr": f"histogram_quantile({q}, sum by ({BY}, point, le) (rate({bucket}[{seconds}s])))",
            }
        yield {"record": f"kpdeploy:latency_ratio:{name}", "expr": _ratio(model, f"{seconds}s", own=False)}
        # What was waited for a core is not the model's; where nobody can tell, nothing is taken off.
        yield {"record": f"kpdeploy:own_latency_ratio:{name}", "expr": _ratio(model, f"{seconds}s", own=True)}
        yield {
            "record": f"kpdeploy:error_ratio:{name}",
            "expr": f"sum by ({BY}) (rate({metrics.ERRORS.name}{model.every_version}[{seconds}s])) "
            f"/ sum by ({BY}) (rate({metrics.REQUESTS.name}{model.every_version}[{seconds}s]))",
        }
    yield from _burn_records(model, slo)


def _ratio(model: Watched, window: str, *, own: bool) -> str:
    """Medians of a window over those of the baseline, the mean of all golden requests."""
    s = model.selector
    parts = [(metrics.OWN_LATENCY, "own_p50")] if own and model.served is not None and model.served.own else []
    return f" or on ({BY}) ".join(
        f"avg by ({BY}) (histogram_quantile(0.5, sum by ({BY}, point, le) (rate({metric.name}_bucket{s}[{window}]))) "
        f"/ on ({BY}, point) kpdeploy:baseline_{baseline}_seconds{s})"
        for metric, baseline in [*parts, (metrics.LATENCY, "p50")]
    )


BURN = (("5m", "1h", 14.4, "page"), ("30m", "6h", 6.0, "ticket"))


def _burn_records(model: Watched, slo: Slo) -> Iterator[dict[str, Any]]:
    s = model.selector
    for window in sorted({w for pair in BURN for w in pair[:2]}):
        asked = f"sum by ({BY}) (increase({metrics.REQUESTS.name}{s}[{window}]))"
        if slo.availability is not None:
            failed = f"sum by ({BY}) (increase({metrics.ERRORS.name}{s}[{window}]))"
            wrong = f"sum by ({BY}) (increase({metrics.WRONG.name}{s}[{window}]))"
            yield {"record": f"kpdeploy:slo_unavailable_ratio:{window}", "expr": f"({failed} + {wrong}) / {asked}"}
        if slo.quantile is not None:
            bucket = f'{metrics.LATENCY.name}_bucket{s[:-1]},le="{slo.bucket}"}}'
            count = f"sum by ({BY}) (increase({metrics.LATENCY.name}_count{s}[{window}]))"
            quick = f"sum by ({BY}) (increase({bucket}[{window}]))"
            yield {"record": f"kpdeploy:slo_slow_ratio:{window}", "expr": f"1 - {quick} / {count}"}


def _windows(model: Watched) -> Iterator[dict[str, Any]]:
    """One value a minute, for the slow alert: medians of windows, which are compared, never single requests."""
    yield {
        "record": "kpdeploy:window_ratio",
        "expr": f"({_ratio(model, '1m', own=True)}) "
        f"unless on ({BY}) (avg_over_time({metrics.DEMAND.name}{model.selector}[1m]) > {model.demand})",
    }


def alerts_of(model: Watched, *, slo: Slo, intervals: Intervals) -> list[Alert]:
    """All alerts of one version, the most urgent first."""
    return [
        *_availability(model, intervals),
        *_answers(model, intervals),
        *_latency(model, intervals),
        *_server(model),
        *_objectives(model, slo),
    ]


def _alert(model: Watched, name: str, expr: str, **texts: Any) -> Alert:
    return Alert(name=name, expr=expr, labels={"model": model.deployment.model}, **texts)


def _availability(model: Watched, intervals: Intervals) -> Iterator[Alert]:
    s, repo = model.every_version, model.deployment.repository
    yield _alert(
        model, "KpdeployServerDown", f"{metrics.UP.name}{s} == 0", hold=intervals.dead, severity="page",
        summary=f"{model.deployment.model}: the server does not answer",
        meaning="Nothing answers at the server's address, or not in time: no request of this model is served.",
        causes="the server ended or was stopped; it is overloaded and times out; the network; a wrong --url",
        command=f"kpdeploy verify {repo} --url HOST:PORT; read the server's log; kpdeploy serve {repo}",
    )  # fmt: skip
    yield _alert(
        model, "KpdeployModelNotReady",
        f"({metrics.READY.name}{s} == 0) and on ({BY}) ({metrics.UP.name}{s} == 1)",
        hold=intervals.dead, severity="page",
        summary=f"{model.deployment.model}: the server is up, and has not loaded it",
        meaning="The server answers, and says that this version is not loaded: its requests fail.",
        causes="the model failed to load; the server serves another version; it was unloaded by hand",
        command=f"curl -X POST HOST:8000/v2/repository/index; kpdeploy doctor {repo}",
    )  # fmt: skip
    yield _alert(
        model, "KpdeployStubDead",
        f'sum by ({BY}) (increase({metrics.ERRORS.name}{s[:-1]},reason="stub_dead"}}[{intervals.short}s])) > 0',
        hold=0, severity="page",
        summary=f"{model.deployment.model}: the process that runs it is dead",
        meaning="Triton's python backend lost its process. Triton never restarts it and still reports ready, while "
        "requests fail (kpdeploy serve loads the model again by itself).",
        causes="out of memory (dmesg), a crash in the runtime or a kernel, a kill",
        command=f"dmesg | tail; curl -X POST HOST:8000/v2/repository/models/{model.deployment.model}/load",
    )  # fmt: skip
    yield _alert(
        model, "KpdeployErrors",
        f"kpdeploy:error_ratio:short{s} > 0.05 and kpdeploy:error_ratio:long{s} > 0.05",
        hold=0, severity="page",
        summary=f"{model.deployment.model}: golden requests fail",
        meaning="More than 5 % of the golden requests got no answer, over the short and the long window.",
        causes="see the reason in kpdeploy_probe_errors_total; the model, its version, its process, or overload",
        command=f"kpdeploy verify {repo} --url HOST:PORT",
    )  # fmt: skip
    count = counters_of(model.deployment)
    yield _alert(
        model, "KpdeployTrafficErrors",
        f"{count.failed('5m')} / ({count.failed('5m')} + {count.answered('5m')}) > 0.05",
        hold=60, severity="page",
        summary=f"{model.deployment.model}: more than 5 % of all requests fail",
        meaning=f"{count.whose}: requests of any client fail, over five minutes.",
        causes="clients that send invalid inputs; a crash; a dependency of the model",
        command=f"{count.where}; read the server's log",
    )  # fmt: skip


def _answers(model: Watched, intervals: Intervals) -> Iterator[Alert]:
    s, repo = model.every_version, model.deployment.repository
    drift, limit = f"{metrics.DRIFT.name}{s}", f"{metrics.DRIFT_TOLERANCE.name}{s}"
    yield _alert(
        model, "KpdeployWrongAnswers",
        f"max by ({BY}) ({drift} > {limit}) or "
        f"sum by ({BY}) (increase({metrics.WRONG.name}{s}[{intervals.short}s])) > 0",
        hold=0, severity="page",
        summary=f"{model.deployment.model}: its answers are not the golden ones",
        meaning="The distance of an answer from the golden answer is above the tolerance with which it was proven.",
        causes="other weights than the exported ones; another runtime, precision or CPU; a corrupted file; a kernel",
        command=f"kpdeploy verify {repo} --url HOST:PORT; kpdeploy ops validate",
    )  # fmt: skip
    yield _alert(
        model, "KpdeployWrongArtifact", f"min by ({BY}) ({metrics.ARTIFACT_MATCHES.name}{s}) == 0",
        hold=intervals.hold, severity="page",
        summary=f"{model.deployment.model}: another artifact is served, or its files were changed",
        meaning="The version or the digest that the server states is not the repository's, or a file of the version is "
        "not the one that was proven (label `source` of kpdeploy_probe_artifact_matches).",
        causes="a deploy or a rollback that did not reach this server; a server that polls no more; an edited file",
        command=f"curl HOST:8000/v2/models/{model.deployment.model}; kpdeploy verify {repo} --url HOST:PORT",
    )  # fmt: skip


def _latency(model: Watched, intervals: Intervals) -> Iterator[Alert]:
    s, repo = model.selector, model.deployment.repository
    own = "kpdeploy:own_latency_ratio"
    slow = f"{own}:short{s} > {model.ratio} and {own}:long{s} > {model.ratio}"
    busy = " or ".join(
        f"(avg_over_time({metrics.DEMAND.name}{s}[{w}s]) > {model.demand})" for w in (intervals.short, intervals.long)
    )
    causes = (
        "another runtime, thread count or instance count; a cold or throttled CPU; a model without its fused kernels; "
        "a neighbour on the machine; clients that send larger batches"
    )
    yield _alert(
        model, "KpdeployLatencyRegressed", f"({slow}) unless on ({BY}) ({busy})",
        hold=intervals.hold, severity="page",
        summary=f"{model.name}: golden requests take more than {model.ratio:g} × their time",
        meaning=f"The median latency, over {intervals.short} s and over {intervals.long} s, is above {model.ratio:g} × "
        f"{model.against}; "
        f"without what the processes waited for a core. Not judged above a demand of {model.demand:g} tasks a core.",
        causes=causes,
        command=f"kpdeploy bench HOST:PORT --repo {repo} --model {model.deployment.model}; look at the dashboard",
    )  # fmt: skip
    yield _alert(
        model, "KpdeployLatencyRegressedBusy",
        f"kpdeploy:latency_ratio:long{s} > {model.ratio} and on ({BY}) ({busy})",
        hold=3600, severity="ticket",
        summary=f"{model.name}: slower for an hour, on a busier machine",
        meaning=f"As KpdeployLatencyRegressed, but more than {model.demand:g} tasks want each core, which may be "
        "the reason. If this is the load of every day, record the served baseline under it.",
        causes="more traffic than when the baseline was recorded; a neighbour on the machine",
        command=f"top; kpdeploy monitor baseline {repo} --url HOST:PORT",
    )  # fmt: skip
    if model.served is not None:
        yield _slow(model, causes)
    other = f'{{model="{model.deployment.model}",version!="{model.deployment.version}"}}'
    yield _alert(
        model, "KpdeployRulesStale", f"{metrics.UP.name}{other}", hold=600, severity="ticket",
        summary=f"{model.deployment.model}: another version is watched than the rules were written for",
        meaning=f"Latencies and objectives are judged for version {model.deployment.version} only; answers, errors and "
        "the artifact are judged for every version.",
        causes="a version was published, and the rules were not written again",
        command=f"kpdeploy monitor baseline {repo} --url HOST:PORT; kpdeploy monitor rules {repo} -o rules.yml",
    )  # fmt: skip


def _slow(model: Watched, causes: str) -> Alert:
    """Significance over windows: a robust z of the last hour's window medians against the baseline's."""
    assert model.served is not None
    w = f"kpdeploy:window_ratio{model.selector}[1h]"
    spread = model.served.spread
    shrink = (1 - AUTOCORRELATION) / (1 + AUTOCORRELATION)
    known = max(1.0, shrink * len(model.served.points[0].p50_seconds))
    variance = f"((quantile_over_time(0.75, {w}) - quantile_over_time(0.25, {w})) / 1.349) ^ 2 * 1.571"
    z = (
        f"(quantile_over_time(0.5, {w}) - 1) / "
        f"sqrt({variance} / ({shrink:.4g} * count_over_time({w})) + {1.571 * spread**2 / known:.4g} + 1e-6)"
    )
    repo = model.deployment.repository
    return _alert(
        model, "KpdeployLatencySlowlyRegressed",
        f"({z} > {SLOW_Z:g}) and quantile_over_time(0.5, {w}) > {SLOW_EFFECT:g} "
        f"and count_over_time({w}) >= {SLOW_WINDOWS}",
        hold=SLOW_HOLD_SECONDS, severity="ticket",
        summary=f"{model.name}: golden requests became slower, by more than {SLOW_EFFECT - 1:.0%}",
        meaning=f"The medians of the last hour's one-minute windows lie more than {SLOW_Z:g} standard errors and "
        f"{SLOW_EFFECT - 1:.0%} above {model.against}.",
        causes=causes,
        command=f"kpdeploy check {repo}; look for the step on the dashboard",
    )  # fmt: skip


def _server(model: Watched) -> Iterator[Alert]:
    count = counters_of(model.deployment)
    yield _alert(
        model, "KpdeployQueueing",
        f"({count.queue('5m')} / {count.whole('5m')} > 0.5) and {count.requests('5m')} > 5",
        hold=600, severity="ticket",
        summary=f"{model.name}: requests wait longer than they run",
        meaning="More than half of the time in the server goes by in the queue, for ten minutes: it is full.",
        causes="more traffic than one instance takes; batches that do not form; a too long queue delay",
        command=f"kpdeploy bench HOST:PORT --model {model.deployment.model} --mode open; add instances or machines",
    )  # fmt: skip
    rate_now, rate_usual = (count.rows(w) for w in ("10m", "6h"))
    now, usual = (f"{count.rows(w)} / {count.calls(w)}" for w in ("10m", "6h"))
    yield _alert(
        model, "KpdeployBatchCollapsed",
        f"({now} < 0.5 * ({usual})) and ({usual} > 2) and ({rate_now} > 0.8 * {rate_usual})",
        hold=600, severity="ticket",
        summary=f"{model.name}: batches have half their usual size, at the usual traffic",
        meaning="Requests that used to share a batch run alone: each costs more, and the throughput is less.",
        causes="clients that now send other lengths (the batcher merges only equal shapes); a changed queue delay; "
        "a configuration without dynamic batching",
        command=f"curl HOST:8000/v2/models/{model.deployment.model}/config; look at batch sizes on the dashboard",
    )  # fmt: skip
    yield _alert(
        model, "KpdeployMemoryGrowing",
        f"({metrics.MEMORY.name}{model.selector} > 1.5 * ({metrics.MEMORY.name}{model.selector} offset 1h)) and "
        f"({metrics.MEMORY.name}{model.selector} - ({metrics.MEMORY.name}{model.selector} offset 1h) > 5e8)",
        hold=600, severity="ticket",
        summary=f"{model.name}: the server holds half as much memory again as an hour ago",
        meaning="The resident memory of the server's processes grew by more than half and 500 MB within an hour.",
        causes="a leak; a cache without a limit; larger requests than before",
        command="top; restart the server before the machine runs out of memory",
    )  # fmt: skip


def _objectives(model: Watched, slo: Slo) -> Iterator[Alert]:
    s, repo = model.selector, model.deployment.repository
    kinds = []
    if slo.availability is not None:
        promise = f"{slo.availability:.6g} of the requests answered, and answered right"
        kinds.append(("KpdeploySloAvailability", "slo_unavailable_ratio", 1 - slo.availability, promise))
    if slo.quantile is not None:
        promise = f"{slo.quantile:.6g} of the answers within {slo.seconds:g} s (judged at {slo.bucket:g} s)"
        kinds.append(("KpdeploySloLatency", "slo_slow_ratio", 1 - slo.quantile, promise))
    for name, record, budget, promise in kinds:
        for short, long, factor, severity in BURN:
            limit = f"{factor * budget:.6g}"
            yield _alert(
                model, f"{name}{severity.capitalize()}",
                f"kpdeploy:{record}:{long}{s} > {limit} and kpdeploy:{record}:{short}{s} > {limit}",
                hold=0, severity=severity,
                summary=f"{model.name}: the objective is missed at {factor:g} × the pace that it allows",
                meaning=f"Promised: {promise}. Over {long} and over {short} the error budget burns {factor:g} × too "
                "fast (Google's SRE workbook, multiwindow burn rates).",
                causes="whatever other alert of this model fires; traffic beyond what was planned",
                command=f"look at the other alerts of this model; kpdeploy verify {repo} --url HOST:PORT",
            )  # fmt: skip


def alerts_everywhere() -> Iterator[Alert]:
    """What is no model's: the probe, the clocks, and the memory of the machine and its GPUs."""
    clock = metrics.CLOCK.name
    yield Alert(
        name="KpdeployProbeDown", expr=f"absent({clock})", hold=30, severity="page", labels={},
        summary="the probe is down: no model is watched",
        meaning="Prometheus gets no metrics of kpdeploy's probe; all other alerts are blind.",
        causes="the probe ended; its port is not in Prometheus' configuration",
        command="kpdeploy monitor probe models/ --url HOST:PORT",
    )  # fmt: skip
    yield Alert(
        name="KpdeployClockSkew", expr=f"abs({clock} - timestamp({clock})) > 10", hold=60, severity="ticket", labels={},
        summary="the probe's clock and Prometheus' differ by more than 10 s",
        meaning="Latencies are right (they come from one monotonic clock); times of events and of baselines are not.",
        causes="no NTP on one of the machines; a suspended virtual machine",
        command="timedatectl; chronyc tracking",
    )  # fmt: skip
    memory = "nv_{kind}_memory_used_bytes / nv_{kind}_memory_total_bytes > 0.95"
    yield Alert(
        name="KpdeployMemoryFull",
        expr=" or ".join(memory.format(kind=kind) for kind in ("cpu", "gpu")),
        hold=5 * 60, severity="page", labels={},
        summary="the server's machine or GPU has less than 5 % of its memory left",
        meaning="Triton's own metrics of the machine: the next large request may end a process.",
        causes="a leak; too many instances or models; a neighbour on the machine",
        command="free -g; nvidia-smi; unload a model, or lower instance counts",
    )  # fmt: skip
