"""`kpdeploy verify`"""

from __future__ import annotations

from pathlib import Path

import click

from kpdeploy.cli.token import inference_token, token_file_option

EPILOG = """\b
Examples:
  kpdeploy verify models/ --url localhost:8001
  kpdeploy verify model_store/ --url localhost:8080 --token-file key_file.json      # TorchServe
  kpdeploy verify s3://bucket/models --url https://host:443 --model minilm --json
"""


@click.command(epilog=EPILOG)
@click.argument("repo")
@click.option(
    "--url",
    help="The server: host:port, or with http://, https://, grpc:// or grpcs://.  [default: localhost:8001; "
    "TorchServe: localhost:8080]",
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
@token_file_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context, repo: str, url: str | None, model: str | None, protocol: str, timeout_s: float,
    token_file: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Replay the golden requests of REPO against a running server.

    Checks that every file of REPO is the one that was proven, that the server serves this version, and that its
    answers are those of the original model, each output within its tolerance.
    """
    from kpdeploy.cli import console
    from kpdeploy.serving.client import check
    from kpdeploy.serving.server import target_of

    if url is None:
        url = {"torchserve": "localhost:8080"}.get(target_of(repo), "localhost:8001")
    token = inference_token(token_file)
    report = check(repo, url=url, model=model, protocol=protocol, timeout_s=timeout_s, token=token)
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
    torchserve = f" --repo {repo} --token-file {token_file}" if token_file else ""
    console.next_command(f"kpdeploy bench {url} --model {report.models[0].model}{torchserve}")
