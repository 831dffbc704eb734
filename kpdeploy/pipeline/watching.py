"""Server, probe, rules, Prometheus and Alertmanager on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kpdeploy.progress import Progress
from kpdeploy.scratch import work_folder

if TYPE_CHECKING:
    from kpdeploy.monitoring.alerts import Intervals, Slo
    from kpdeploy.monitoring.stack import Stack
    from kpdeploy.serving.triton.server import Server


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What `watch` started: the server, Prometheus with Alertmanager, and the address of the probe's metrics."""

    server: Server
    stack: Stack
    probe: str


@contextmanager
def watch(
    repo: str,
    *,
    slo: Slo,
    webhook: str,
    rate: float = 1.0,
    window_seconds: float = 15.0,
    scrape_seconds: int = 5,
    prometheus_port: int = 0,
    alertmanager_port: int = 0,
    ready_timeout_s: float = 120.0,
    revive: bool = True,
    intervals: Intervals | None = None,
    progress: Progress | None = None,
) -> Iterator[Watching]:
    """Serve a repository on this machine and watch it until the block ends: server, probe, rules, Alertmanager.

    A model without a served baseline gets one first: 20 windows of `window_seconds`, kept beside its version. With
    `revive` False the server stays as Triton is: a model whose process died is not loaded again.

    Raises:
        KpdeployError: as kpdeploy.serve, kpdeploy.monitoring.served.record and kpdeploy.monitoring.stack.stack.
    """
    from kpdeploy.monitoring import alerts, probe, served, stack
    from kpdeploy.serving.repository import read_repository
    from kpdeploy.serving.triton.server import serve

    progress = progress or Progress()
    intervals = intervals or alerts.Intervals(every=scrape_seconds)
    for program in stack.PACKAGES:
        stack.program(program)
    with (
        serve(
            repo,
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            revive=revive,
            ready_timeout_s=ready_timeout_s,
            progress=progress,
        ) as server,
        work_folder() as work,
    ):
        url = f"grpc://{server.grpc}"
        exporter, watched, probes = probe.Exporter(), [], []
        for deployment in read_repository(repo):
            recorded = served.find_served(deployment)
            if recorded is None or recorded.rate != rate:
                recorded = served.record(
                    repo, deployment.model, url=url, rate=rate, window_seconds=window_seconds, progress=progress
                )
                recorded.write(served.served_path(deployment))
            watched.append(alerts.watched(deployment, (), (), recorded))
            probes.append(probe.Probe(repo, deployment.model, url=url, rate=rate, exporter=exporter, say=progress.say))
        rules = work / "rules.yml"
        rules.write_text(stack.to_yaml(alerts.rule_groups(watched, slo=slo, intervals=intervals)))
        with (
            probe.probing(probes),
            stack.export_metrics(exporter.registry, 0) as metrics,
            stack.stack(
                rules,
                webhook=webhook,
                targets={"kpdeploy-probe": metrics, "triton": f"{server.ports.client_host}:{server.ports.metrics}"},
                every_seconds=scrape_seconds,
                prometheus_port=prometheus_port,
                alertmanager_port=alertmanager_port,
            ) as running,
        ):
            yield Watching(server=server, stack=running, probe=metrics)
