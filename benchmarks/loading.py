"""One build of the kernel libraries in other releases of torch and ONNX Runtime: do they load, and do the ops run?

    python benchmarks/loading.py --torch 2.11.0 2.14.1 --onnxruntime 1.21.0 1.24.4 1.31.1 --json loading.json

Each release is installed into a folder of its own, and an ordinary call of every op, in float32 and bfloat16, runs in a
process that has it and not this package. Of torch only libtorch_cpu.so and what it links to are taken (0.6 GB of
download a release): there is no Python torch in that process, so that its C functions call the ops.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import torch

from kpdeploy.decision import Skipped
from kpdeploy.hardware import environment
from kpdeploy.ops import OPS, register
from kpdeploy.ops.calls import array_of, onnx_model, reference
from kpdeploy.ops.cases import cases_of, to_dtype
from kpdeploy.ops.libraries import ONNX, TORCH, find

ROUNDING = {"float32": 2e-6, "bfloat16": 1e-2}
CASES = {
    "attention": ("2x37x53 4/1 heads of 40, lengths, causal",),
    "packed_attention": ("4 sequences, 98 rows, 4/1 heads of 40, causal",),
    "linear_activation": ("gelu", "4x33x65", "300x64x300"),
    "gated_linear": ("4x33x65", "300x64x300"),
    "rotary_embedding": ("3x7 2 heads of 40, 16 turn, 3 tables",),
}
"""Of the others: (2, 5, 16)."""

RUN_IN_ONNXRUNTIME = """
import json, sys
import numpy, onnxruntime
library, folder = sys.argv[1:]
for call in json.load(open(f"{folder}/calls.json")):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(f"{folder}/{call['id']}.onnx", options)
    arrays = numpy.load(f"{folder}/{call['id']}.npz")
    of = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    binding, kept, outs = session.io_binding(), [], []
    for name, kind in call["inputs"].items():
        kept.append(of(arrays[name], kind))
        binding.bind_ortvalue_input(name, kept[-1])
    for index in range(call["outputs"]):
        outs.append(numpy.zeros_like(arrays[f"o{index}"]))
        kept.append(of(outs[-1], call["kind"]))
        binding.bind_ortvalue_output(f"o{index}", kept[-1])
    session.run_with_iobinding(binding)
    numpy.savez(f"{folder}/{call['id']}.out.npz", **{f"o{i}": out for i, out in enumerate(outs)})
print(onnxruntime.__version__, "torch" in sys.modules)
"""

RUN_IN_TORCH = """
import ctypes, json, struct, sys
import numpy
torch_library, library, folder = sys.argv[1:]
c = ctypes.CDLL(torch_library, mode=ctypes.RTLD_GLOBAL)
ops = ctypes.CDLL(library)
if ctypes.c_int.in_dll(ops, "kpdeploy_torch_registered").value != 1:
    sys.exit("the library loads, and registers nothing")
new = ctypes.CDLL("libstdc++.so.6")._Znwm
new.restype = ctypes.c_void_p
i64, handle = ctypes.c_int64, ctypes.c_void_p

def checked(status):
    if status != 0:
        sys.exit("the call failed")

