"""Prometheus and Alertmanager on this machine, for trying and for tests: started together, ended together."""

from __future__ import annotations

import contextlib
import http.server
import json
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from kpdeploy.errors import PortInUse, ProgramMissing, RulesBroken

PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}
READY_SECONDS = 20.0
LOOPBACK = "127.0.0.1"
GROUP_WAIT_SECONDS = 5


def program(name: str) -> str:
    """The path of one of PACKAGES' programs.

    Raises:
        ProgramMissing: it is not installed.
    """
    # Debian calls Alertmanager prometheus-alertmanager, its makers alertmanager.
    for candidate in (name, name.removeprefix("prometheus-")):
        if found := shutil.which(candidate):
            return found
    raise ProgramMissing(
        f"{name} is not installed",
        why=f"there is no program of this name on PATH; Debian and Ubuntu have it in the package {PACKAGES[name]}",
        next_step=f"sudo apt-get install {PACKAGES[name]}",
    )


def to_yaml(data: Any) -> str:
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, width=1000, allow_unicode=True))


def check_rules(path: Path) -> None:
    """Let Prometheus' own tool check a rules file.

    Raises:
        RulesBroken: it refuses them.
        ProgramMissing: promtool is not installed.
    """
    _promtool("check", "rules", str(path))


def run_rule_tests(path: Path) -> None:
    """Run the unit tests in a file for `promtool test rules`. Raises as check_rules."""
    _promtool("test", "rules", str(path))


def _promtool(*arguments: str) -> None:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RulesBroken(
            f"promtool refuses {arguments[-1]}",
            why=(done.stderr + done.stdout).strip(),
            next_step="write the rules anew with `kpdeploy monitor rules`, or fix what is named",
        )


def prometheus_config(
    *, rules: Path, alertmanager: str, targets: Mapping[str, str], every_seconds: int
) -> dict[str, Any]:
    """Scrape `targets` (addresses by job name), judge `rules`, and send alerts to `alertmanager`."""
    every = f"{every_seconds}s"
    return {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(rules)],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()
        ],
    }


def alertmanager_config(webhook: str) -> dict[str, Any]:
    """All alerts to one webhook, soon and resolved too; those that a dead server explains are held back."""
    return {
        "route": {
            "receiver": "webhook",
            "group_by": ["alertname", "model"],
            "group_wait": f"{GROUP_WAIT_SECONDS}s",
            "group_interval": "10s",
            "repeat_interval": "4h",
        },
        "receivers": [{"name": "webhook", "webhook_configs": [{"url": webhook, "send_resolved": True}]}],
        "inhibit_rules": [
            {
                "source_matchers": ['alertname = "KpdeployServerDown"'],
                "target_matchers": ['alertname =~ "Kpdeploy(Errors|ModelNotReady|Latency.*|Slo.*)"'],
                "equal": ["model", "version"],
            }
        ],
    }


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What runs: addresses as URLs, and the folder with configurations, data and logs."""

    prometheus: str
    alertmanager: str
    folder: Path
    _prometheus: subprocess.Popen[bytes]

    def reload(self) -> None:
        """Let Prometheus read its rules again."""
        self._prometheus.send_signal(signal.SIGHUP)

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector of an expression, as Prometheus' API gives it."""
        url = f"{self.prometheus}/api/v1/query"
        data = urllib.parse.urlencode({"query": expr}).encode()
        with _OPENER.open(urllib.request.Request(url, data=data), timeout=10) as reply:
            result: list[dict[str, Any]] = json.loads(reply.read())["data"]["result"]
        return result


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def stack(
    rules: Path,
    *,
    webhook: str,
    targets: Mapping[str, str],
    every_seconds: int = 5,
    prometheus_port: int = 9090,
    alertmanager_port: int = 9093,
) -> Iterator[Stack]:
    """Prometheus and Alertmanager on loopback until the block ends; ports of 0 are chosen.

    Raises:
        ProgramMissing: one is not installed, or does not start; `why` has the end of its log.
        RulesBroken: Prometheus refuses the rules.
        PortInUse: a port is taken.
    """
    programs = {name: program(name) for name in ("prometheus", "prometheus-alertmanager")}
    check_rules(rules)
    ports = [_port(name, port) for name, port in (("prometheus", prometheus_port), ("alertmanager", alertmanager_port))]
    prometheus, alertmanager = (f"{LOOPBACK}:{port}" for port in ports)
    with tempfile.TemporaryDirectory(prefix="kpdeploy-monitor-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "alertmanager.yml").write_text(to_yaml(alertmanager_config(webhook)))
        config = prometheus_config(
            rules=rules.absolute(), alertmanager=alertmanager, targets=targets, every_seconds=every_seconds
        )
        (folder / "prometheus.yml").write_text(to_yaml(config))
        with contextlib.ExitStack() as running:
            running.enter_context(
                _running(
                    folder, "alertmanager", alertmanager,
                    [programs["prometheus-alertmanager"], f"--config.file={folder / 'alertmanager.yml'}",
                     f"--storage.path={folder / 'alertmanager'}", f"--web.listen-address={alertmanager}",
                     "--cluster.listen-address="],
                )
            )  # fmt: skip
            process = running.enter_context(
                _running(
                    folder, "prometheus", prometheus,
                    [programs["prometheus"], f"--config.file={folder / 'prometheus.yml'}",
                     f"--storage.tsdb.path={folder / 'prometheus'}", f"--web.listen-address={prometheus}",
                     "--storage.tsdb.retention.time=7d"],
                )
            )  # fmt: skip
            yield Stack(
                prometheus=f"http://{prometheus}",
                alertmanager=f"http://{alertmanager}",
                folder=folder,
                _prometheus=process,
            )


def _port(name: str, port: int) -> int:
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((LOOPBACK, port))
        except OSError as error:
            raise PortInUse(
                f"port {port} ({name}) cannot be used",
                why=error.strerror or str(error),
                next_step=f"free it, or let one be chosen: --{name}-port 0",
            ) from None
        return int(asked.getsockname()[1])


@contextmanager
def _running(folder: Path, name: str, address: str, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _await_ready(name, address, process, log)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(name: str, address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), _OPENER.open(f"http://{address}/-/ready", timeout=2):
            return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-3:])
    raise ProgramMissing(f"{name} does not start", why=tail, next_step=f"run {name} by hand with these flags")


@contextmanager
def export_metrics(registry: CollectorRegistry, port: int, *, host: str = LOOPBACK) -> Iterator[str]:
    """The registry's metrics over HTTP until the block ends; the value is the address. Port 0 is chosen.

    Raises:
        PortInUse: the port is taken.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise PortInUse(
            f"port {port} (of the probe's metrics) cannot be used",
            why=error.strerror or str(error),
            next_step="free it, or give another one with --port",
        ) from None
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def receiver(received: Callable[[dict[str, Any]], None]) -> Iterator[str]:
    """A webhook for Alertmanager on loopback: `received` gets each alert of each notification. The value is its URL."""

    class Webhook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for alert in body["alerts"]:
                received(alert)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Silent: the alerts are the news."""

    server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Webhook)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
