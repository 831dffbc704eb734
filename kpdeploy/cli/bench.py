"""`kpdeploy bench`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from kpdeploy.cli.token import inference_token, token_file_option

if TYPE_CHECKING:
    from kpdeploy.bench import BenchReport

Number = TypeVar("Number", int, float)


def _counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    return tuple(_positive(int, part, value) for part in value.split(","))


def _rates(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    return tuple(_positive(float, part, value) for part in value.split(","))


def _positive(kind: Callable[[str], Number], text: str, whole: str) -> Number:
    try:
        number = kind(text)
    except ValueError:
        number = kind("0")
    if not 0 < number < float("inf"):
        raise click.BadParameter(f"{whole!r} is not a list of positive numbers such as 1,8,32")
    return number


def parse_shape(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, int]:
    pairs = [part.partition("=") for part in value.split(",")] if value else []
    if not all(name.strip() and size.strip().isdigit() for name, _, size in pairs):
        raise click.BadParameter(f"{value!r} is not of the form batch=1,seq=32")
    return {name.strip(): int(size) for name, _, size in pairs}


@click.command()
@click.argument("url", metavar="HOST:PORT")
@click.option("--model", required=True, help="The model's name on the server.")
@click.option(
    "--repo",
    type=click.Path(path_type=Path),
    help="The repository it was exported to: requests then follow its manifest, in names, sizes and valid values. "
    "Without it the server's own metadata must do.",
)
@click.option("--mode", default="closed", show_default=True, metavar="closed|open", help="How load is made, see above.")
@click.option(
    "--clients", metavar="N,…", callback=_counts, default="1,8,32", show_default=True, help="Levels of the closed loop."
)
@click.option(
    "--rate",
    metavar="R,…",
    callback=_rates,
    default="50,100",
    show_default=True,
    help="Levels of the open loop, in requests/s.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10,
    show_default=True,
    help="Length of each level.",
)
@click.option(
    "--warmup-seconds",
    type=click.FloatRange(min=0),
    default=2,
    show_default=True,
    help="Load before each level that does not count.",
)
@click.option(
    "--timeout-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10,
    show_default=True,
    help="A request without an answer by then is an error.",
)
@click.option(
    "--protocol",
    default="auto",
    show_default=True,
    metavar="auto|grpc|http",
    help="auto asks the port which of the two it speaks.",
)
@click.option(
    "--shape",
    metavar="AXIS=N,…",
    callback=parse_shape,
    default="",
    help="Sizes of dynamic axes, such as batch=1,seq=32. Default: batch 1, and half of each range, at most 128.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the result (.png, .svg or .pdf).")
@token_file_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    url: str, model: str, repo: Path | None, mode: str, clients: tuple[int, ...], rate: tuple[float, ...],
    seconds: float, warmup_seconds: float, timeout_seconds: float, protocol: str, shape: dict[str, int],
    plot: Path | None, token_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure latency and throughput of a model on a running server.

    closed: N clients, each sending its next request when it has the answer to the last. What throughput can the
    server reach, and what does a waiting client see?

    open: requests arrive at random (Poisson) at a given rate, whether or not the server keeps up, and latency counts
    from the moment a request was due. What do users see at this traffic?

    \b
    Examples:
      kpdeploy bench localhost:8001 --model minilm --repo models/
      kpdeploy bench localhost:8001 --model minilm --mode open --rate 20,50,100 --shape batch=1,seq=32 --plot load.png
    """
    from kpdeploy.bench import bench
    from kpdeploy.cli import console

    if plot is not None:
        from kpdeploy.bench.plot import check_path

        check_path(plot)
    report = bench(
        url,
        model=model,
        repo=repo,
        mode=mode,
        clients=clients,
        rates=rate,
        seconds=seconds,
        warmup_seconds=warmup_seconds,
        protocol=protocol,
        shape=shape,
        timeout_seconds=timeout_seconds,
        token=inference_token(token_file),
        progress=console.progress(json_output=as_json),
    )
    _remember(report)
    if plot is not None:
        from kpdeploy.bench.plot import draw

        draw(report, plot)
    if as_json:
        console.print_json(report.to_json())
        return
    _show(report)
    if plot is not None:
        console.err.print(f"drawn: {plot}")
    _suggest(report, repo, token_file)


def _remember(report: BenchReport) -> None:
    """Append the levels to the history. That it cannot be is told, and fails nothing."""
    from kpdeploy.checkout import branch
    from kpdeploy.cli import console
    from kpdeploy.hardware import conditions, environment
    from kpdeploy.inputs import point_name
    from kpdeploy.monitoring.history import Entry, Value, record

    values = []
    for row in report.rows:
        where = f"{point_name(report.point)} {report.protocol} {row.label}".strip()
        figures = {"requests_per_second": row.throughput, "failed_total": float(row.failed)}
        if row.succeeded:
            figures |= {"p50_ms": row.latencies.p50_ms, "p99_ms": row.latencies.p99_ms}
        values += [Value(metric=name, point=where, value=value) for name, value in figures.items()]
    failed = record(
        Entry(
            kind="bench",
            model=report.model,
            version=report.version,
            values=tuple(values),
            environment={**environment(), **conditions(), "url": report.url, "server": report.server},
            label=branch(),
        )
    )
    if failed:
        console.err.print(f"note: not in the history: {failed}", markup=False)


def _show(report: BenchReport) -> None:
    from kpdeploy.cli import console

    console.out.print(
        f"{report.model} version {report.version} at {report.url} ({report.server}), {report.protocol}, "
        f"{report.mode} loop\neach request: {'  '.join(report.inputs)}; generator: its share of one core",
        markup=False,
    )
    level = "clients" if report.mode == "closed" else "asked/s"
    columns = (level, "req/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "errors", "generator")
    rows = []
    for row in report.rows:
        times = row.latencies
        figures = (times.p50_ms, times.p90_ms, times.p99_ms, times.p999_ms, times.max_ms)
        cells = [f"{ms:.2f}" if row.succeeded else "-" for ms in figures]
        rows.append((f"{row.level:g}", f"{row.throughput:.1f}", *cells, row.failed, f"{row.generator_cores:.0%}"))
    console.table(columns, rows)
    for row in report.rows:
        for reason, count in row.errors.items():
            console.out.print(f"errors at {row.label}: {count} × {reason}", markup=False)
    for note in (*report.notes, *report.warnings):
        console.err.print(f"note: {note}", markup=False)


def _suggest(report: BenchReport, repo: Path | None, token_file: Path | None) -> None:
    from kpdeploy.cli import console

    best = max(row.throughput for row in report.rows)
    start = f"kpdeploy bench {report.url} --model {report.model} --protocol {report.protocol}"
    start += f" --repo {repo}" if repo else ""
    start += f" --token-file {token_file}" if token_file else ""
    if report.mode == "closed":
        # Half, four fifths and all of what the closed loop reached: where the latency of an open loop turns up.
        rates = ",".join(f"{float(f'{best * share:.2g}'):g}" for share in (0.5, 0.8, 1))
        console.next_command(f"{start} --mode open --rate {rates}")
    else:
        console.next_command(f"{start} --mode closed")
