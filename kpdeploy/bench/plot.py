"""A picture of a load test: throughput and latency against the level, or one level's latency against percentile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kpdeploy.bench.report import BenchReport
from kpdeploy.errors import PackageMissing, RepositoryUnwritable, UnknownName

SUFFIXES = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREY = "#1f5fa8", "#d1651a", "#5b6470"
FAINT = "#d9dde2"


def check_path(path: Path) -> None:
    """Raise before a long measurement where its picture could not be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UnknownName(
            f"{path} is no kind of picture that can be drawn", next_step=f"end it in {', '.join(SUFFIXES)}"
        )
    if not path.resolve().parent.is_dir():
        raise RepositoryUnwritable(f"the folder of {path} does not exist", next_step="make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PackageMissing("--plot needs matplotlib", next_step="pip install 'kpdeploy[plot]'") from None


def draw(report: BenchReport, path: Path) -> None:
    """Write the picture of a report to `path`; its suffix says the kind of file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=160, layout="constrained")
    if len(report.rows) > 1:
        left, right = figure.subplots(1, 2)
        _throughput(left, report)
        _latency(right, report)
    else:
        _curve(figure.subplots(), report)
    loop = {"closed": "closed loop", "open": "open loop, Poisson arrivals"}[report.mode]
    figure.suptitle(f"{report.model} under load", x=0.012, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(
        f"{loop} over {report.protocol}, {', '.join(report.inputs)}, {report.server}",
        x=0.012, ha="left", fontsize=8, color=GREY,
    )  # fmt: skip
    try:
        figure.savefig(path, facecolor="white")
    except OSError as error:
        raise RepositoryUnwritable(f"{path} cannot be written", why=str(error)) from None


def _throughput(axes: Any, report: BenchReport) -> None:
    levels = [row.level for row in report.rows]
    values = [row.throughput for row in report.rows]
    _plain(axes, report, "requests/s that succeeded")
    if report.mode == "open":
        axes.plot(levels, levels, color=FAINT, linewidth=1.5, zorder=1)
        axes.annotate("asked", (levels[-1], levels[-1]), (6, 0), textcoords="offset points", color=GREY, va="center")
    axes.plot(levels, values, color=BLUE, marker="o", linewidth=2)
    below = report.mode == "open"  # what was asked is drawn above
    for level, value in zip(levels, values, strict=True):
        at = (level, value), (0, -16 if below else 8)
        axes.annotate(f"{value:,.0f}", *at, textcoords="offset points", color=BLUE, ha="center")
    axes.set_ylim(0, 1.2 * max(*values, *(levels if report.mode == "open" else values)))


def _latency(axes: Any, report: BenchReport) -> None:
    levels = [row.level for row in report.rows]
    _plain(axes, report, "latency (ms, log scale)")
    axes.set_yscale("log")
    for name, color, values in (
        ("p99", ORANGE, [row.latencies.p99_ms for row in report.rows]),
        ("p50", BLUE, [row.latencies.p50_ms for row in report.rows]),
    ):
        axes.plot(levels, values, color=color, marker="o", linewidth=2)
        for level, value in zip(levels, values, strict=True):
            axes.annotate(f"{value:.3g}", (level, value), (0, 8), textcoords="offset points", color=color, ha="center")
        axes.annotate(
            name, (levels[-1], values[-1]), (10, 0), textcoords="offset points", color=color, va="center", weight="bold"
        )
    shown = [value for row in report.rows for value in (row.latencies.p50_ms, row.latencies.p99_ms) if value]
    axes.set_ylim(min(shown) / 1.8, max(shown) * 2.2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _curve(axes: Any, report: BenchReport) -> None:
    """Latency against percentile, the axis stretched towards 100 % as 1/(1 - p)."""
    row = report.rows[0]
    # A percentile that lies beyond the last request is the maximum, and no news.
    known = [(p, ms) for p, ms in row.latencies.curve if p < 100 and 1 - p / 100 >= 1 / max(1, row.succeeded)]
    axes.plot([1 / (1 - p / 100) for p, _ in known], [ms for _, ms in known], color=BLUE, linewidth=2)
    axes.set_xscale("log")
    ticks = [p for p, _ in known if p in (0, 50, 90, 99, 99.9, 99.99)]
    axes.set_xticks([1 / (1 - p / 100) for p in ticks], [f"{p:g} %" for p in ticks])
    axes.minorticks_off()
    for p, ms in known:
        if p in (50, 90, 99, 99.9):
            at = 1 / (1 - p / 100)
            axes.plot([at], [ms], "o", color=BLUE)
            axes.annotate(f"p{p:g}  {ms:.3g} ms", (at, ms), (-6, 8), textcoords="offset points", color=BLUE, ha="right")
    axes.set_ylim(0, 1.2 * max((ms for _, ms in known), default=1))
    axes.set_title(
        f"{row.label}: latency (ms) by percentile, {row.throughput:,.0f} requests/s", loc="left", fontsize=10
    )
    _frame(axes)


def _plain(axes: Any, report: BenchReport, title: str) -> None:
    levels = [row.level for row in report.rows]
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("clients" if report.mode == "closed" else "asked rate (requests/s)", color=GREY)
    axes.set_xscale("log" if report.mode == "closed" else "linear")
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.minorticks_off()
    axes.margins(x=0.12)
    _frame(axes)


def _frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
