"""`kpdeploy monitor`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kpdeploy.cli import NearCommands
from kpdeploy.cli.token import inference_token, token_file_option

if TYPE_CHECKING:
    from kpdeploy.monitoring.alerts import Slo, Watched
    from kpdeploy.monitoring.probe import Exporter, Probe

PORT = click.IntRange(0, 65535)
POSITIVE = click.FloatRange(min=0, min_open=True)

EPILOG = """\b
Try it, with Prometheus and Alertmanager on this machine:
  kpdeploy monitor up models/

\b
In production:
  kpdeploy monitor probe models/ --url localhost:8001       # beside each server; Prometheus scrapes its port 9105
  kpdeploy monitor baseline models/ --url localhost:8001    # once, while all is well
  kpdeploy monitor rules models/ --slo p99=50ms --availability 99.9 -o rules.yml
  kpdeploy monitor dashboard models/ -o dashboard.json

Each has --json.
"""


@click.group(cls=NearCommands, epilog=EPILOG)
def command() -> None:
    """Watch a served model: is it up, right, the right one, and as fast as it was?

    A probe sends the golden requests of a model repository to a server and exports what came back; rules, made from
    the manifest and the baseline, say when that is an alert; a dashboard shows it. No user traffic is read.
    """


def _monitoring(module: str) -> Any:
    """A module of kpdeploy.monitoring.

    Raises:
        PackageMissing: one of its packages is not installed.
    """
    import importlib

    from kpdeploy.errors import PackageMissing

    try:
        return importlib.import_module(f"kpdeploy.monitoring.{module}")
    except ModuleNotFoundError as error:
        raise PackageMissing(
            f"kpdeploy monitor needs the package {error.name}", next_step="pip install 'kpdeploy[monitor]'"
        ) from None


def _url(command: Callable[..., None]) -> Callable[..., None]:
    url = click.option("--url", required=True, metavar="HOST:PORT", help="The server; grpc:// or http:// may lead.")
    return url(click.option("--protocol", default="auto", show_default=True, metavar="auto|grpc|http")(command))


def _models(repo: str, model: str | None) -> list[str]:
    from kpdeploy.serving.repository import find_deployment, read_repository

    return [find_deployment(repo, model).model] if model else [d.model for d in read_repository(repo)]


@command.command()
@click.argument("repo", metavar="REPO")
@_url
@click.option("--model", help="Only this model of REPO.")
@click.option("--rate", type=POSITIVE, help="Requests/s for each model.  [default: as the served baseline, else 1]")
@click.option("--timeout-seconds", type=POSITIVE, default=5.0, show_default=True, help="Later than that is an error.")
@click.option("--port", type=PORT, default=9105, show_default=True, help="Port of the metrics; 0 chooses a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the metrics; 0.0.0.0: the network.")
@token_file_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when the metrics are there.")
def probe(
    repo: str, url: str, protocol: str, model: str | None, rate: float | None, timeout_seconds: float, port: int,
    host: str, token_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Send the golden requests of REPO to a server at a fixed rate, and export what came back, until Ctrl-C.

    \b
    Example:
      kpdeploy monitor probe models/ --url localhost:8001

    Latency counts from the moment at which a request was due. A server that is away is told, and asked again; a version
    published meanwhile is asked for from then on.
    """
    import signal
    import sys
    import time

    from kpdeploy.cli import console

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    prober, stack = _monitoring("probe"), _monitoring("stack")
    exporter = prober.Exporter()
    token = inference_token(token_file)
    probes = _probes(
        repo, model, exporter, url=url, protocol=protocol, rate=rate, timeout_s=timeout_seconds, token=token
    )
    with prober.probing(probes), stack.export_metrics(exporter.registry, port, host=host) as address:
        metrics = f"http://{address}/metrics"
        if as_json:
            console.print_json({"metrics": metrics, "models": [p.model for p in probes], "url": url})
            sys.stdout.flush()
        else:
            console.err.print(f"asking {', '.join(p.model for p in probes)} at {url}; metrics: {metrics}")
            console.next_command(f"kpdeploy monitor rules {repo} -o rules.yml")
        while True:
            time.sleep(3600)


