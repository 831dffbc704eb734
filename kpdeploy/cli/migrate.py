"""`kpdeploy migrate`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kpdeploy.pipeline import MigrateReport

EPILOG = """\b
Examples:
  kpdeploy migrate densenet161.mar --repo models/
  kpdeploy migrate encoder.mar --input "data:float32[batch=1..16,128]" --repo models/
  kpdeploy migrate eager.mar --trust --input "data:float32[batch=1..16,128]" --json

Carried over: the model, batchSize, maxBatchDelay, workers, index_to_name.json as labels, and what the stock handlers
compute after the model. Decoding and pre-processing stay with the client; the end of the output lists what did.
"""


@click.command(epilog=EPILOG)
@click.argument("archive", metavar="MODEL.mar", type=click.Path(dir_okay=False))
@click.option("--target", default="triton", show_default=True, help="The server to package for.")
@click.option("--repo", default="models", show_default=True, metavar="DIR|URL", help="The model repository.")
@click.option("--format", default="auto", show_default=True, help="As for kpdeploy export.")
@click.option("--fuse", default="auto", show_default=True, help="As for kpdeploy export.")
@click.option("--name", help="The model's name in the repository.  [default: the archive's]")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SPEC",
    help='One input: "data:float32[batch=1..16,128]". Archives hold no shapes: only ONNX files and image_classifier '
    "tell theirs.",
)
@click.option("--trust", is_flag=True, help="Import the archive's model file, which is Python and can do anything.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    archive: str, target: str, repo: str, format: str, fuse: str, name: str | None, inputs: tuple[str, ...],
    trust: bool, as_json: bool,
) -> None:  # fmt: skip
    """Move the model of a TorchServe archive to Triton, proven equal to it, and list what could not be carried over.

    None of the archive's code runs: handlers are read as text, weights as tensors only. An eager model is made by a
    Python file of the archive, and needs --trust.
    """
    from kpdeploy.cli import console
    from kpdeploy.pipeline import migrate

    report = migrate(
        archive,
        target=target,
        repo=repo,
        format=format,
        name=name,
        input=inputs,
        trust=trust,
        fuse=fuse,
        progress=console.progress(json_output=as_json),
    )
    if as_json:
        console.print_json(report.to_json())
        return
    _show(report)


def _show(report: MigrateReport) -> None:
    from kpdeploy.cli import console, export
    from kpdeploy.decision import Applied

    for decision in report.told:
        if isinstance(decision, Applied):
            console.out.print(f"carried over: {decision.what}: {decision.detail}", markup=False)
        else:
            console.out.print(f"NOT carried over: {decision.what}: {decision.reason}", markup=False)
    export.show(report.report)
