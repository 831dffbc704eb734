"""`kpdeploy rollout`"""

from __future__ import annotations

import click

from kpdeploy.cli.criteria import criteria_options

EPILOG = """\b
Examples:
  kpdeploy serve models/ --poll                                      # in another terminal
  kpdeploy rollout models/ --to 4 --against 3 --url localhost:8001
  kpdeploy rollout models/ --abort                                   # end one that was stopped

Ctrl-C stops a trial; the same command goes on with it.
"""


@click.command(epilog=EPILOG)
@click.argument("repo")
@click.option("--to", type=click.IntRange(1), metavar="VERSION", help="The version to try.")
@click.option("--against", type=click.IntRange(1), metavar="VERSION", help="The version that serves meanwhile.")
@click.option("--url", default="localhost:8001", show_default=True, help="The server: host:port, or a URL.")
@click.option("--model", metavar="NAME", help="Which model, where REPO holds several.")
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True, help="Of load at most.")
@criteria_options
@click.option("--ready-timeout-s", type=click.FloatRange(min=1), default=60, show_default=True,
              help="Seconds that the server may take to load a version.")  # fmt: skip
@click.option("--abort", is_flag=True, help="End a rollout that was stopped: the version before it serves.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    repo: str, to: int | None, against: int | None, url: str, model: str | None, seconds: float, effect: float,
    significance: float, ready_timeout_s: float, abort: bool, as_json: bool,
) -> None:  # fmt: skip
    """Try a version beside the one in service, on a running server; promote it, or roll back, and say why.

    The new version runs as the model NAME-canary: no user's request reaches it. Both get the same golden and synthetic
    requests in turn. It is promoted, by replacing config.pbtxt, if its answers are right, no more requests fail, and it
    is not slower by the detector of `kpdeploy check`. In doubt the old version stays.
    """
    from kpdeploy.cli import console
    from kpdeploy.monitoring.regression import Criteria
    from kpdeploy.pipeline import abort_rollout, rollout

    if abort:
        ended = abort_rollout(repo, model=model)
        console.err.print(f"ended: version {ended.against} serves, version {ended.to} is not promoted")
        return
    if to is None or against is None:
        raise click.UsageError("give both versions: --to 4 --against 3")
    report = rollout(
        repo,
        to=to,
        against=against,
        url=url,
        model=model,
        seconds=seconds,
        ready_timeout_s=ready_timeout_s,
        criteria=Criteria(effect=effect, significance=significance),
        progress=console.progress(json_output=as_json),
    )
    error = report.error()
    if as_json:
        console.print_json(report.to_json())
        if error is not None:
            click.get_current_context().exit(error.exit_code)
        return
    if error is not None:
        raise error
    console.out.print(f"promoted {report.model} version {to}: {report.decision.why}", markup=False)
    console.next_command(f"kpdeploy verify {repo} --url {url}")
