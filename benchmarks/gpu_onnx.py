"""ONNX Runtime on an H100: the op library, bound and in CUDA graphs, beside the best that plain ONNX Runtime makes.

    python benchmarks/gpu_onnx.py write models/          # no GPU: every ONNX file (needs onnxruntime, torch)
    python benchmarks/gpu_onnx.py run models/ --json gpu_onnx_h100.json     # needs onnxruntime-gpu

Subjects: `fused` is what `kpdeploy export --format onnx --level 2` writes for a GPU, in float16 and bfloat16. Peers are
float16 files of plain ONNX Runtime: as torch exports them (`exported`), and fused by onnxruntime.transformers from the
exporter whose graphs it knows best (`optimizer`; `optimizer, fast gelu` is GELU by tanh). Each runs with all graph
optimizations, inputs and outputs bound on the GPU, with and without its CUDA graph; the fastest peer counts. `cuda` is
the format of that name, for orientation.

Times are medians of calls that wait for the GPU, in turns, in microseconds: what a caller with tensors there waits.
Errors are ‖out - ref‖ / ‖ref‖ against the module in float32 on the GPU, without TF32. Weights are cut from one random
row, so that the files compress: no two tensors are equal, and times do not depend on them. Exit code 1: an error above
--most, or a file of ours that does not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_models import Bert, error_of, profiled

ROUNDS, CALLS = 15, 40
GRAPHS = (True, False)
PEERS = ("exported", "optimizer", "optimizer, fast gelu")
OURS = ("fused float16", "fused float16, products apart", "fused bfloat16")
VALUES = 999_983
"""Of the row that weights are cut from: a prime, so that no matrix repeats its rows."""

TEXT = ("input_ids:int64[batch=1..32,seq=1..384]{0..30521}", "attention_mask:int64[batch,seq]{mask}")
ROWS, WIDTH, OUT = 4096, 1024, 4096


class Linear(torch.nn.Module):
    """A linear with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, OUT)
        self.linear.bias = torch.nn.Parameter(torch.linspace(-1, 1, OUT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x))


class EagerBert(Bert):
    """BERT-base whose attention is written out: the graph that onnxruntime.transformers knows."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.model = BertModel(BertConfig(attn_implementation="eager"))


def weighted(module: torch.nn.Module) -> torch.nn.Module:
    """The module with the weights of this benchmark: the same wherever they are made."""
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 0.02, VALUES).astype(np.float32))
    with torch.no_grad():
        for index, weight in enumerate(p for p in module.parameters() if p.dim() > 1):
            places = (torch.arange(weight.numel()) + 3 * index) % VALUES
            weight.copy_(values[places].view(weight.shape))
    return module.eval()


# Writing the files.


def write_bert(folder: Path) -> Iterator[str]:
    """Each subject's model.onnx in a folder of its name."""
    from kpdeploy.export import cuda, onnx
    from kpdeploy.export.capture import Capture, program_of, settle_axes
    from kpdeploy.load import Request
    from kpdeploy.load.factory import from_module
    from kpdeploy.load.flat import Flat
    from kpdeploy.optimize import fuse
    from kpdeploy.optimize.lowered import lowered

    request = Request(inputs=TEXT, example=None, task=None, name="bert", max_batch=32)
    loaded = from_module(weighted(Bert()), None, request, name="bert", source={})
    model = settle_axes(loaded, stated=True)
    for name in OURS:
        precision = name.split()[1].strip(",")
        fused = fuse(model, left=("parallel_linears",) if "apart" in name else ())
        again = replace(model, kind="module", module=Flat(fused.module, None), program=None, decisions=())
        capture = Capture(settle_axes(again, stated=True), folder)
        made = lowered(capture.program, bits=precision, dropped=False, device="cpu")
        program = program_of(replace(capture.model, module=Flat(made.module, None), program=None))
        (folder / name).mkdir(parents=True)
        onnx.export(capture, folder / name, program)
        form = cuda.Form(precision=precision, padded=("batch", "seq"))
        described = cuda.described(model.signature, form, "cuda")
        described["buckets"] = [{"batch": 1, "seq": 128}, {"batch": 8, "seq": 128}]
        (folder / name / cuda.GRAPHS).write_text(json.dumps(described))
        yield name
    ids = torch.randint(0, 30522, (2, 16))
    yield from write_peers(folder, weighted(Bert()), weighted(EagerBert()), (ids, torch.ones_like(ids)), heads=12)


