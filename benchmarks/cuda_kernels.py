"""Every CUDA kernel on a real GPU: its errors against float64, compute-sanitizer's findings, and times beside torch's.

    python benchmarks/cuda_kernels.py --json cuda_kernels_h100.json --sanitize

Errors are ‖out - ref‖ / ‖ref‖ on the cases of tests/kernels/test_cuda.py, through torch and through ONNX Runtime's CUDA
provider, into outputs that held NaN. Exit code 1: an error above its tolerance, or a finding. The times are side
information: medians of single calls from Python in a warm cache; torch's own does the same with its separate ops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import test_cuda as cuda  # noqa: E402

from kpdeploy.decision import Applied, Skipped  # noqa: E402
from kpdeploy.ops import OPS, register  # noqa: E402
from kpdeploy.ops.cases import to_dtype, tolerance  # noqa: E402
from kpdeploy.ops.libraries import ONNX, find  # noqa: E402

Row = dict[str, Any]
TOOLS = ("memcheck", "racecheck", "synccheck")


def error_of(run: Callable[[], tuple[torch.Tensor, ...]], refs: tuple[torch.Tensor, ...]) -> float | str:
    """The error, or what the call was refused with."""
    try:
        return float(f"{cuda.worst(run(), refs):.3g}")
    except Exception as refused:  # a finding like any other
        return str(refused).strip().splitlines()[0][:300]


def errors(small: bool, library: str) -> Iterator[Row]:
    """One row for each op, dtype and case. `small`: torch only, and only cases that a sanitizer gets through."""
    for name, op in OPS.items():
        for dtype, kind in cuda.DTYPES.items():
            for _, what, plain in cuda.gpu_cases(name):
                tiles = what in {"x".join(map(str, tile)) for tile in cuda.TILES}
                if small and not tiles and cuda.size_of(plain) > 20_000:
                    continue
                call = to_dtype(plain, kind, op)
                refs = cuda.expected(op, call)
                row: Row = {"op": name, "dtype": dtype, "case": what, "tolerance": tolerance("kpdeploy", dtype, what)}
                row["torch"] = error_of(lambda op=op, call=call: cuda.through_torch(op, call), refs)
                for key, constant in (("onnxruntime", False), ("onnxruntime_constants", True)) if library else ():
                    if not constant or "linear" in name:
                        row[key] = error_of(
                            lambda op=op, call=call, constant=constant: cuda.through_onnxruntime(
                                op, call, library, constant
                            ),
                            refs,
                        )
                yield row


def passed(row: Row) -> bool:
    found = [row[key] for key in ("torch", "onnxruntime", "onnxruntime_constants") if key in row]
    return all(isinstance(value, float) and value <= row["tolerance"] for value in found)


def under(tool: str, argument: str, script: str = __file__) -> tuple[int, str]:
    """A script, this one, under compute-sanitizer, with each tensor in memory of its own: exit code and output."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=kpdeploy"]
    command += ["--error-exitcode", "9", sys.executable, script, argument]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    text = done.stdout + done.stderr
    print(f"--- {tool} {argument}, exit code {done.returncode}", text[-3000:], sep="\n", flush=True)
    return done.returncode, text


class Beyond:
    """A row of 4096 floats in memory that holds 64."""

    def __init__(self) -> None:
        self.memory = torch.ones(64, device="cuda")
        self.__cuda_array_interface__ = {
            "shape": (1, 4096),
            "typestr": "<f4",
            "data": (self.memory.data_ptr(), False),
            "version": 3,
        }


def plant() -> None:
    """A kernel that reads beyond a tensor, which memcheck must find: else its silence would say nothing."""
    torch.ops.kpdeploy.rms_norm(torch.as_tensor(Beyond(), device="cuda"), torch.ones(4096, device="cuda"), 0.0)
    torch.cuda.synchronize()


def planted_is_found() -> str:
    _, text = under("memcheck", "--plant")
    return "found" if re.search(r"Invalid __global__ read[^=]*=+[^=]*norm_rows", text) else "MISSED"


def sanitized(tool: str) -> str:
    """The summary of compute-sanitizer on the small cases."""
    code, text = under(tool, "--small")
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    cases = re.findall(r"\d+ of \d+ cases passed", text)
    return "; ".join([*summary, *cases, f"exit code {code}"])


