"""What the user sees: tables, progress bars, errors, and JSON. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from kpdeploy import __version__
from kpdeploy.errors import KpdeployError
from kpdeploy.progress import Progress

INTERRUPTED = 130
"""The exit code after Ctrl-C: 128 and the number of SIGINT, as shells have it."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print rows as a table; columns whose header ends in a unit or count are right-aligned numbers."""
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    cells = [[c if isinstance(c, Text) else str(c) for c in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = all(_numeric(str(row[index])) for row in cells)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    out.print(drawn)


def _numeric(text: str) -> bool:
    return text[:1].isdigit() or text in ("", "-")


def mark(passed: bool) -> Text:
    return Text("pass", style="green") if passed else Text("FAIL", style="bold red")


def next_command(text: str) -> None:
    """The last line of every output: what to do now."""
    err.print(f"[dim]next:[/] [bold]{text}[/]")


def print_json(data: object) -> None:
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def wants_json() -> bool:
    """Whether the command line asked for JSON, known even where parsing it failed."""
    return "--json" in sys.argv


def show_error(error: KpdeployError) -> None:
    """One message: what, why, next. As JSON on stdout where the command line asked for it."""
    if wants_json():
        _print_json_error(type(error).__name__, error.exit_code, error.what, error.why, error.next_step)
        return
    err.print(Text.assemble(("error: ", "bold red"), error.what))
    if error.why:
        err.print(Text.assemble(("  why: ", "bold"), error.why))
    if error.next_step:
        err.print(Text.assemble((" next: ", "bold"), error.next_step))


def show_usage_error(error: click.ClickException) -> None:
    """What click found wrong with the command line."""
    if wants_json():
        _print_json_error("UsageError", error.exit_code, error.format_message(), "", "see --help")
    else:
        error.show()


def show_interrupted() -> None:
    if wants_json():
        _print_json_error("Interrupted", INTERRUPTED, "interrupted", "", "")
    else:
        err.print("interrupted")


def _print_json_error(kind: str, exit_code: int, what: str, why: str, next_step: str) -> None:
    print_json({"error": {"kind": kind, "exit_code": exit_code, "what": what, "why": why, "next": next_step}})


def show_defect(error: Exception) -> None:
    """An exception that no step foresaw: a defect of kpdeploy. The traceback goes to a file, not to the screen."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kpdeploy-", suffix=".log", delete=False) as log:
            log.write(f"kpdeploy {__version__}\n")
            traceback.print_exception(error, file=log)
        report = f"please report it with {log.name}"
    except OSError as refused:
        report = f"please report it (its log could not be written: {refused})"
    show_error(
        KpdeployError(
            "kpdeploy failed in a way it should not",
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            next_step=report,
        )
    )


class BarProgress(Progress):
    """Bars on stderr for steps, and lines that stay; a plain line a step where stderr is no terminal (a CI log)."""

    @contextmanager
    def step(self, title: str, *, total: int | None = None) -> Iterator[Callable[[], None]]:
        if not err.is_terminal:
            err.print(title, markup=False)
            yield lambda: None
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()]
        with Bars(*columns, console=err, transient=True) as bars:
            task = bars.add_task(title, total=total)
            yield lambda: bars.advance(task)

    def say(self, text: str) -> None:
        err.print(text)


def progress(*, json_output: bool) -> Progress:
    """Bars for people, silence for machines."""
    return Progress() if json_output else BarProgress()