def write_linear(folder: Path) -> Iterator[str]:
    from kpdeploy.ops import OPS
    from kpdeploy.ops.calls import onnx_model

    module = weighted(Linear())
    for name in OURS[0], OURS[2]:
        dtype = getattr(torch, name.split()[1])
        tensors = (torch.zeros(1, WIDTH), module.linear.weight.detach(), module.linear.bias.detach())
        (folder / name).mkdir(parents=True)
        written = onnx_model(OPS["linear_activation"], (*(t.to(dtype) for t in tensors), "gelu"), constant=True)
        (folder / name / "model.onnx").write_bytes(written)
        yield name
    yield from write_peers(folder, module, module, (torch.zeros(2, WIDTH),), heads=0)


def write_peers(
    folder: Path, module: torch.nn.Module, eager: torch.nn.Module, inputs: tuple[torch.Tensor, ...], *, heads: int
) -> Iterator[str]:
    """Plain ONNX Runtime's files, in float16."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    names = [f"input{index}" for index in range(len(inputs))]
    axes = {0: "batch", 1: "seq"} if inputs[0].dtype == torch.int64 else {0: "batch"}
    for name in PEERS:
        file = folder / name / "model.onnx"
        file.parent.mkdir(parents=True)
        if name == "exported":
            dims = {a: torch.export.Dim(n, min=1, max=ROWS if n == "batch" else 384) for a, n in axes.items()}
            half = tuple(t.half() if t.is_floating_point() else t for t in inputs)
            torch.onnx.export(
                module.half(), half, file, dynamo=True, opset_version=20, input_names=names, output_names=["out"],
                dynamic_shapes=(dims,) * len(inputs), external_data=False, verbose=False,
            )  # fmt: skip
            module.float()
        else:
            torch.onnx.export(
                eager, inputs, file, dynamo=False, opset_version=17, input_names=names, output_names=["out"],
                dynamic_axes={**dict.fromkeys(names, axes), "out": {0: "batch"}},
            )  # fmt: skip
            options = FusionOptions("bert")
            options.enable_gelu_approximation = "fast" in name
            width = 768 if heads else 0
            made = optimize_model(str(file), "bert", heads, width, optimization_options=options, opt_level=1)
            made.convert_float_to_float16(keep_io_types=False)
            made.save_model_to_file(str(file))
            print("  ", {k: n for k, n in made.get_fused_operator_statistics().items() if n}, flush=True)
        yield name


def write(folder: Path) -> None:
    for name, made in (("bert", write_bert), ("linear", write_linear)):
        for subject in made(folder / name):
            print(name, subject, f"{(folder / name / subject / 'model.onnx').stat().st_size / 1e6:.1f} MB", flush=True)


# Running them.


@dataclass
class Bound:
    """A file in a session of the CUDA provider, its inputs and outputs on the GPU."""

    session: Any
    binding: Any
    outputs: list[torch.Tensor]
    kept: list[torch.Tensor]

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding)


TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}
CODES = {torch.float32: 1, torch.int64: 7, torch.int32: 6, torch.float16: 10, torch.bfloat16: 16}
"""Of ONNX's data types."""


