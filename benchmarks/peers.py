"""The packaged artifact against the best that other tools make of the same model, float32, in one run.

    python benchmarks/peers.py models/ --model minilm -o benchmarks/results/peers_minilm_8x128_cpu.json

The subject is the repository's artifact with its manifest's settings, in the process that also proves and serves it.
Every peer has a process of its own and the fastest of its settings, found by a short calibration; the subject has
none. All answer the same padded batch in interleaved rounds. An answer that is further than 1e-4 from eager PyTorch
disqualifies its peer; a peer that cannot run here is a row with its reason. `--workshop DIR --prepare` makes the
peers' files beforehand, for a machine that must be quiet only while it measures.

Beside them stands the floor: the model's multiplications and additions at this machine's rate for float32 matrix
products, measured in the same rounds.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from kpdeploy import __version__
from kpdeploy.artifact import Artifact, Manifest
from kpdeploy.cli import console
from kpdeploy.compare import relative_error
from kpdeploy.errors import KpdeployError, PackageMissing, ProofFailed, RepositoryBroken
from kpdeploy.hardware import environment, usable_cores
from kpdeploy.inputs import Array, lead_axis, sample
from kpdeploy.runtimes import source
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.signature import Signature

LARGEST_ERROR = 1e-4
"""An answer further than this from eager float32 is another precision, and no peer."""

SHORTEST = 16
"""The padded batch: lengths fall evenly from the full one to this."""

CALIBRATION_SECONDS = 1.0
GEMM_SIZES = (1024, 2048, 2048)
"""Rows, depth and columns of the matrix product that gives the machine's rate: large enough to hide its start."""

SUBJECT = "packaged"
RUNTIMES = Path(__file__).with_name("peer_runtimes")
Rounds = Sequence[Sequence[float]]
"""Milliseconds of single calls, one list a round."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to run the model: the file that it runs, the runtime, and the settings worth trying.

    `prepare` makes the file (or names the model) and gives its path. `packages` need an environment of their own.
    `kind` is "peer", "subject", "also" (another artifact of the repository) or "ceiling" (a matrix product, no answer
    to compare). `format` is that of a packaged artifact.
    """

    name: str
    prepare: Callable[[], str]
    runtime: Path
    variants: Sequence[Mapping[str, Any]]
    packages: tuple[str, ...] = ()
    kind: str = "peer"
    format: str = ""


@dataclass(kw_only=True)
class Row:
    """What became of a peer. `reason` says why it has no times, or why they do not count."""

    peer: Peer
    settings: Mapping[str, Any] = field(default_factory=dict)
    tried_ms: list[dict[str, Any]] = field(default_factory=list)
    error: float | None = None
    reason: str = ""
    process: RuntimeProcess | None = None
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        return bool(self.rounds) and not self.reason

    @property
    def median_ms(self) -> float:
        return float(np.median(np.concatenate(self.rounds)))

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "name": self.peer.name,
            "kind": self.peer.kind,
            "settings": dict(self.settings),
            "tried": self.tried_ms,
            "relative_error": self.error,
            "reason": self.reason,
        }
        if self.rounds:
            data |= figures(self.rounds)
            data["round_medians_ms"] = [round(float(np.median(taken)), 4) for taken in self.rounds]
        if self.process is not None:
            data["peak_bytes"] = self.process.peak_bytes
        return data


def figures(rounds: Rounds) -> dict[str, Any]:
    """Median, p99 and minimum of all calls of all rounds, in milliseconds."""
    taken = np.concatenate(rounds)
    p50, p99 = np.percentile(taken, [50, 99])
    found = {"median_ms": p50, "p99_ms": p99, "min_ms": taken.min()}
    return {name: round(float(value), 4) for name, value in found.items()} | {"calls": len(taken)}


