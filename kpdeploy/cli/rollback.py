"""`kpdeploy rollback`"""

from __future__ import annotations

import click

EPILOG = """\b
Examples:
  kpdeploy rollback models/ --to 3
  kpdeploy rollback model_store/ --to 1 --model minilm
"""


@click.command(epilog=EPILOG)
@click.argument("repo")
@click.option("--to", "version", type=click.IntRange(1), required=True, metavar="VERSION", help="The version to serve.")
@click.option("--model", metavar="NAME", help="Which model, where REPO holds several.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(repo: str, version: int, model: str | None, as_json: bool) -> None:
    """Serve another version of REPO that is there already, at once and without a trial.

    Its digests are checked, then one file is replaced. A server that sees new versions follows (`kpdeploy serve
    --poll`, on TorchServe through its management API); any other one when it is started again.
    """
    from kpdeploy.cli import console
    from kpdeploy.errors import UnknownName
    from kpdeploy.serving.repository import find_deployment
    from kpdeploy.serving.storage import local_path
    from kpdeploy.serving.target import TARGETS

    if "://" in local_path(repo):
        raise UnknownName(
            f"{repo} is no folder",
            why="a version is put in service under a lock, which only a file system has",
            next_step="give the folder that the server serves",
        )
    before = find_deployment(repo, model)
    now = TARGETS[before.manifest.target].package.rollback(repo, before.model, version)
    if as_json:
        console.print_json({"model": now.model, "version": now.version, "before": before.version})
        return
    console.out.print(f"{now.model}: version {now.version} is in service, {before.version} was", markup=False)
    console.next_command(f"kpdeploy verify {repo} --url HOST:PORT")
