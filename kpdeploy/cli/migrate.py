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
  kpdeploy migrate densenet161.mar --trust --replay --request kitten.jpg --request dog.png

Carried over: the model, batchSize, maxBatchDelay, workers, index_to_name.json as labels. What the stock handlers
image_classifier and text_classifier do before and after the model becomes a second one, NAME_image or NAME_text, for
Triton's python backend: it takes the same files and texts, and answers with the same labels and probabilities. What a
handler of one's own does stays behind; the end of the output lists it.
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
@click.option("--trust", is_flag=True, help="Let the archive's Python run: its model file; with --replay all of it.")
@click.option(
    "--replay",
    is_flag=True,
    help="Serve the archive as it is with TorchServe, and the result with Triton; publish only if both answer the same "
    "requests alike.",
)
@click.option(
    "--request",
    "requests",
    multiple=True,
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="A request of --replay: an image, a text, or the JSON that the handler takes.  [default: made up]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    archive: str, target: str, repo: str, format: str, fuse: str, name: str | None, inputs: tuple[str, ...],
    trust: bool, replay: bool, requests: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Move the model of a TorchServe archive to Triton, proven equal to it, and list what could not be carried over.

    None of the archive's code runs: handlers are read as text, weights as tensors only. An eager model is made by a
    Python file of the archive, and needs --trust; so does --replay, which runs the archive in a TorchServe.
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
        replay=replay,
        requests=requests,
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
    if report.replayed is not None:
        found = report.replayed
        console.out.print(
            f"replayed: {len(found.exchanges)} requests ({found.form}) answered alike by TorchServe and Triton, "
            f"error {found.worst:.1e} / {found.tolerance:.0e}",
            markup=False,
        )
    export.show(report.report)
