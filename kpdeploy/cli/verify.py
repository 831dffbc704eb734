"""`kpdeploy verify`"""

from __future__ import annotations

import click

EPILOG = """\b
Examples:
  kpdeploy verify models/ --url localhost:8001
  kpdeploy verify s3://bucket/models --url https://host:443 --model minilm --json
"""


@click.command(epilog=EPILOG)
@click.argument("repo")
@click.option(
    "--url",
    default="localhost:8001",
    show_default=True,
    help="The server: host:port, or with http://, https://, grpc:// or grpcs://.",
)
@click.option("--model", metavar="NAME", help="Only this model (default: all of the repository).")
@click.option(
    "--protocol",
    type=click.Choice(["auto", "grpc", "http"]),
    default="auto",
    show_default=True,
    help="What the server speaks at --url; auto asks it.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="Seconds that each request may take.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context, repo: str, url: str, model: str | None, protocol: str, timeout_s: float, as_json: bool
) -> None:
    """Replay the golden requests of REPO against a running server.

    Checks that every file of REPO is the one that was proven, that the server serves this version, and that its
    answers are those of the original model, each output within its tolerance.
    """
    from kpdeploy.cli import console
    from kpdeploy.serving.client import check

    report = check(repo, url=url, model=model, protocol=protocol, timeout_s=timeout_s)
    difference = report.difference()
    if as_json:
        console.print_json(report.to_json())
        if difference:
            ctx.exit(difference.exit_code)
        return
    rows = [
        (entry.model, entry.version, c.output, f"{c.error:.1e}", f"{c.tolerance:.0e}", console.mark(c.passed))
        for entry in report.models
        for c in entry.comparisons
    ]
    console.table(("model", "version", "output", "error", "tolerance", "verdict"), rows)
    if difference:
        raise difference
    console.next_command(f"kpdeploy bench {url} --model {report.models[0].model}")