def _probes(
    repo: str, model: str | None, exporter: Exporter, *, url: str, protocol: str, rate: float | None,
    timeout_s: float, token: str,
) -> list[Probe]:  # fmt: skip
    from kpdeploy.cli import console
    from kpdeploy.monitoring.probe import Probe
    from kpdeploy.monitoring.served import find_served
    from kpdeploy.serving.repository import find_deployment

    probes = []
    for name in _models(repo, model):
        served = find_served(find_deployment(repo, name))
        wanted = rate or (served.rate if served is not None else 1.0)
        if served is not None and wanted != served.rate:
            console.err.print(
                f"{name}: the served baseline was recorded at {served.rate:g} requests/s; at {wanted:g} its latencies "
                "may differ"
            )
        probes.append(
            Probe(
                repo, name, url=url, protocol=protocol, rate=wanted, timeout_s=timeout_s, token=token,
                exporter=exporter, say=lambda text: console.err.print(text, markup=False),
            )
        )  # fmt: skip
    return probes


@command.command()
@click.argument("repo", metavar="REPO")
@_url
@click.option("--model", help="Only this model of REPO.")
@click.option("--rate", type=POSITIVE, default=1.0, show_default=True, help="Requests/s, as the probe's will be.")
@click.option(
    "--windows", type=click.IntRange(min=20), default=60, show_default=True, help="How many: few hide slow changes."
)
@click.option("--window-seconds", type=POSITIVE, default=15.0, show_default=True, help="Length of each.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File.  [default: served.json beside the version]"
)
@token_file_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def baseline(
    repo: str, url: str, protocol: str, model: str | None, rate: float, windows: int, window_seconds: float,
    output: Path | None, token_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Record what the golden requests take now, while all is well: what `rules` compares with.

    \b
    Example:
      kpdeploy monitor baseline models/ --url localhost:8001

    Record it under the load of every day: latencies are compared with it while the machine is about as busy. It takes
    a quarter of an hour.
    """
    from kpdeploy.cli import console
    from kpdeploy.errors import UnknownName
    from kpdeploy.serving.repository import find_deployment

    served = _monitoring("served")
    names = _models(repo, model)
    if output is not None and len(names) > 1:
        raise UnknownName(f"{repo} holds {len(names)} models, and one file holds one", next_step="name one: --model")
    found = []
    for name in names:
        entry = served.record(
            repo, name, url=url, protocol=protocol, rate=rate, windows=windows, window_seconds=window_seconds,
            token=inference_token(token_file), progress=console.progress(json_output=as_json),
        )  # fmt: skip
        entry.write(output or served.served_path(find_deployment(repo, name)))
        found.append(served.to_json(entry))
    if as_json:
        console.print_json({"baselines": found})
        return
    rows = [
        (entry["model"], entry["version"], p["point"], f"{p['p50_seconds'] * 1e3:.2f}", f"{p['p99_seconds'] * 1e3:.2f}")
        for entry in found
        for p in entry["points"]
    ]
    console.table(("model", "version", "request", "p50 ms", "p99 ms"), rows)
    console.next_command(f"kpdeploy monitor rules {repo} -o rules.yml")


def _objectives(command: Callable[..., None]) -> Callable[..., None]:
    slo = click.option("--slo", metavar="pQQ=TIME", help="Promised latency of golden requests, such as p99=50ms.")
    percent = click.option("--availability", type=float, metavar="PERCENT", help="Promised share of answers: 99.9.")
    return slo(percent(command))


def _watched(repo: str, model: str | None, served: Path | None = None) -> list[Watched]:
    """What the rules of each model compare with.

    Raises:
        BaselineUnusable: there is nothing.
    """
    from kpdeploy.baseline import Baseline
    from kpdeploy.monitoring.alerts import watched
    from kpdeploy.monitoring.probe import Golden
    from kpdeploy.monitoring.served import ServedBaseline, find_served
    from kpdeploy.serving.repository import find_deployment, local_files

    found = []
    for name in _models(repo, model):
        deployment = find_deployment(repo, name)
        recorded = ServedBaseline.read(served, deployment) if served is not None else find_served(deployment)
        with local_files(deployment) as folder:
            windows = Baseline.read(folder).windows
        found.append(watched(deployment, windows, Golden.read(deployment).points, recorded))
    return found


@command.command()
@click.argument("repo", metavar="REPO")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
@click.option("--model", help="Only this model of REPO.")
@click.option("--baseline", "served", type=click.Path(path_type=Path), help="A served baseline of `monitor baseline`.")
@_objectives
@click.option("--tests", type=click.Path(path_type=Path), metavar="FILE", help="Write unit tests for promtool, too.")
@click.option(
    "--runbook", default="docs/runbook.md", show_default=True, help="Where your runbook is: the alerts' links."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rules as JSON.")
def rules(
    repo: str, output: Path | None, model: str | None, served: Path | None, slo: str | None, availability: float | None,
    tests: Path | None, runbook: str, as_json: bool,
) -> None:  # fmt: skip
    """Write Prometheus recording and alerting rules for the models of REPO.

    \b
    Example:
      kpdeploy monitor rules models/ --slo p99=50ms --availability 99.9 -o rules.yml --tests rules_test.yml
      promtool test rules rules_test.yml
    """
    from kpdeploy.cli import console

    alerts, stack = _monitoring("alerts"), _monitoring("stack")
    models, promised = _watched(repo, model, served), _slo(slo, availability)
    groups = alerts.rule_groups(models, slo=promised, intervals=alerts.Intervals(), runbook=runbook)
    text = stack.to_yaml(groups)
    if as_json:
        console.print_json(groups)
    elif output is None:
        click.echo(text)
    if output is not None:
        _write(output, text)
    if tests is not None:
        cases = _monitoring("rule_tests").test_file(
            models,
            slo=promised,
            intervals=alerts.Intervals(),
            runbook=runbook,
            rules=(output or Path("rules.yml")).name,
        )
        _write(tests, stack.to_yaml(cases))
    for entry in models:
        console.err.print(f"{entry.name}: latencies are compared with {entry.against}", markup=False)
    if output is not None:
        console.next_command(f"promtool test rules {tests}" if tests else f"promtool check rules {output}")


def _slo(slo: str | None, availability: float | None) -> Slo:
    from kpdeploy.monitoring.alerts import Slo

    return Slo.parse(slo, availability)


def _write(path: Path, text: str) -> None:
    from kpdeploy.errors import RepositoryUnwritable

    try:
        aside = path.with_name(f"{path.name}.part")
        aside.write_text(text)
        aside.replace(path)
    except OSError as error:
        raise RepositoryUnwritable(f"{path} cannot be written", why=str(error)) from None


@command.command()
@click.argument("repo", metavar="REPO")
@_objectives
@click.option("--webhook", metavar="URL", help="Where alerts are sent.  [default: this terminal]")
@click.option(
    "--alerts-file", type=click.Path(path_type=Path), help="Append each alert to this file, a JSON line each."
)
@click.option("--rate", type=POSITIVE, default=1.0, show_default=True, help="Golden requests/s for each model.")
@click.option("--window-seconds", type=POSITIVE, default=15.0, show_default=True, help="Of the 20 baseline windows.")
@click.option("--scrape-seconds", type=click.IntRange(1, 60), default=5, show_default=True)
@click.option("--prometheus-port", type=PORT, default=9090, show_default=True)
@click.option("--alertmanager-port", type=PORT, default=9093, show_default=True)
@click.option("--ready-timeout", default=120.0, show_default=True, help="Seconds to load and to answer right.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object when all runs, then a line for each alert."
)
def up(
    repo: str, slo: str | None, availability: float | None, webhook: str | None, alerts_file: Path | None, rate: float,
    window_seconds: float, scrape_seconds: int, prometheus_port: int, alertmanager_port: int, ready_timeout: float,
    as_json: bool,
) -> None:  # fmt: skip
    """Serve REPO and watch it: server, probe, Prometheus and Alertmanager on this machine, until Ctrl-C.

    \b
    Example:
      kpdeploy monitor up models/ --slo p99=50ms --availability 99.9

    Needs Debian's packages prometheus and prometheus-alertmanager. What has no served baseline gets one first, which
    takes five minutes at the default rate.
    """
    import signal
    import sys

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    from kpdeploy.cli import console
    from kpdeploy.errors import UnknownName
    from kpdeploy.pipeline import watch

    stack = _monitoring("stack")
    if webhook and alerts_file:
        raise UnknownName("alerts go to one place", next_step="give --webhook or --alerts-file")

    def told(alert: dict[str, Any]) -> None:
        _tell(alert, alerts_file, as_json=as_json)

    progress = console.progress(json_output=as_json)
    with stack.receiver(told) as terminal, watch(
        repo, slo=_slo(slo, availability), webhook=webhook or terminal, rate=rate, window_seconds=window_seconds,
        scrape_seconds=scrape_seconds, prometheus_port=prometheus_port, alertmanager_port=alertmanager_port,
        ready_timeout_s=ready_timeout, progress=progress,
    ) as running:  # fmt: skip
        addresses = {
            "prometheus": running.stack.prometheus,
            "alertmanager": running.stack.alertmanager,
            "probe": f"http://{running.probe}/metrics",
            "http": running.server.http,
            "grpc": running.server.grpc,
            "metrics": running.server.metrics,
        }
        if as_json:
            console.print_json(addresses)
            sys.stdout.flush()
        else:
            console.table(("", ""), list(addresses.items()))
            console.err.print("[dim]watching; Ctrl-C ends all[/]")
            console.next_command(f"kpdeploy monitor dashboard {repo} -o dashboard.json")
        running.server.wait()


def _tell(alert: dict[str, Any], file: Path | None, *, as_json: bool) -> None:
    import json
    import sys

    from kpdeploy.cli import console

    line = json.dumps(alert)
    if file is not None:
        with file.open("a") as opened:
            opened.write(line + "\n")
    if as_json:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        return
    said = alert["annotations"]
    console.err.print(f"{alert['status']}: {alert['labels']['alertname']}: {said.get('summary', '')}", markup=False)
    if alert["status"] == "firing":
        console.err.print(f"  next: {said.get('next', '')}", markup=False)


def _points(repo: str) -> dict[str, tuple[str, ...]]:
    """The points of the golden requests of each model."""
    from kpdeploy.monitoring.probe import Golden
    from kpdeploy.serving.repository import read_repository

    return {d.model: Golden.read(d).points for d in read_repository(repo)}


@command.command()
@click.argument("repo", metavar="REPO")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
@click.option("--json", "as_json", is_flag=True, help="Print the dashboard, which is JSON anyway.")
def dashboard(repo: str, output: Path | None, as_json: bool) -> None:
    """Write a Grafana dashboard of the models of REPO, to be imported there.

    \b
    Example:
      kpdeploy monitor dashboard models/ -o dashboard.json
    """
    import json

    from kpdeploy.cli import console

    made = _monitoring("dashboard").dashboard(_points(repo))
    if output is None or as_json:
        console.print_json(made)
    if output is not None:
        _write(output, json.dumps(made, indent=2) + "\n")
        console.next_command(f"Grafana > Dashboards > New > Import: {output}")