def bound(file: Path, inputs: list[torch.Tensor], shape: tuple[int, ...], *, graph: bool, library: str) -> Bound:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    provider = {"use_tf32": "0", "enable_cuda_graph": "1" if graph else "0"}
    providers = [("CUDAExecutionProvider", provider), "CPUExecutionProvider"]
    session = ort.InferenceSession(str(file), options, providers=providers)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError("the CUDA provider did not start")
    binding, kept = session.io_binding(), []
    for entry, tensor in zip(session.get_inputs(), inputs, strict=True):
        dtype = TYPES.get(entry.type, torch.int32 if "int32" in entry.type else torch.int64)
        kept.append(tensor.to(dtype).contiguous())
        binding.bind_input(entry.name, "cuda", 0, CODES[dtype], tuple(tensor.shape), kept[-1].data_ptr())
    (entry,) = session.get_outputs()
    out = torch.full(shape, float("nan"), dtype=TYPES[entry.type], device="cuda")
    binding.bind_output(entry.name, "cuda", 0, CODES[out.dtype], shape, out.data_ptr())
    torch.cuda.synchronize()
    made = Bound(session, binding, [out], kept)
    made()
    return made


def timed(calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median microseconds of a call of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            for _ in range(CALLS):
                began = time.perf_counter()
                call()
                taken[name].append((time.perf_counter() - began) * 1e6)
    return {name: round(statistics.median(times), 1) for name, times in taken.items()}


def subjects(folder: Path, inputs: list[torch.Tensor], shape: tuple[int, ...], library: str) -> Iterator[Any]:
    """Name and bound session of each file, with and without its graph; in place of the session, why there is none."""
    for name in (*OURS, *PEERS):
        file = folder / name / "model.onnx"
        for graph in GRAPHS if file.exists() else ():
            told = name if graph else f"{name}, no graph"
            try:
                yield told, bound(file, inputs, shape, graph=graph, library=library if name in OURS else "")
            except Exception as error:
                yield told, f"{type(error).__name__}: {error}"[:600]


def row_of(what: str, found: list[Any], expected: np.ndarray[Any, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"work": what, "error": {}, "failed": {}}
    calls: dict[str, Callable[[], Any]] = dict(more)
    for name, subject in found:
        if isinstance(subject, str):
            row["failed"][name] = subject
            continue
        subject.outputs[0].fill_(float("nan"))
        torch.cuda.synchronize()
        subject()
        row["error"][name] = error_of(subject.outputs[0].double().cpu(), expected)
        calls[name] = subject
    row["us"] = timed(calls)
    best = min((us for name, us in row["us"].items() if name.startswith(PEERS)), default=float("nan"))
    row["best_peer_us"] = best
    row["ratio"] = {name: round(best / us, 3) for name, us in row["us"].items() if not name.startswith(PEERS)}
    print(json.dumps(row, indent=1), flush=True)
    return row


def run_linear(folder: Path, library: str) -> dict[str, Any]:
    from kpdeploy.ops.libraries import constant_weights

    module = weighted(Linear()).cuda()
    x = torch.randn(ROWS, WIDTH, device="cuda")
    with torch.no_grad():
        expected = module(x).double().cpu().numpy()
    half = [t.half() for t in (x, module.linear.weight.detach(), module.linear.bias.detach())]
    graph = torch.cuda.CUDAGraph()
    with constant_weights():
        torch.ops.kpdeploy.linear_activation(*half, "gelu")
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            torch.ops.kpdeploy.linear_activation(*half, "gelu")
    found = list(subjects(folder, [x], (ROWS, OUT), library))
    return row_of(f"linear + GELU {ROWS}x{WIDTH}x{OUT}", found, expected, {"torch graph float16": waited(graph)})


def waited(graph: Any) -> Callable[[], None]:
    def call() -> None:
        graph.replay()
        torch.cuda.current_stream().synchronize()

    return call


def run_bert(folder: Path, library: str, rows: int, programs: Mapping[str, Any]) -> dict[str, Any]:
    from gpu_models import replay_of, whole_us

    from kpdeploy.runtimes import onnx as runtime

    module = weighted(Bert()).cuda()
    arrays = {
        "input_ids": np.random.default_rng().integers(0, 30522, (rows, 128)),
        "attention_mask": np.ones((rows, 128), np.int64),
    }
    inputs = [torch.from_numpy(a).cuda() for a in arrays.values()]
    with torch.no_grad():
        expected = module(*inputs).double().cpu().numpy()
    more, whole = {}, {}
    for name, loaded in programs.items():
        answer = loaded(list(arrays.values()))[0]
        more[name] = waited_on(replay_of(loaded, arrays))
        whole[name] = {"us": whole_us(loaded, arrays), "error": error_of(answer, expected)}
    found = list(subjects(folder, inputs, (rows, 768), library))
    row = row_of(f"bert {rows}x128", found, expected, more)
    settings = {"device": "cuda", "graphs": True, "op_libraries": [library]}
    for name in OURS:
        names = (("input_ids", "attention_mask"), ("output",))
        try:
            file = str(folder / name / "model.onnx")
            loaded = runtime.load(file, inputs=names[0], outputs=names[1], settings=settings)
            short = [a[:, :77] for a in arrays.values()]
            with torch.no_grad():
                cut = module(*(torch.from_numpy(a).cuda() for a in short)).double().cpu().numpy()
            filled = error_of(loaded(short)[0], cut)
            answer = loaded(list(arrays.values()))[0]
            whole[name] = {
                "us": whole_us(loaded, arrays), "error": error_of(answer, expected), "error_of_77": filled,
                "missed": loaded.missed,
            }  # fmt: skip
        except Exception as error:
            row["failed"][f"{name}, runtime"] = f"{type(error).__name__}: {error}"[:600]
    row["whole"] = whole
    print(json.dumps({"whole": whole, "failed": row["failed"]}), flush=True)
    for name, subject in found:
        if name in (OURS[0], "optimizer") and not isinstance(subject, str):
            lines = [f"    {us:9.1f} {n:4d} {kernel}" for us, n, kernel in profiled(subject)]
            print(f"   {name}", *lines, sep="\n", flush=True)
    return row


def waited_on(replay: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        replay()
        torch.cuda.current_stream().synchronize()

    return call


def run(folder: Path, options: argparse.Namespace) -> int:
    import onnxruntime
    from cuda_kernels import versions

    from kpdeploy.ops import register
    from kpdeploy.ops.libraries import ONNX, find

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(register(), onnxruntime.__version__, onnxruntime.get_available_providers(), flush=True)
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    library = str(find(ONNX))
    found: dict[str, Any] = {"versions": versions(options.built_with), "rows": []}

    def keep(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")

    keep(run_linear(folder / "linear", library))
    programs: dict[str, Any] = {}
    try:
        programs = {} if options.no_programs else programs_of()
    except Exception as error:
        print(f"no format cuda here: {type(error).__name__}: {error}", flush=True)
    for rows in (1, 8):
        keep(run_bert(folder / "bert", library, rows, programs))
    errors = [error for row in found["rows"] for name, error in row["error"].items() if name in OURS]
    failed = [name for row in found["rows"] for name in row["failed"] if name.startswith("fused")]
    return int(any(not error <= options.most for error in errors) or bool(failed))


def programs_of() -> dict[str, Any]:
    """The format `cuda` of BERT, loaded."""
    import tempfile

    from gpu_models import WORKS, fused_of, programs

    from kpdeploy.export.capture import settle_axes
    from kpdeploy.load import Request
    from kpdeploy.load.factory import from_module

    request = Request(inputs=TEXT, example=None, task=None, name="bert", max_batch=32)
    model = settle_axes(from_module(weighted(Bert()), None, request, name="bert", source={}), stated=True)
    works = [w for w in WORKS if w.model == "bert" and w.sizes["seq"] == 128]
    with tempfile.TemporaryDirectory() as folder:
        capture = fused_of(model, Path(folder))
        return {f"cuda {p}": programs(capture, p, works, ())[False] for p in ("float16", "bfloat16")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("write", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-programs", action="store_true", help="without the format cuda")
    parser.add_argument("--built-with", default="", help="the compilers that made the libraries, for the JSON")
    parser.add_argument("--most", type=float, default=2e-2)
    options = parser.parse_args()
    if options.step == "write":
        write(options.folder)
    else:
        sys.exit(run(options.folder, options))


if __name__ == "__main__":
    main()
