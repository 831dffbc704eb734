"""What fused ops and dropped padding save, in CPU time of one thread: for machines that are shared.

    python benchmarks/fused_cpu.py minilm --batch 8 --seq 128 -o benchmarks/results/fused_minilm_8x128_one_thread.json

The model as ONNX and TorchScript without the ops, with them, and with them and without padding, beside OpenVINO; all in
one process, each on one thread, in interleaved rounds. What counts is the process's CPU time, which other processes
lengthen by what they take of the caches and the memory's rate, and not by their turns on the cores. Answers are held to
eager PyTorch's, and the floor is the model's arithmetic at the rate of the faster float32 product of ONNX Runtime's and
oneDNN's, by the same clock.
How well a second thread helps is not measured here: `peers.py` on a quiet machine does that.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import openvino
import torch
from peers import GEMM_SIZES, Workshop, matrix_product, padded_batch, point_of, ratio_interval

from kpdeploy.cli import console
from kpdeploy.compare import relative_error
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.export import FORMATS, Capture
from kpdeploy.export.capture import settle_axes
from kpdeploy.hardware import environment
from kpdeploy.inputs import Array
from kpdeploy.load import load_model
from kpdeploy.load.flat import Flat
from kpdeploy.model import Model
from kpdeploy.ops import register
from kpdeploy.ops.libraries import ONNX, find
from kpdeploy.optimize import fuse
from kpdeploy.optimize.pack import pack

Run = Callable[[], Sequence[Array]]
PRODUCT = "product, "
LEVELS = onnxruntime.GraphOptimizationLevel


def onnx_run(path: Path, level: Any, arrays: Sequence[Array]) -> Run:
    library = find(ONNX)
    assert not isinstance(library, Skipped), library.reason
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = 1, level
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = dict(zip((i.name for i in session.get_inputs()), arrays, strict=True))
    return lambda: session.run(None, feeds)


def openvino_run(path: Path, arrays: Sequence[Array]) -> Run:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().read_model(path)
    model.reshape({i: list(a.shape) for i, a in enumerate(arrays)})
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: list(compiled(list(arrays)).values())


def script_run(path: Path, arrays: Sequence[Array]) -> Run:
    module, tensors = torch.jit.load(path), [torch.from_numpy(a) for a in arrays]
    return lambda: [t.numpy() for t in module(*tensors)]


def captured(model: Model, module: Any) -> Model:
    return settle_axes(replace(model, kind="module", module=Flat(module, None), program=None), stated=True)


def files(model: Model, folder: Path) -> tuple[dict[str, Path], list[Decision]]:
    """The model's files by what they are, and what was fused in those for ONNX Runtime."""
    made, told = {}, list[Decision]()

    def write(format: str, name: str, of: Model) -> None:
        place = folder / f"{format}-{name}"
        place.mkdir()
        FORMATS[format].export(Capture(of, place), place)
        made[f"{format} {name}"] = place / FORMATS[format].filename

    for format in ("onnx", "torchscript"):
        write(format, "plain", model)
        fused = fuse(model, left=FORMATS[format].leaves)
        write(format, "fused", captured(model, fused.module))
        packed = pack(fused.module)
        if isinstance(packed, Applied):
            write(format, "packed", captured(model, fused.module))
        told += [*fused.decisions, packed] if format == "onnx" else []
    return made, told


def runs_of(made: dict[str, Path], arrays: Sequence[Array]) -> dict[str, Run]:
    runs: dict[str, Run] = {
        "ORT basic": onnx_run(made["onnx plain"], LEVELS.ORT_ENABLE_BASIC, arrays),
        "ORT all": onnx_run(made["onnx plain"], LEVELS.ORT_ENABLE_ALL, arrays),
        "OpenVINO f32, fixed shapes": openvino_run(made["onnx plain"], arrays),
    }
    for name, path in made.items():
        if name.startswith("torchscript"):
            runs[name.replace("torchscript", "TorchScript")] = script_run(path, arrays)
        elif name != "onnx plain":
            runs[name.replace("onnx", "ONNX")] = onnx_run(path, LEVELS.ORT_ENABLE_ALL, arrays)
    return runs


def products(folder: Path) -> dict[str, Run]:
    """One large float32 product with a constant right side, by those whose rate is the machine's."""
    rows, depth, columns = GEMM_SIZES
    x, weight = torch.randn(rows, depth), torch.randn(columns, depth)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    path = Path(matrix_product(folder))
    return {
        PRODUCT + "ORT": onnx_run(path, LEVELS.ORT_ENABLE_ALL, [x.numpy()]),
        PRODUCT + "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "none"),
    }


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[list[float]]]:
    """Milliseconds of CPU time, one call a round."""
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            taken[name].append([(time.process_time() - start) * 1e3])
    return taken


@click.command()
@click.argument("model")
@click.option("--batch", type=int, default=8, show_default=True)
@click.option("--seq", type=int, default=128, show_default=True)
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("-o", "output", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(model: str, batch: int, seq: int, rounds: int, output: Path) -> None:
    """Measure MODEL in each form, and write medians and ratios."""
    torch.set_num_threads(1)
    register()
    described = settle_axes(load_model(model), stated=False)
    arrays = padded_batch(described.signature, point_of(described.signature, batch, seq))
    with tempfile.TemporaryDirectory(prefix="kpdeploy-fused-") as scratch, torch.inference_mode():
        work = Workshop(model, described.signature, Path(scratch))
        with torch.inference_mode(False):
            made, told = files(described, Path(scratch))
        expected, flops = work.answer(arrays), work.flops(arrays)
        runs = runs_of(made, arrays)
        errors = {
            name: max(relative_error(a, e) for a, e in zip(run(), expected, strict=True)) for name, run in runs.items()
        }
        runs |= products(Path(scratch))
        taken = measure(runs, rounds)
    median = {name: statistics.median(t[0] for t in times) for name, times in taken.items()}
    fastest = min(t[0] for name, times in taken.items() if name.startswith(PRODUCT) for t in times)
    rate = 2 * float(np.prod(GEMM_SIZES)) / fastest * 1e3
    subject = "ONNX packed" if "ONNX packed" in runs else "ONNX fused"
    rows = {
        name: {
            "median_ms": median[name],
            "min_ms": min(t[0] for t in times),
            "relative_error": errors[name],
            "ratio": median[name] / median[subject],
            "ratio_95": ratio_interval(taken[subject], times),
        }
        for name, times in taken.items()
        if not name.startswith(PRODUCT)
    }
    floor_ms = flops / rate * 1e3
    report = {
        "what": "CPU time of one thread, milliseconds; ratio = the row's median / the subject's",
        "environment": environment(),
        "model": model,
        "shapes": [list(a.shape) for a in arrays],
        "rounds": rounds,
        "decisions": [f"{d.what}: {getattr(d, 'reason', '') or getattr(d, 'detail', '')}" for d in told],
        "floor": {"flops": flops, "gflops_per_second": rate / 1e9, "ms": floor_ms},
        "subject": subject,
        "rows": rows,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    columns = ("", "median ms", "min ms", f"x {subject}", "error")
    lines = [
        (name, f"{r['median_ms']:.1f}", f"{r['min_ms']:.1f}", f"{r['ratio']:.2f}", f"{r['relative_error']:.1e}")
        for name, r in rows.items()
    ]
    console.table(columns, lines, title=f"{model}, floor {floor_ms:.1f} ms")


if __name__ == "__main__":
    main()
