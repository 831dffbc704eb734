"""`kpdeploy export`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kpdeploy.cli.config import configured_by_model

if TYPE_CHECKING:
    from kpdeploy.pipeline import Candidate, ExportReport

EPILOG = """\b
Examples:
  kpdeploy export minilm --target triton --repo models/
  kpdeploy export mypackage.models:make_encoder --repo models/
  kpdeploy export ./my-hf-folder --task text-classification --format onnx
  kpdeploy export net.pt --input "x:float32[batch=1..16,3,224,224]"
  kpdeploy export s.onnx --repo s3://bucket/models
  kpdeploy export minilm --target torchserve --repo model_store/
  kpdeploy export minilm --tune throughput --memory-budget 4GiB
  kpdeploy export minilm --level auto --accuracy-budget cosine=0.99 --calibrate sentences.txt

Every option can stand in a kpdeploy.toml beside the model, under [export]; the command line wins.
"""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="MODEL", is_eager=True, callback=configured_by_model)
@click.option("--target", default="triton", show_default=True, help="The server to package for: triton, torchserve.")
@click.option(
    "--repo",
    default="models",
    show_default=True,
    metavar="DIR|URL",
    help="The model repository: a folder, or an fsspec URL (s3://…). Exporting again makes the next version.",
)
@click.option(
    "--format",
    default="auto",
    show_default=True,
    help="onnx, openvino, torchscript, pt2; auto proves and measures them all, and packages the fastest.",
)
@click.option(
    "--fuse",
    default="auto",
    show_default=True,
    help="Fused ops (attention, linear with activation, residual with norm) and the library of their kernels: always, "
    "never; auto measures formats with and without them (.pt2, a minute each, without).",
)
@click.option(
    "--level",
    default="1",
    show_default=True,
    help="How far precision may go: 1 changes nothing but rounding, 2 tries bf16 too, 3 int8 too, auto all that this "
    "machine has. The fastest within its budget is packaged.",
)
@click.option(
    "--accuracy-budget",
    default="1e-2",
    show_default=True,
    metavar="ERROR|METRIC=LEAST",
    help="Of levels 2 and 3: the largest relative error, or the least cosine (embeddings) or share of equal top "
    "answers (logits): cosine=0.99, top1=0.99. Of integers as large a share may differ.",
)
@click.option(
    "--latency-budget-ms",
    type=float,
    metavar="MS",
    help="Stop at the first level that answers a single request within this (median).",
)
@click.option(
    "--calibrate",
    type=click.Path(dir_okay=False),
    help="Real samples for int8: an .npz, one array per input, samples along the first axis; or a .txt, a text a line, "
    "where the model brings a tokenizer.  [default: random]",
)
@click.option(
    "--tune",
    metavar="LOAD",
    help="Measure how many instances, with how many threads each and which allocator, serve best on this machine's "
    "cores, and write it into the configuration: for the latency of one caller, or for the throughput of many.",
)
@click.option(
    "--memory-budget",
    metavar="BYTES",
    help="What all instances may take together, such as 4GiB, of the GPU where the model runs on one: the fastest that "
    "fits is packaged, with as many instances, CUDA graphs and as large a batch as fit.",
)
@click.option(
    "--mount",
    default="/models",
    show_default=True,
    metavar="DIR",
    help="Where the server's container will see the repository: config.pbtxt names kernel libraries below it.",
)
@click.option("--name", help="The model's name in the repository.  [default: from MODEL]")
@click.option("--task", help="What a Hugging Face folder is for, where its config does not tell.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SPEC",
    help='One input: "name:dtype[dims]{values}", such as "ids:int64[batch=1..32,seq=1..512]{0..30521}". A name with '
    "a range is a dynamic axis; {low..high} are the valid values, {mask} a padding mask.",
)
@click.option("--example", type=click.Path(dir_okay=False), help="An .npz with one array per input.")
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    help="The largest batch, where the inputs do not state it.  [default: 8]",
)
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="DTYPE=ERROR",
    help="The largest relative error accepted for a dtype, such as float32=1e-4.  [default: float32=1e-5]",
)
@click.option(
    "--activate/--no-activate",
    default=True,
    show_default=True,
    help="Serve the new version at once; or leave it to `kpdeploy rollout` to try and promote it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(model: str, tolerances: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Export MODEL, prove the artifact equal to it, and package it for a server.

    MODEL is a shipped example (minilm), package.module:factory, a Hugging Face folder, a .pt2 exported program, a
    TorchScript .pt, an .onnx file, timm:NAME or transformers:ARCH.

    Each format is written, reloaded from disk in a fresh process in the runtime that will serve it, and compared with
    the unmodified model over its whole dynamic range. What fails is not packaged.
    """
    from kpdeploy.cli import console
    from kpdeploy.pipeline import export

    report = export(
        model,
        target=options["target"],
        repo=options["repo"],
        format=options["format"],
        name=options["name"],
        task=options["task"],
        input=options["inputs"],
        example=options["example"],
        max_batch=options["max_batch"],
        tolerance=parse_tolerances(tolerances),
        fuse=options["fuse"],
        level=options["level"],
        accuracy_budget=options["accuracy_budget"],
        latency_budget_ms=options["latency_budget_ms"],
        calibrate=options["calibrate"],
        tune=options["tune"],
        memory_budget=options["memory_budget"],
        mount=options["mount"],
        activate=options["activate"],
        progress=console.progress(json_output=as_json),
    )
    if as_json:
        console.print_json(report.to_json())
    else:
        show(report)