def split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def timed(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """What, ours, torch's own."""
    ops = torch.ops.kpdeploy

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    for batch, length, heads, size in ((32, 128, 12, 64), (4, 2048, 32, 128)):
        q, k, v = (new(batch, length, heads * size) for _ in range(3))
        for causal in (False, True):
            what = f"attention {batch}x{length} {heads} heads of {size}{', causal' * causal}"
            yield (
                what,
                lambda q=q, k=k, v=v, h=heads, s=size, c=causal: ops.attention(q, k, v, None, h, h, s**-0.5, c),
                lambda q=q, k=k, v=v, h=heads, c=causal: functional.scaled_dot_product_attention(
                    split(q, h), split(k, h), split(v, h), is_causal=c
                ),
            )
    for m, k_, n in ((4096, 1024, 4096), (1024, 768, 3072), (1, 1024, 4096)):
        x, w, g, b = new(m, k_), new(n, k_), new(n, k_), new(n)
        yield (
            f"linear_activation gelu {m}x{k_}x{n}",
            lambda x=x, w=w, b=b: ops.linear_activation(x, w, b, "gelu"),
            lambda x=x, w=w, b=b: functional.gelu(functional.linear(x, w, b)),
        )
        yield (
            f"gated_linear {m}x{k_}x{n}",
            lambda x=x, w=w, g=g: ops.gated_linear(x, g, w),
            lambda x=x, w=w, g=g: functional.silu(functional.linear(x, g)) * functional.linear(x, w),
        )
    for rows, n in ((4096, 1024), (16384, 4096)):
        x, r, w = new(rows, n), new(rows, n), new(n)
        yield (
            f"add_layer_norm {rows}x{n}",
            lambda x=x, r=r, w=w: ops.add_layer_norm(x, r, w, w, 1e-5),
            lambda x=x, r=r, w=w, n=n: functional.layer_norm(x + r, (n,), w, w),
        )
        yield (
            f"rms_norm {rows}x{n}",
            lambda x=x, w=w: ops.rms_norm(x, w, 1e-6),
            lambda x=x, w=w, n=n: functional.rms_norm(x, (n,), w, 1e-6),
        )


def times() -> Iterator[Row]:
    from triton.testing import do_bench

    for dtype in ("bfloat16", "float32"):
        for what, ours, theirs in timed(cuda.DTYPES[dtype]):
            figures = {
                name: do_bench(run, 5, 30, return_mode="median") for name, run in (("ours", ours), ("torch", theirs))
            }
            yield {"what": what, "dtype": dtype, **{f"{k}_ms": round(v, 4) for k, v in figures.items()}}


def versions(built_with: str) -> Row:
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": driver.stdout.strip().splitlines()[0] if driver.stdout.strip() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_providers": onnxruntime.get_available_providers(),
        "libraries_built_with": built_with,
    }


def written(path: Path, report: Row) -> None:
    """JSON with one row a line."""
    parts = []
    for key, value in report.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in value)
            parts.append(f' "{key}": [\n{rows}\n ]')
        else:
            parts.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="only small cases, through torch")
    parser.add_argument("--plant", action="store_true", help="only a read beyond a tensor, for memcheck to find")
    parser.add_argument("--sanitize", action="store_true", help="the small cases under compute-sanitizer, too")
    parser.add_argument("--built-with", default="", help="with what the libraries were built, for the table")
    options = parser.parse_args()
    decision = register()
    if not isinstance(decision, Applied) or not torch.cuda.is_available():
        sys.exit(f"nothing to measure: {decision}; torch {torch.__version__} sees a GPU: {torch.cuda.is_available()}")
    if options.plant:
        plant()
        return 0
    library = find(ONNX)
    there = cuda.PROVIDER in onnxruntime.get_available_providers() and not isinstance(library, Skipped)
    report: Row = versions(options.built_with)
    report["errors"] = list(errors(options.small, "" if options.small or not there else str(library)))
    bad = [row for row in report["errors"] if not passed(row)]
    for row in bad:
        print("FAILED", json.dumps(row, ensure_ascii=False))
    report["summary"] = f"{len(report['errors']) - len(bad)} of {len(report['errors'])} cases passed"
    print(report["summary"], flush=True)
    if options.json:
        written(options.json, report)
    if not options.small:
        report["times"] = list(times())
        for row in report["times"]:
            print(row)
    silent = True
    if options.sanitize and shutil.which("compute-sanitizer"):
        planted = planted_is_found()
        found = {tool: sanitized(tool) for tool in TOOLS}
        silent = planted == "found" and all(summary.endswith("exit code 0") for summary in found.values())
        report["sanitizer"] = {**found, "memcheck, a planted read beyond a tensor": planted}
    elif options.sanitize:
        sys.exit("compute-sanitizer is not installed: NOT RUN")
    if options.json:
        written(options.json, report)
    return 1 if bad or not silent else 0


if __name__ == "__main__":
    raise SystemExit(main())