def ratio_interval(subject: Rounds, peer: Rounds, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of peer's median / subject's median when the rounds are drawn anew, with replacement.

    Both are drawn from the same rounds: what slowed a round down slowed both. Above 1 the subject is faster.
    """
    if len(subject) != len(peer):
        raise ValueError(f"{len(subject)} rounds against {len(peer)}")
    rng = np.random.default_rng(seed)
    ratios = []
    for picked in rng.integers(len(subject), size=(draws, len(subject))):
        against = np.median(np.concatenate([peer[i] for i in picked]))
        ratios.append(against / np.median(np.concatenate([subject[i] for i in picked])))
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


# The inputs


def padded_batch(signature: Signature, point: Mapping[str, int]) -> list[Array]:
    """Valid inputs in call order; masks are of lengths that fall evenly from the full length to SHORTEST."""
    arrays = sample(signature, point, np.random.default_rng(0))
    for spec in signature.inputs:
        if spec.values is not None and spec.values.kind == "prefix_mask":
            rows, width = arrays[spec.name].shape
            lengths = np.linspace(width, min(SHORTEST, width), rows).round().astype(int)
            arrays[spec.name] = (np.arange(width) < lengths[:, None]).astype(spec.dtype)
    return list(arrays.values())


def point_of(signature: Signature, batch: int, seq: int) -> dict[str, int]:
    lead = lead_axis(signature)
    return {a.name: min(max(batch if a.name == lead else seq, a.min), a.max) for a in signature.axes}


# The files that the peers run


@dataclass(frozen=True)
class Workshop:
    """The unmodified model, and the files that the peers start from, each made when first asked for. `inputs` as
    `kpdeploy export --input` takes them, where the model does not tell its axes."""

    source: str
    signature: Signature
    folder: Path
    inputs: tuple[str, ...] = ()

    @functools.cached_property
    def model(self) -> Any:
        from kpdeploy.load import Request, load_model

        return load_model(self.source, Request(inputs=self.inputs))

    def answer(self, arrays: Sequence[Array]) -> list[Array]:
        """Eager PyTorch in float32: what every answer is compared with."""
        from kpdeploy.load.reference import reference

        names = [spec.name for spec in self.signature.inputs]
        return list(reference(self.model)(dict(zip(names, arrays, strict=True))).values())

    def flops(self, arrays: Sequence[Array]) -> int:
        """Two for each multiplication and addition of the matrix products of one call, padding included."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        # The counter knows no fused CPU attention; as plain matrix products it counts the same work.
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            self.model.module(*(torch.from_numpy(a) for a in arrays))
        return int(counter.get_total_flops())

    @functools.cached_property
    def capture(self) -> Any:
        return self._capture("sdpa", self.model)

    @functools.cached_property
    def eager_capture(self) -> Any:
        """The capture of the model with attention written out, the form that graph optimizers look for."""
        from kpdeploy.load import load_model

        model = load_model(self.source)
        pretrained(model).set_attn_implementation("eager")
        return self._capture("eager", model)

    def _capture(self, name: str, model: Any) -> Any:
        from kpdeploy.export import Capture
        from kpdeploy.export.capture import settle_axes

        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return Capture(settle_axes(model, stated=bool(self.inputs)), folder)

    def _kept(self, file: str, make: Callable[[Path], object]) -> str:
        """The path of a file in the workshop, made now if an earlier run has not left it."""
        path = self.folder / file
        if not path.exists():
            make(path)
        return str(path)

    def onnx(self) -> str:
        return self._kept("sdpa/onnx/model.onnx", lambda path: self.capture.onnx_file)

    def eager_onnx(self) -> str:
        return self._kept("eager/onnx/model.onnx", lambda path: self.eager_capture.onnx_file)

    def torchscript(self) -> str:
        return self._kept("torchscript/model.pt", self._exported("torchscript"))

    def aoti(self) -> str:
        return self._kept("pt2/model.pt2", self._exported("pt2"))

    def _exported(self, format: str) -> Callable[[Path], object]:
        def make(path: Path) -> None:
            from kpdeploy.export import FORMATS

            part = path.parent.with_suffix(".part")  # what is interrupted is made again
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            FORMATS[format].export(self.capture, part)
            part.rename(path.parent)

        return make

    @functools.cached_property
    def optimized(self) -> str:
        """The graph after onnxruntime.transformers' optimizer, which must have fused something to be a peer."""
        from onnxruntime.transformers import optimizer

        from kpdeploy.export.capture import quiet

        path = self.folder / "optimized.onnx"
        if path.exists():
            return str(path)
        config = pretrained(self.model).config
        with quiet(), redirect_stdout(sys.stderr):
            optimized = optimizer.optimize_model(
                self.eager_onnx(),
                model_type="bert",
                num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
                opt_level=0,
                use_gpu=False,
            )
            optimized.save_model_to_file(str(path))
        fused = {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}
        if not fused:
            raise RuntimeError("the optimizer found nothing to fuse in the exported graph")
        console.err.print(f"onnxruntime.transformers fused {fused}")
        return str(path)


def pretrained(model: Any) -> Any:
    """The transformers module inside a Model; others have no attention that could be switched."""
    for module in model.module.modules():
        if hasattr(module, "set_attn_implementation"):
            return module
    raise RuntimeError("not a transformers model: its attention cannot be written out")


def matrix_product(folder: Path) -> str:
    """An ONNX file of one float32 matrix product with a constant right side, which runtimes may pack."""
    from onnx import TensorProto, helper, numpy_helper, save

    rows, depth, columns = GEMM_SIZES
    weight = np.random.default_rng(0).standard_normal((depth, columns)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = folder / "gemm.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return str(path)


# The peers


PLAIN = {"onnx": "ORT", "torchscript": "TorchScript", "pt2": "AOTInductor", "openvino": "OpenVINO f32"}
"""How the names of the peers begin that run the same format without kpdeploy's ops."""


def packaged(manifest: Manifest, folder: Path, kind: str) -> Peer:
    fused = " with fused ops" if manifest.settings.get("op_libraries") else ""
    return Peer(
        name=f"{SUBJECT if kind == 'subject' else manifest.model}: kpdeploy, {manifest.format}{fused}",
        prepare=lambda: str(folder / manifest.filename),
        runtime=source(manifest.format),
        variants=(manifest.settings,),
        kind=kind,
        format=manifest.format,
    )


def peers_of(work: Workshop, shapes: Sequence[Sequence[int]]) -> list[Peer]:
    threads = [{"threads": 0}, {"threads": max(1, int(usable_cores()))}]
    module = RUNTIMES / "torch_module.py"
    plain = RUNTIMES / "openvino_plain.py"

    def name() -> str:
        return work.source

    def each(**settings: Any) -> list[dict[str, Any]]:
        return [{**settings, **choice} for choice in threads]

    def ort(title: str, prepare: Callable[[], str], *levels: str) -> Peer:
        variants = [variant for level in levels for variant in each(graph_level=level)]
        return Peer(name=title, prepare=prepare, runtime=source("onnx"), variants=variants)

    def compiled(title: str, backend: str, *settings: Mapping[str, Any], packages: tuple[str, ...] = ()) -> Peer:
        variants = [{"backend": backend, **threads[1], **s} for s in settings]
        return Peer(name=title, prepare=name, runtime=module, variants=variants, packages=packages)

    return [
        Peer(name="torch eager", prepare=name, runtime=module, variants=threads),
        compiled("torch.compile", "inductor", {}),
        compiled("torch.compile, freezing", "inductor", {"freezing": True}),
        Peer(name="TorchScript", prepare=work.torchscript, runtime=source("torchscript"), variants=threads),
        Peer(name="AOTInductor frozen", prepare=work.aoti, runtime=source("pt2"), variants=threads),
        ort("ORT disable", work.onnx, "none"),
        ort("ORT basic", work.onnx, "basic"),
        ort("ORT extended", work.onnx, "extended"),
        ort("ORT all", work.onnx, "all"),
        ort("ORT, attention written out", work.eager_onnx, "basic", "all"),
        ort("ORT + transformers optimizer", lambda: work.optimized, "basic", "all"),
        Peer(
            name="ORT, OpenVINO provider",
            prepare=work.onnx,
            runtime=RUNTIMES / "onnx_openvino.py",
            variants=threads,
            packages=("onnxruntime-openvino",),
        ),
        Peer(name="OpenVINO f32", prepare=work.onnx, runtime=plain, variants=threads),
        Peer(name="OpenVINO f32, fixed shapes", prepare=work.onnx, runtime=plain, variants=each(shapes=shapes)),
        compiled("zentorch f32", "zentorch", {"freezing": True}, {}, packages=zentorch_packages()),
    ]


def zentorch_packages() -> tuple[str, ...]:
    """A release of zentorch is built for the release of torch whose number it has."""
    from importlib.metadata import version

    major, minor, *_ = version("torch").split(".")
    return (f"zentorch=={major}.{minor}.*", "deprecated", "wrapt")


def ceilings(folder: Path) -> list[Peer]:
    path = functools.cache(lambda: matrix_product(folder))
    return [
        Peer(name="GEMM, OpenVINO", prepare=path, runtime=source("openvino"), variants=({},), kind="ceiling"),
        Peer(name="GEMM, ORT", prepare=path, runtime=source("onnx"), variants=({},), kind="ceiling"),
    ]


# Environments of their own


def python_for(peer: Peer, venvs: Path | None) -> str:
    """The interpreter of a peer: this one, or that of an environment which is made now if it is not there.

    The environment holds only the peer's packages; all others are this one's, behind them on the path.
    """
    if not peer.packages:
        return sys.executable
    if venvs is None:
        raise PackageMissing("its own environment was not wanted", why="--no-venvs")
    folder = venvs / peer.packages[0].translate(str.maketrans({"=": "-", ".": "_", "*": "x"}))
    if not folder.exists():
        make_environment(folder, peer.packages)
    return str(folder / "bin" / "python")


def make_environment(folder: Path, packages: Sequence[str]) -> None:
    aside = folder.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    venv.create(aside, with_pip=False, symlinks=True)
    python = aside / "bin" / "python"
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(aside)
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr.strip()]
        raise PackageMissing(f"{packages[0]} cannot be installed", why=errors[-1])
    (packages_folder,) = (aside / "lib").glob("python*/site-packages")
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
    (packages_folder / "zz_behind.pth").write_text("".join(lines))
    aside.rename(folder)


# The run


def start(peer: Peer, arrays: Sequence[Array], names: Names, venvs: Path | None, stack: ExitStack) -> Row:
    """Start a peer with the fastest of its settings; its process stays until `stack` closes."""
    row = Row(peer=peer)
    try:
        python, path = python_for(peer, venvs), Path(peer.prepare())
    except KpdeployError as error:
        row.reason = f"{error.what}: {error.why}"
        return row
    except Exception as error:  # whatever a tool raises is why it has no figures
        row.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        return row
    artifact = Artifact(
        format="peer", folder=path.parent, filename=path.name, input_names=names.inputs, output_names=names.outputs
    )
    best = float("inf")
    for settings in peer.variants:
        process = RuntimeProcess(artifact, settings, runtime_file=peer.runtime, python=python)
        with ExitStack() as own:
            try:
                own.enter_context(process)
                taken = float(np.median(process.time(arrays, seconds=CALIBRATION_SECONDS, at_least=3)))
            except ProofFailed as error:
                row.tried_ms.append({"settings": dict(settings), "failed": error.why})
                continue
            row.tried_ms.append({"settings": dict(settings), "median_ms": round(taken, 3)})
            if taken < best:
                if row.process is not None:
                    row.process.__exit__()
                best, row.process, row.settings = taken, process, settings
                own.pop_all()
    if row.process is None:
        row.reason = str(row.tried_ms[-1]["failed"])
    else:
        stack.push(row.process)
    return row


@dataclass(frozen=True, kw_only=True)
class Names:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def judge(row: Row, arrays: Sequence[Array], expected: Sequence[Array]) -> None:
    """Compare the answer with eager PyTorch's."""
    if row.process is None:
        return
    try:
        answers = row.process.run(arrays)
    except ProofFailed as error:
        drop(row, error)
        return
    row.error = max(relative_error(a, ref) for a, ref in zip(answers, expected, strict=True))
    if row.error > LARGEST_ERROR:
        row.reason = f"disqualified: relative error {row.error:.1e} is no float32"


def measure(rows: Sequence[Row], inputs: Mapping[str, Sequence[Array]], number: int, seconds: float) -> None:
    """One round: every process, starting with another one each time."""
    running = [row for row in rows if row.process is not None]
    first = number % len(running)
    for row in running[first:] + running[:first]:
        assert row.process is not None
        try:
            row.rounds.append(row.process.time(inputs[row.peer.kind], seconds=seconds, at_least=5))
        except ProofFailed as error:
            drop(row, error)


def drop(row: Row, error: ProofFailed) -> None:
    """End a peer that died half-way."""
    assert row.process is not None
    row.process.__exit__()
    row.process, row.rounds, row.reason = None, [], f"died while it was measured: {error.why}"


def version_folder(repo: Path, model: str) -> Path:
    """The newest version, which is the one that the repository's configuration publishes."""
    versions = [int(p.name) for p in (repo / model).glob("*") if p.name.isdigit()]
    if not versions:
        raise RepositoryBroken(f"{repo} holds no version of {model}", next_step="export it with `kpdeploy export`")
    return repo / model / str(max(versions))


def default_venvs() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpdeploy" / "peers"


@click.command()
@click.argument("repo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", required=True, help="The model's name in REPO.")
@click.option("--also", multiple=True, metavar="NAME", help="Another model of REPO, of the same inputs, as a row.")
@click.option("--from", "original", metavar="MODEL", help="The unmodified model.  [default: the name]")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seq", type=click.IntRange(min=1), default=128, show_default=True, help="Size of every other axis.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=1, show_default=True)
@click.option("--only", multiple=True, metavar="TEXT", help="Run only peers whose name holds TEXT.")
@click.option(
    "--venvs",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where peers that need packages of their own get them.  [default: kpdeploy's cache folder]",
)
@click.option(
    "--workshop",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the peers' files are kept, for the next run.  [default: nowhere]",
)
@click.option("--prepare", is_flag=True, help="Only make the peers' files, and measure nothing.")
@click.option("--no-venvs", is_flag=True, help="Leave those peers out; their rows say so.")
@click.option("-o", "output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON to write.")
def main(
    repo: Path, model: str, also: tuple[str, ...], original: str | None, batch: int, seq: int, rounds: int,
    seconds: float, only: tuple[str, ...], venvs: Path | None, no_venvs: bool, workshop: Path | None,
    prepare: bool, output: Path,
) -> None:  # fmt: skip
    """Measure the packaged MODEL of REPO against its peers, and write the ratios."""
    folder = version_folder(repo, model)
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    others = [(Manifest.read(place), place) for place in (version_folder(repo, name) for name in also)]
    packages = [packaged(manifest, folder, "subject"), *(packaged(m, place, "also") for m, place in others)]
    point = point_of(manifest.signature, batch, seq)
    arrays = padded_batch(manifest.signature, point)
    load = {"before": list(os.getloadavg())}
    progress = console.progress(json_output=False)
    with tempfile.TemporaryDirectory(prefix="kpdeploy-peers-") as scratch, ExitStack() as stack:
        work = Workshop(original or model, manifest.signature, workshop or Path(scratch))
        product = [np.random.default_rng(1).standard_normal(GEMM_SIZES[:2]).astype(np.float32)]
        inputs = {"subject": arrays, "also": arrays, "peer": arrays, "ceiling": product}
        wanted = [
            p for p in peers_of(work, [list(a.shape) for a in arrays]) if not only or any(t in p.name for t in only)
        ]
        if prepare:
            for peer in wanted:
                with progress.step(f"making the files of {peer.name}"), suppress(Exception):  # told when it is measured
                    peer.prepare()
            return
        rows = []
        for peer in (*packages, *wanted, *ceilings(Path(scratch))):
            with progress.step(f"starting {peer.name}"):
                place = None if no_venvs else venvs or default_venvs()
                rows.append(start(peer, inputs[peer.kind], names_of(peer, manifest), place, stack))
        with progress.step("asking eager PyTorch, and comparing"):
            expected, flops = work.answer(arrays), work.flops(arrays)
            for row in rows:
                if row.peer.kind != "ceiling":
                    judge(row, arrays, expected)
        if rows[0].process is None:
            raise ProofFailed("the packaged artifact does not run here", why=rows[0].reason)
        with progress.step("measuring in rounds", total=rounds) as advance:
            for number in range(rounds):
                measure(rows, inputs, number, seconds)
                advance()
        load["after"] = list(os.getloadavg())
        found = outcome(rows, flops)
        report = {
            "what": "packaged artifact against peers, float32, same padded inputs; ratio = peer's / subject's median",
            "kpdeploy": __version__,
            "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": environment(),
            "load_average": load,
            "model": {"name": model, "version": manifest.version, "format": manifest.format,
                      "settings": dict(manifest.settings), "files": dict(manifest.files)},
            "point": point,
            "real_tokens": [int(n) for n in arrays[-1].sum(axis=-1)] if is_mask(manifest.signature) else None,
            "rounds": rounds,
            "seconds": seconds,
            **found,
            "rows": [row.to_json() for row in rows],
        }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2, default=list) + "\n")
    show(model, point, rows, found, load)
    console.err.print(f"written: {output}")