def parse_tolerances(texts: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = -1
        if not 0 <= found[name.strip()] < float("inf"):
            raise click.BadParameter(f"{text!r}: write it as float32=1e-4", param_hint="--tolerance")
    return found


def show(report: ExportReport) -> None:
    """The table of all candidates, the decisions, and what was packaged."""
    from kpdeploy.cli import console
    from kpdeploy.memory import MemoryPlan

    points = [entry.point for entry in report.baseline.latencies]
    headers = [f"p50 ms {'x'.join(str(size) for size in point.values()) or 'fixed'}" for point in points]
    manifest = report.deployment.manifest
    rows: list[tuple[object, ...]] = [
        ("unmodified model", "", "", *(f"{entry.p50_ms:.2f}" for entry in report.baseline.latencies), "")
    ]
    rows += [_row(candidate, len(points), chosen=candidate is report.chosen) for candidate in report.candidates]
    console.table(("format", "proof", "error / tolerance", *headers, ""), rows, title=f"{manifest.model}")
    for candidate in report.candidates:
        if not candidate.passed:
            console.out.print(f"  [dim]{candidate.label} is out:[/] {candidate.reason}", markup=True)
        elif candidate.layers:
            console.out.print(f"  [dim]{_layers(candidate)}[/]")
    if report.fusions:
        console.out.print(f"  [dim]{_fusions(report)}[/]")
    for decision in report.decisions:
        if told := _told(decision, report):
            console.out.print(f"  [dim]{told}[/]")
    console.out.print()
    console.table(("memory", "where", ""), MemoryPlan.from_json(manifest.memory).rows_of_table())
    console.out.print()
    batch = f"batches up to {manifest.max_batch_size}" if manifest.max_batch_size else "does not batch"
    console.out.print(
        f"packaged [bold]{manifest.model}[/] version {manifest.version} as {manifest.format} ({batch}) "
        f"in {report.deployment.folder}, {report.seconds:.0f} s"
    )
    if report.active:
        console.next_command(f"kpdeploy serve {report.deployment.repository}")
        return
    console.out.print("it is not served yet")
    console.next_command(
        f"kpdeploy rollout {report.deployment.repository} --to {manifest.version} --against VERSION --url HOST:PORT"
    )


def _row(candidate: Candidate, points: int, *, chosen: bool) -> tuple[object, ...]:
    from kpdeploy.cli import console

    if candidate.artifact is None:
        return (candidate.label, "out", "", *([""] * points), "")
    if candidate.verdict is None:
        return (candidate.label, console.mark(False), "", *([""] * points), "")
    worst = candidate.verdict.worst
    times = [f"{entry.p50_ms:.2f}" for entry in candidate.latencies] or [""] * points
    # An error says little of fewer bits: what users of embeddings and logits ask for stands beside it.
    measures = f", cosine {worst.cosine:.4f}" if candidate.level > 1 and worst.metric != "cosine" else ""
    error = f"{worst}{measures}"
    return (candidate.label, console.mark(candidate.passed), error, *times, "packaged" if chosen else "")


def _layers(candidate: Candidate) -> str:
    """The layers with the largest errors of their own, and what stayed in float."""
    kept = sum(layer.precision not in ("int8", "fp8") for layer in candidate.layers)
    worst = sorted(candidate.layers, key=lambda layer: -layer.error)[:4]
    told = ", ".join(f"{layer.name} {layer.error:.1e} ({layer.precision})" for layer in worst)
    of = f"{len(candidate.layers)} layers, {kept} left in float"
    return f"{candidate.label}: {of}; the largest errors of layers by themselves: {told}"


def _told(decision: Any, report: ExportReport) -> str:
    """A decision as a line, unless the table says it already."""
    labels = {candidate.label for candidate in report.candidates}
    if decision.what in labels or decision in report.fusions:
        return ""
    return f"{decision.what}: {getattr(decision, 'detail', '') or getattr(decision, 'reason', '')}"


def _fusions(report: ExportReport) -> str:
    """What the fused candidates hold, as one line: fused 6 attention, 6 linear_activation; skipped 1 … (why)"""
    from kpdeploy.decision import Applied

    made = [d.what.removeprefix("fused ") for d in report.fusions if isinstance(d, Applied)]
    refused = [f"{d.what} ({d.reason})" for d in report.fusions if not isinstance(d, Applied)]
    parts = [f"fused {', '.join(made)}"] if made else []
    return "; ".join(parts + ([f"skipped {', '.join(refused)}"] if refused else []))
