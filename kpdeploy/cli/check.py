"""`kpdeploy check`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kpdeploy.cli.criteria import criteria_options

if TYPE_CHECKING:
    from kpdeploy.monitoring.check import CheckReport

EPILOG = """\b
Examples:
  kpdeploy check models/ --against models@3
  kpdeploy check models@4 --against 3 --seconds 30 --junit check.xml --plot check.png
  kpdeploy check models/ --against main                 # the last check or export of branch main in the history
  kpdeploy check models/ --against models/minilm/3/baseline.json

\b
Exit codes:
   0  better or equal
  90  worse: slower, larger, or wrong answers
  91  cannot tell: too noisy, or too little time
  92  nothing to compare with
"""


def _points(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> list[dict[str, int]]:
    from kpdeploy.cli.bench import parse_shape

    return [parse_shape(ctx, param, text) for text in texts]


@click.command(epilog=EPILOG)
@click.argument("repo", metavar="REPO[@VERSION]")
@click.option(
    "--against",
    required=True,
    metavar="WHAT",
    help="REPO@VERSION, or a VERSION of the same REPO: measured beside the new one. Or a version's baseline.json, or a "
    "branch in the history, such as main: what was measured then, on this machine.",
)
@click.option("--model", metavar="NAME", help="Which model, where REPO holds several.")
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=90, show_default=True, help="How long to measure at most."
)
@criteria_options
@click.option(
    "--shape",
    "points",
    multiple=True,
    callback=_points,
    metavar="AXIS=N,…",
    help="Sizes to measure at, such as batch=1,seq=32; several times for several. [default: batch 1 and 8]",
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Threads of each runtime; 0: as it is served. One is steadier on a busy machine.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the windows (.png, .svg or .pdf).")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write a JUnit report.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    repo: str, against: str, model: str | None, seconds: float, significance: float, effect: float,
    points: list[dict[str, int]], threads: int, plot: Path | None, junit: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Is this version worse than that one? A gate for CI.

    Both versions run here, in the runtimes that serve them, and take turns call by call, so that what slows the machine
    slows both; what a single thread waits for a core is left out. A version is worse if its median latency is
    significantly larger, by at least --effect, in most of the process pairs; if it needs a tenth more memory; or if a
    golden answer is wrong. It stops as soon as that is known.
    """
    from kpdeploy.cli import console
    from kpdeploy.monitoring import check_report
    from kpdeploy.monitoring.pictures import check_picture
    from kpdeploy.monitoring.regression import Criteria
    from kpdeploy.pipeline import check

    if plot is not None:
        check_picture(plot)
    report = check(
        repo,
        against=against,
        model=model,
        seconds=seconds,
        points=points,
        threads=threads,
        criteria=Criteria(significance=significance, effect=effect),
        progress=console.progress(json_output=as_json),
    )
    if junit is not None:
        check_report.junit(report, junit)
    if plot is not None:
        check_report.draw(report, plot)
    error = report.error()
    if as_json:
        console.print_json(report.to_json())
        if error is not None:
            click.get_current_context().exit(error.exit_code)
        return
    _show(report)
    if error is not None:
        raise error
    console.next_command(f"kpdeploy history {report.model}")


def _show(report: CheckReport) -> None:
    from kpdeploy.cli import console

    rows: list[tuple[object, ...]] = [
        (
            finding.what,
            f"{finding.old:.2f} {finding.unit}",
            f"{finding.new:.2f} {finding.unit}",
            f"{finding.judgement.ratio - 1:+.1%}",
            f"{finding.judgement.p:.1e}",
            finding.judgement.windows,
            finding.judgement.outcome,
        )
        for finding in report.findings
    ]
    rows += [
        (f"answers: {a.output}", "", f"{a.error:.1e}", "", "", "", "equal" if a.passed else "WRONG")
        for a in report.answers
    ]
    console.out.print(f"{report.new} beside {report.old}, {report.seconds:.0f} s", markup=False)
    console.table(("what", "old", "new", "change", "p", "windows", "outcome"), rows)
    for note in report.notes:
        console.err.print(f"note: {note}", markup=False)