def names_of(peer: Peer, manifest: Manifest) -> Names:
    if peer.kind == "ceiling":
        return Names(inputs=("x",), outputs=("y",))
    signature = manifest.signature
    return Names(inputs=tuple(s.name for s in signature.inputs), outputs=tuple(s.name for s in signature.outputs))


def is_mask(signature: Signature) -> bool:
    values = signature.inputs[-1].values
    return values is not None and values.kind == "prefix_mask"


def outcome(rows: Sequence[Row], flops: int) -> dict[str, Any]:
    """The ratio to the best peer that counts, and the floor."""
    subject, *_ = rows
    if not subject.counts:
        raise ProofFailed("the packaged artifact cannot be compared", why=subject.reason)
    found: dict[str, Any] = {"flops": flops, "best_peer": None, "floor": None}
    peers = [row for row in rows if row.peer.kind == "peer" and row.counts]
    if peers:
        best = min(peers, key=lambda row: row.median_ms)
        low, high = ratio_interval(subject.rounds, best.rounds)
        ratio = best.median_ms / subject.median_ms
        found["best_peer"] = {"name": best.peer.name, "ratio": ratio, "ratio_95": [low, high]}
        found["own_format"] = [against for row in rows if (against := against_plain(row, peers))]
    products = [row for row in rows if row.peer.kind == "ceiling" and row.counts]
    if products:
        fastest = min(products, key=lambda row: row.median_ms)
        rate = 2 * float(np.prod(GEMM_SIZES)) / (fastest.median_ms * 1e-3)
        floor_ms = flops / rate * 1e3
        found["floor"] = {
            "by": fastest.peer.name,
            "gflops_per_second": round(rate / 1e9, 1),
            "floor_ms": round(floor_ms, 3),
            "subject_reaches": round(floor_ms / subject.median_ms, 3),
        }
    return found


