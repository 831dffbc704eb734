"""Levels 2 and 3 on the CPU against the best that other tools make of the same model in as few bits, in one run.

    python benchmarks/levels.py prepare minilm --repo models/
    python benchmarks/levels.py measure minilm --repo models/ -o benchmarks/results/levels_minilm_cpu.json

`prepare` exports each level with the model's task measure as its budget, calibrated on examples/sentences.txt (images:
N(0, 1)). `measure` runs what was packaged beside its peers, each in a process of its own with the fastest of its
settings, in interleaved rounds of the same requests. A peer whose answers miss the least that level 3 may have (cosine
0.99) is a row that does not count. The accuracy of each level is told on benchmarks/sentences.txt, one sentence a
request, of which neither scales nor left-out layers were found.

MiniLM has its real weights; BERT-base, GPT-2 and ViT-B/16 have random ones, which say nothing about a task: the best of
their logits is as near to the second as chance has it, so that their budget is a cosine, and no share of top answers.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import peers
from peers import Names, Peer, Row, Workshop, ratio_interval, start, version_folder

from kpdeploy import __version__, export
from kpdeploy.artifact import Artifact, Manifest
from kpdeploy.cli import console
from kpdeploy.compare import agreement, least_cosine, relative_error
from kpdeploy.hardware import environment, usable_cores
from kpdeploy.inputs import Array
from kpdeploy.load.examples import minilm_folder
from kpdeploy.runtimes import source
from kpdeploy.runtimes.process import RuntimeProcess

HERE = Path(__file__).parent
RUNTIMES = HERE / "peer_runtimes"
LEAST_COSINE = 0.99
EXPORTED: dict[str, dict[str, str]] = {
    "2": {"format": "openvino", "fuse": "never"},
    "3": {"format": "openvino", "fuse": "never"},
    "2 fused": {"format": "torchscript", "fuse": "auto"},
}
"""What is exported by which level; level 1 is level 2's file, computed in float32. "2 fused" drops padding, and is made
of a model that takes a mask."""
DEFAULT = "OpenVINO as it comes (bf16 here)"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model: what kpdeploy loads, its inputs, its budget, and the sizes that are measured."""

    model: str
    inputs: tuple[str, ...]
    budget: str
    points: tuple[tuple[int, int, str], ...]
    """Rows, length, and "padded" where the rows' lengths are from an eighth of it to the whole."""

    @property
    def exported(self) -> tuple[str, ...]:
        return tuple(EXPORTED) if any(kind for _, _, kind in self.points) else ("2", "3")

    @property
    def images(self) -> bool:
        return any("float32" in text for text in self.inputs)


SUBJECTS = {
    "minilm": Subject(
        model="minilm", inputs=(), budget="cosine=0.99", points=((8, 128, ""), (1, 128, ""), (8, 128, "padded"))
    ),
    "bert": Subject(
        model="level_models:bert",
        inputs=("x:int64[batch=1..8,seq=1..128]{0..30521}",),
        budget="cosine=0.99",
        points=((1, 128, ""),),
    ),
    "gpt2": Subject(
        model="level_models:gpt2",
        inputs=("x:int64[batch=1..2,seq=1..256]{0..30521}",),
        budget="cosine=0.99",
        points=((1, 256, ""),),
    ),
    "vit": Subject(
        model="level_models:vit",
        inputs=("x:float32[batch=1..8,3,224,224]",),
        budget="cosine=0.99",
        points=((1, 224, ""),),
    ),
}


# Requests


