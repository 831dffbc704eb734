"""`kpdeploy exit-codes`"""

from __future__ import annotations

import click

from kpdeploy.errors import exit_codes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List what each exit code means."""
    from kpdeploy.cli import console

    rows = [
        (0, "success", "The command did what it says."),
        (1, "defect", "kpdeploy failed in a way it should not: please report it."),
        (2, "usage", "The command line is wrong; see --help."),
        *exit_codes(),
        (130, "interrupted", "Ctrl-C."),
    ]
    if as_json:
        console.print_json([{"code": code, "name": name, "meaning": meaning} for code, name, meaning in rows])
    else:
        console.table(("code", "name", "meaning"), rows)
