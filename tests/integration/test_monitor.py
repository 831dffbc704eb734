"""A served model watched by the real Prometheus and Alertmanager: the dashboard shows it, and harm is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from kpdeploy import export
from kpdeploy.monitoring import dashboard, stack
from kpdeploy.monitoring.alerts import Intervals, Slo
from kpdeploy.pipeline import Watching, watch
from kpdeploy.serving.triton import control

MODEL = "watched"
POINTS = ("batch=1", "batch=2")
PATIENCE_SECONDS = 90
# What a machine without a GPU cannot have, what is there only once something failed, and what TorchServe counts.
ABSENT = ("nv_gpu_", "kpdeploy_probe_errors_total", "ts_", "kpdeploy_batch_rows", "Requests5XX")


@dataclass
class Webhook:
    """What Alertmanager sent, as (status, alert)."""

    alerts: list[tuple[str, str]] = field(default_factory=list)

    def add(self, alert: dict[str, Any]) -> None:
        self.alerts.append((alert["status"], alert["labels"]["alertname"]))

    def got(self, status: str, name: str) -> bool:
        return (status, name) in self.alerts


@dataclass(frozen=True)
class Scene:
    running: Watching
    webhook: Webhook


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    for name in stack.PACKAGES:
        stack.program(name)
    repo = tmp_path_factory.mktemp("watched") / "models"
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    export(module, torch.randn(4, 64), repo=repo, name=MODEL, format="torchscript", fuse="never")
    webhook = Webhook()
    intervals = Intervals(every=1, short=5, long=10, hold=2, dead=3)
    slo = Slo(quantile=0.99, seconds=1.0, availability=0.99)
    with (
        stack.receiver(webhook.add) as url,
        watch(
            str(repo), slo=slo, webhook=url, rate=10, window_seconds=0.5, scrape_seconds=1, intervals=intervals,
            revive=False,
        ) as running,
    ):  # fmt: skip
        assert running.server.served.keys() == {MODEL}
        yield Scene(running, webhook)


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def queries() -> list[tuple[str, str]]:
    """(panel, expression) of all panels, for this model."""
    return [
        (panel.title, expr.replace("$model", MODEL))
        for panels in dashboard.rows({MODEL: POINTS}).values()
        for panel in panels
        for _, expr in panel.queries
    ]


@pytest.mark.parametrize(("panel", "expr"), [q for q in queries() if not any(name in q[1] for name in ABSENT)])
def test_each_query_of_the_dashboard_has_data(scene: Scene, panel: str, expr: str) -> None:
    until(lambda: scene.running.stack.query(expr), f"{panel}: {expr} gives nothing")


def test_a_dead_model_is_told_with_its_reason_and_its_return_too(scene: Scene) -> None:
    server = scene.running.server
    for pid in server.process.stubs():
        os.kill(pid, signal.SIGKILL)
    until(lambda: scene.webhook.got("firing", "KpdeployStubDead"), f"got {scene.webhook.alerts}")
    (errors,) = [expr for _, expr in queries() if ABSENT[1] in expr]
    assert scene.running.stack.query(errors)
    # Triton loads a model again only if one of its files was touched.
    (folder,) = (server.log.parent / "repository" / MODEL).glob("[0-9]*")
    os.utime(folder / "model.py")
    control.load(server.http, MODEL, timeout_s=60)
    until(lambda: scene.webhook.got("resolved", "KpdeployStubDead"), f"got {scene.webhook.alerts}")


def test_a_server_that_stands_still_is_told_and_its_return_too(scene: Scene) -> None:
    process = psutil.Process(scene.running.server.process.pid)
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.suspend()
    try:
        until(lambda: scene.webhook.got("firing", "KpdeployServerDown"), f"got {scene.webhook.alerts}")
    finally:
        for member in reversed(family):
            member.resume()
    until(lambda: scene.webhook.got("resolved", "KpdeployServerDown"), f"got {scene.webhook.alerts}")


def test_nothing_is_left_running_when_the_watch_ends(tmp_path: Path) -> None:
    """Last, after the scene's own programs: those of a stack of its own are gone when its block ends."""
    rules = tmp_path / "rules.yml"
    rules.write_text(stack.to_yaml({"groups": []}))
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with stack.stack(rules, webhook="http://127.0.0.1:9/", targets={}, prometheus_port=0, alertmanager_port=0) as up:
        assert up.query("vector(1)")[0]["value"][1] == "1"
        assert len({p.pid for p in psutil.Process().children(recursive=True)} - before) == 2
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
    assert not up.folder.exists()