def tokens(file: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    read.no_padding()
    return [entry.ids for entry in read.encode_batch([line for line in file.read_text().splitlines() if line])]


def requests(subject: Subject, file: Path) -> list[list[Array]]:
    """Real requests, one sentence each; of images, as many random ones."""
    if subject.images:
        rng = np.random.default_rng(len(file.name))
        return [[rng.standard_normal((1, 3, 224, 224), np.float32)] for _ in range(48)]
    found = [[np.array([ids], np.int64)] for ids in tokens(file)]
    return [[ids, np.ones_like(ids)] for (ids,) in found] if subject.model == "minilm" else found


def batch(subject: Subject, rows: int, length: int, kind: str) -> list[Array]:
    """One request of `rows` rows, whole or "padded": the sentences one after the other."""
    if subject.images:
        return [np.random.default_rng(0).standard_normal((rows, 3, length, length), np.float32)]
    running = np.concatenate([np.array(ids) for ids in tokens(HERE / "sentences.txt")])
    ids = np.resize(running, (rows, length)).astype(np.int64)
    if subject.model != "minilm":
        return [ids]
    lengths = np.linspace(length, length / 8, rows).round() if kind else np.full(rows, length)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return [ids * mask, mask]


def calibration(subject: Subject, folder: Path) -> Path:
    """What `kpdeploy export --calibrate` takes."""
    file = HERE.parent / "examples" / "sentences.txt"
    if subject.model == "minilm":
        return file
    given = requests(subject, file)[:32]
    # Lengths must agree in a file: each sentence again and again, up to one length.
    rows = np.concatenate([x if subject.images else np.resize(x, (1, 32)) for (x,) in given])
    np.savez(folder / "samples.npz", x=rows)
    return folder / "samples.npz"


# Peers


def peers_of(work: Workshop, folder: Path) -> list[Peer]:
    threads = max(1, int(usable_cores()))

    def onnx_int8() -> str:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(work.onnx(), folder / "int8.onnx")
        return str(folder / "int8.onnx")

    def name() -> str:
        return work.source

    def torch_peer(title: str, packages: tuple[str, ...] = (), **settings: Any) -> Peer:
        variants = ({"threads": threads, "freezing": True, **settings},)
        return Peer(
            name=title, prepare=name, runtime=RUNTIMES / "torch_module.py", variants=variants, packages=packages
        )

    def openvino(title: str, precision: str) -> Peer:
        variants = [{"precision": precision, "threads": count} for count in (0, threads)]
        return Peer(name=title, prepare=work.onnx, runtime=RUNTIMES / "openvino_plain.py", variants=variants)

    levels = [{"graph_level": level, "threads": threads} for level in ("all", "basic")]
    return [
        openvino(DEFAULT, ""),
        openvino("OpenVINO f32", "f32"),
        Peer(name="ORT f32", prepare=work.onnx, runtime=source("onnx"), variants=levels),
        Peer(name="ORT int8, quantize_dynamic", prepare=onnx_int8, runtime=source("onnx"), variants=levels),
        torch_peer("torch.compile f32", backend="inductor"),
        torch_peer("torch.compile bf16", backend="inductor", dtype="bfloat16"),
        torch_peer("torchao int8 dynamic, compiled", ("torchao",), backend="inductor", quantize="torchao"),
        torch_peer("torchao int8 dynamic bf16, compiled", ("torchao",), backend="inductor", quantize="torchao",
                   dtype="bfloat16"),
        torch_peer("zentorch f32", peers.zentorch_packages(), backend="zentorch"),
        torch_peer("zentorch bf16", peers.zentorch_packages(), backend="zentorch", dtype="bfloat16"),
    ]  # fmt: skip


# The two commands


@click.group()
def main() -> None:
    """Levels 2 and 3 on the CPU against their peers."""
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"


@main.command()
@click.argument("model", type=click.Choice(list(SUBJECTS)))
@click.option("--repo", required=True)
def prepare(model: str, repo: str) -> None:
    """Export MODEL once a level into REPO."""
    subject = SUBJECTS[model]
    with tempfile.TemporaryDirectory(prefix="kpdeploy-levels-") as scratch:
        for level in subject.exported:
            report = export(
                subject.model,
                repo=repo,
                name=name_of(model, level),
                **EXPORTED[level],
                input=subject.inputs,
                level=level[0],
                accuracy_budget=subject.budget,
                calibrate=calibration(subject, Path(scratch)),
                progress=console.progress(json_output=False),
            )
            for candidate in report.candidates:
                verdict = candidate.verdict
                console.out.print(f"level {level}: {candidate.label}: {verdict.worst if verdict else candidate.reason}")
                console.out.print(
                    f"    {[decision.detail for decision in candidate.decisions if candidate.layers][:1]}"
                )


@main.command()
@click.argument("model", type=click.Choice(list(SUBJECTS)))
@click.option("--repo", required=True, type=click.Path(path_type=Path))
@click.option("--rounds", default=7, show_default=True)
@click.option("--seconds", default=0.7, show_default=True)
@click.option("--venvs", type=click.Path(file_okay=False, path_type=Path), help="Where peers get their packages.")
@click.option("--only", multiple=True, metavar="TEXT", help="Run only peers whose name holds TEXT.")
@click.option(
    "--point", "points", multiple=True, metavar="ROWSxLENGTH[padded]", help="Measure here.  [default: all points]"
)
@click.option("-o", "output", required=True, type=click.Path(dir_okay=False, path_type=Path))
def measure(
    model: str,
    repo: Path,
    rounds: int,
    seconds: float,
    venvs: Path | None,
    only: tuple[str, ...],
    points: tuple[str, ...],
    output: Path,
) -> None:
    """Measure the levels of MODEL in REPO beside their peers."""
    subject = SUBJECTS[model]
    packages = {level: packaged(repo, name_of(model, level)) for level in subject.exported}
    manifest, folder = packages["2"]
    packages = {"1": (replace(manifest, settings={**manifest.settings, "precision": "f32"}), folder), **packages}
    report: dict[str, Any] = {
        "what": "levels 1 to 3 against peers, same requests; ratio = peer's / level's median",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "weights": "real" if model == "minilm" else "random",
        "budget": subject.budget,
        "rounds": rounds,
        "seconds": seconds,
    }
    with tempfile.TemporaryDirectory(prefix="kpdeploy-levels-") as scratch:
        work = Workshop(subject.model, packages["1"][0].signature, Path(scratch), subject.inputs)
        report["accuracy"] = accuracy(subject, work, packages)
        report["points"] = []
        for rows, length, kind in subject.points:
            if points and f"{rows}x{length}{kind}" not in points:
                continue
            arrays = batch(subject, rows, length, kind)
            ours = [
                peers.packaged(manifest, folder, f"level {level}") for level, (manifest, folder) in packages.items()
            ]
            wanted = [p for p in peers_of(work, Path(scratch)) if not only or any(t in p.name for t in only)]
            found = one_point(work, packages["1"][0], [*ours, *wanted], arrays, rounds, seconds, venvs)
            report["points"].append({"rows": rows, "length": length, "kind": kind, **found})
            show(f"{model} {rows}x{length} {kind}", found)
    report["load_average"] = list(os.getloadavg())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1, default=list) + "\n")