def against_plain(row: Row, peers: Sequence[Row]) -> dict[str, Any] | None:
    """A packaged artifact against the best peer in its own format, and against OpenVINO."""
    if row.peer.kind not in ("subject", "also") or not row.counts:
        return None
    found: dict[str, Any] = {"name": row.peer.name}
    for title, start in (("plain", PLAIN[row.peer.format]), ("openvino", PLAIN["openvino"])):
        named = [p for p in peers if p.peer.name.startswith(start) and "provider" not in p.peer.name]
        if named:
            best = min(named, key=lambda p: p.median_ms)
            low, high = ratio_interval(row.rounds, best.rounds)
            found[title] = {"name": best.peer.name, "ratio": best.median_ms / row.median_ms, "ratio_95": [low, high]}
    return found


def show(
    model: str, point: Mapping[str, int], rows: Sequence[Row], found: Mapping[str, Any], load: Mapping[str, Any]
) -> None:
    subject = rows[0].median_ms
    lines = []
    for row in sorted(rows, key=lambda row: row.median_ms if row.rounds else float("inf")):
        if row.peer.kind == "ceiling":
            continue
        numbers = figures(row.rounds) if row.rounds else {}
        times = [f"{numbers[k]:.2f}" if numbers else "" for k in ("median_ms", "p99_ms", "min_ms")]
        ratio = f"{row.median_ms / subject:.2f}" if numbers else ""
        error = "" if row.error is None else f"{row.error:.1e}"
        lines.append((row.peer.name, *times, ratio, error, settings_of(row) if not row.reason else row.reason[:200]))
    columns = ("", "median ms", "p99 ms", "min ms", "x packaged", "error", "settings, or why not")
    sizes = " ".join(f"{name} {size}" for name, size in point.items())
    console.table(columns, lines, title=f"{model}, {sizes}, float32, {usable_cores():g} cores")
    if floor := found["floor"]:
        console.out.print(
            f"floor {floor['floor_ms']:.1f} ms: {found['flops'] / 1e9:.1f} GFLOP at {floor['gflops_per_second']:.0f} "
            f"GFLOP/s ({floor['by']}); the package reaches {floor['subject_reaches']:.0%} of it"
        )
    if best := found["best_peer"]:
        low, high = best["ratio_95"]
        console.out.print(f"packaged against {best['name']}: {best['ratio']:.3f} x  (95 %: {low:.3f} to {high:.3f})")
    for entry in found.get("own_format", ()):
        for title in ("plain", "openvino"):
            if against := entry.get(title):
                low, high = against["ratio_95"]
                between = f"(95 %: {low:.3f} to {high:.3f})"
                console.out.print(f"{entry['name']} against {against['name']}: {against['ratio']:.3f} x  {between}")
    console.out.print(f"load average of the minute before {load['before'][0]:.2f}, after {load['after'][0]:.2f}")


def settings_of(row: Row) -> str:
    untold = ("shapes", "backend", "op_libraries")
    return ", ".join(f"{key} {value}" for key, value in row.settings.items() if key not in untold)


if __name__ == "__main__":
    main()