def tensor(array):
    made = handle()
    count = array.ndim
    strides = [stride // array.itemsize for stride in array.strides]
    dtype = {"float32": "float32", "uint16": "bfloat16", "int64": "int64"}[str(array.dtype)]
    checked(c.aoti_torch_create_tensor_from_blob(
        handle(array.ctypes.data), i64(count), (i64 * count)(*array.shape), (i64 * count)(*strides), i64(0),
        getattr(c, f"aoti_torch_dtype_{dtype}")(), c.aoti_torch_device_type_cpu(), 0, ctypes.byref(made)))
    return made.value

def boxed(value):
    place = new(8)
    ctypes.c_uint64.from_address(place).value = value
    return place

def item(kind, value, arrays):
    if kind == "Tensor":
        return tensor(arrays[value])
    if kind == "Tensor?":
        return boxed(tensor(arrays[value])) if value else 0
    if kind == "str":
        made = handle()
        checked(c.torch_new_string_handle(value.encode(), ctypes.c_size_t(len(value)), ctypes.byref(made)))
        return made.value
    return struct.unpack("<Q", struct.pack("<d", value))[0] if kind == "float" else int(value)

for call in json.load(open(f"{folder}/calls.json")):
    arrays = dict(numpy.load(f"{folder}/{call['id']}.npz"))
    stack = [item(kind, value, arrays) for kind, value in call["arguments"]]
    room = (ctypes.c_uint64 * max(len(stack), call["outputs"]))(*stack)
    checked(c.torch_call_dispatcher(f"kpdeploy::{call['op']}".encode(), b"", room, ctypes.c_uint64(0x020A << 48)))
    outs = {}
    for index in range(call["outputs"]):
        wanted, data = arrays[f"o{index}"], handle()
        checked(c.aoti_torch_get_data_ptr(handle(room[index]), ctypes.byref(data)))
        outs[f"o{index}"] = numpy.frombuffer(ctypes.string_at(data.value, wanted.nbytes), wanted.dtype)
        outs[f"o{index}"] = outs[f"o{index}"].reshape(wanted.shape)
    numpy.savez(f"{folder}/{call['id']}.out.npz", **outs)
print("torch" in sys.modules)
"""


def write_calls(folder: Path) -> list[dict[str, Any]]:
    """The calls as files: id.onnx, id.npz (inputs i0, …, and o0, … of the outputs' shapes), calls.json."""
    import numpy as np
    import onnx

    told: list[dict[str, Any]] = []
    for op in OPS.values():
        wanted = CASES.get(op.name, ("(2, 5, 16)",))
        chosen = [case for case in cases_of(op.name) if case[1] in wanted]
        assert len(chosen) == len(wanted), op.name
        for _, what, plain in chosen:
            for dtype in ROUNDING:
                arguments = to_dtype(plain, getattr(torch, dtype), op)
                call = f"{len(told):03}"
                model = onnx_model(op, arguments)
                (folder / f"{call}.onnx").write_bytes(model)
                graph = onnx.load_from_string(model).graph
                inputs = {i.name: i.type.tensor_type.elem_type for i in graph.input}
                kinds = [p.split()[0] for p in op.schema.partition("(")[2].partition(")")[0].split(", ")]
                tensors = [a for kind, a in zip(kinds, arguments, strict=True) if kind.startswith("Tensor")]
                names = iter(f"i{index}" if a is not None else None for index, a in enumerate(tensors))
                arrays = {f"i{i}": array_of(a.contiguous()) for i, a in enumerate(tensors) if a is not None}
                outs = [out.to(getattr(torch, dtype)) for out in reference(op, arguments)]
                arrays |= {f"o{i}": np.zeros_like(array_of(out)) for i, out in enumerate(outs)}
                np.savez(folder / f"{call}.npz", **arrays)
                given = [
                    (kind, next(names) if kind.startswith("Tensor") else a)
                    for kind, a in zip(kinds, arguments, strict=True)
                ]
                told.append(
                    {"id": call, "op": op.name, "what": what, "dtype": dtype, "inputs": inputs, "outputs": len(outs)}
                    | {"kind": graph.output[0].type.tensor_type.elem_type, "arguments": given}
                )
    (folder / "calls.json").write_text(json.dumps(told))
    return told


def worst_error(folder: Path, calls: list[dict[str, Any]]) -> dict[str, float]:
    """The largest ‖out - ref‖ / ‖ref‖ by dtype, of what the other process wrote."""
    import numpy as np

    found = dict.fromkeys(ROUNDING, 0.0)
    for call in calls:
        case = next(a for _, what, a in cases_of(call["op"]) if what == call["what"])
        op = OPS[call["op"]]
        refs = reference(op, to_dtype(case, getattr(torch, call["dtype"]), op))
        written = np.load(folder / f"{call['id']}.out.npz")
        for index, ref in enumerate(refs):
            out = torch.from_numpy(written[f"o{index}"])
            out = out.view(torch.bfloat16) if call["dtype"] == "bfloat16" else out
            error = float((out.double() - ref).norm() / ref.norm())
            found[call["dtype"]] = max(found[call["dtype"]], error if error == error else float("inf"))
    return found


def try_release(command: list[str], folder: Path, calls: list[dict[str, Any]]) -> dict[str, Any]:
    for old in folder.glob("*.out.npz"):
        old.unlink()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        said = lines[-1] if lines else f"ended with {done.returncode}"
        return {"ran": False, "said": re.sub(r"/\S*/(?=lib)", "", said)}
    errors = worst_error(folder, calls)
    right = all(error <= ROUNDING[dtype] for dtype, error in errors.items())
    return {"ran": True, "right": right, "calls": len(calls), "worst_error": errors}


def pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def onnxruntime_release(version: str, folder: Path) -> list[str]:
    """A venv with nothing but this ONNX Runtime."""
    home = folder / f"onnxruntime-{version}"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    pip(python, "install", f"onnxruntime=={version}", "numpy")
    library = find(ONNX)
    assert not isinstance(library, Skipped), library.reason
    return [python, "-c", RUN_IN_ONNXRUNTIME, str(library)]


def torch_release(version: str, folder: Path) -> list[str]:
    """libtorch_cpu.so of this release and the CUDA libraries that it links to, if it was built with CUDA."""
    home = folder / f"torch-{version}"
    wheels = home / "wheels"
    names = ("libtorch_cpu", "libc10.", "libgomp")
    pip(sys.executable, "download", "--no-deps", "-d", str(wheels), f"torch=={version}")
    if "+cpu" not in version:
        pip(sys.executable, "download", "--no-deps", "-d", str(wheels), *cuda_of(next(wheels.glob("torch-*.whl"))))
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as content:
            keep = [n for n in content.namelist() if "nvidia/" in n or Path(n).name.startswith(names)]
            content.extractall(home, keep)
    library = find(TORCH)
    assert not isinstance(library, Skipped), library.reason
    return [sys.executable, "-c", RUN_IN_TORCH, str(home / "torch/lib/libtorch_cpu.so"), str(library)]


def cuda_of(wheel: Path) -> tuple[str, str]:
    """The packages of CUDA's libraries to which libtorch_cpu.so links."""
    with zipfile.ZipFile(wheel) as content:
        metadata = next(content.read(n).decode() for n in content.namelist() if n.endswith(".dist-info/METADATA"))
    if "-cu12" in metadata:
        return "nvidia-cuda-runtime-cu12", "nvidia-cuda-cupti-cu12"
    return "nvidia-cuda-runtime==13.*", "nvidia-cuda-cupti==13.*"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION")
    parser.add_argument("--onnxruntime", nargs="*", default=[], metavar="VERSION")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    assert not isinstance(decision := register(), Skipped), decision
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder, shared = Path(name), Path(name) / "calls"
        shared.mkdir()
        calls = write_calls(shared)
        releases = [("torch", torch_release, v) for v in chosen.torch]
        releases += [("onnxruntime", onnxruntime_release, v) for v in chosen.onnxruntime]
        for runtime, prepare, version in releases:
            result = try_release([*prepare(version, folder), str(shared)], shared, calls)
            results[f"{runtime} {version}"] = result
            print(f"{runtime} {version}: {json.dumps(result)}", flush=True)
    if chosen.json:
        document = {"built_with": {"torch": torch.__version__}, "releases": results, "environment": environment()}
        chosen.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