def name_of(model: str, level: str) -> str:
    return f"{model}-l{level.replace(' ', '-')}"


def packaged(repo: Path, name: str) -> tuple[Manifest, Path]:
    folder = version_folder(repo, name)
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    return manifest, folder


def accuracy(subject: Subject, work: Workshop, packages: Mapping[str, tuple[Manifest, Path]]) -> list[dict[str, Any]]:
    """Each level on sentences that it has never seen, one a request: the worst of them."""
    asked = requests(subject, HERE / "sentences.txt")
    wanted = [work.answer(arrays)[0] for arrays in asked]
    found = []
    for level, (manifest, folder) in packages.items():
        with RuntimeProcess(artifact_of(manifest, folder)) as process:
            answers = [process.run(arrays)[0] for arrays in asked]
        pairs = list(zip(answers, wanted, strict=True))
        rows = [(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])) for a, b in pairs]
        found.append(
            {
                "level": level,
                "settings": dict(manifest.settings),
                "least_cosine": min(least_cosine(a, b) for a, b in pairs),
                "largest_error": max(relative_error(a, b) for a, b in pairs),
                "top1": float(np.mean(np.concatenate([np.argmax(a, -1) == np.argmax(b, -1) for a, b in rows]))),
                "least_top1": min(agreement(a, b) for a, b in pairs),
                "requests": len(asked),
            }
        )
    return found


def artifact_of(manifest: Manifest, folder: Path) -> Artifact:
    return Artifact(
        format=manifest.format,
        folder=folder,
        filename=manifest.filename,
        input_names=manifest.input_names,
        output_names=manifest.output_names,
        settings=manifest.settings,
    )


def one_point(
    work: Workshop,
    manifest: Manifest,
    all_peers: Sequence[Peer],
    arrays: Sequence[Array],
    rounds: int,
    seconds: float,
    venvs: Path | None,
) -> dict[str, Any]:
    progress = console.progress(json_output=False)
    names = Names(inputs=tuple(manifest.input_names), outputs=tuple(manifest.output_names))
    (expected,) = work.answer(arrays)
    measures: dict[int, dict[str, float]] = {}
    with ExitStack() as stack:
        rows: list[Row] = []
        for peer in all_peers:
            with progress.step(f"starting {peer.name}"):
                row = start(peer, arrays, names, venvs or peers.default_venvs(), stack)
            rows.append(row)
            if row.process is not None:
                (answer,) = row.process.run(arrays)
                measures[id(row)] = {
                    "error": relative_error(answer, expected),
                    "cosine": least_cosine(answer, expected),
                }
                if measures[id(row)]["cosine"] < LEAST_COSINE:
                    row.reason = f"does not count: cosine {measures[id(row)]['cosine']:.4f}"
        running = {row.peer.kind: arrays for row in rows}
        for number in range(rounds):
            peers.measure(rows, running, number, seconds)
        told = [{**row.to_json(), **measures.get(id(row), {})} for row in rows]
    found: dict[str, Any] = {"rows": told, "ratios": []}
    counting = [row for row in rows if row.peer.kind == "peer" and row.counts]
    for row in rows:
        if row.peer.kind.startswith("level") and row.counts and counting:
            default = [p for p in counting if p.peer.name == DEFAULT]
            best = min(counting, key=lambda p: p.median_ms)
            for against in [*default, best]:
                low, high = ratio_interval(row.rounds, against.rounds)
                ratio = against.median_ms / row.median_ms
                entry = {"level": row.peer.kind, "against": against.peer.name, "ratio": ratio, "ratio_95": [low, high]}
                found["ratios"].append(entry)
    return found


def show(title: str, found: Mapping[str, Any]) -> None:
    lines = []
    for row in sorted(found["rows"], key=lambda row: row.get("median_ms", float("inf"))):
        name = row["kind"] if row["kind"].startswith("level") else row["name"]
        time_ms = f"{row['median_ms']:.2f}" if "median_ms" in row else ""
        lines.append((name, time_ms, f"{row.get('cosine', float('nan')):.5f}", row["reason"][:150]))
    console.table(("", "median ms", "cosine", ""), lines, title=title)
    for entry in found["ratios"]:
        low, high = entry["ratio_95"]
        console.out.print(
            f"{entry['level']} against {entry['against']}: {entry['ratio']:.2f} x ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
