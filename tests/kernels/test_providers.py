"""The table of providers says what really runs: oneDNN tells when it multiplies, and libraries when they are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kpdeploy.decision import Applied, Skipped
from kpdeploy.ops import OPS, calls, providers
from kpdeploy.ops.cases import all_cases, to_dtype
from kpdeploy.ops.providers import FEW_ROWS, PROVIDERS

DTYPES = ("float32", "bfloat16")


def test_every_op_has_its_row_and_nothing_else_has() -> None:
    assert list(PROVIDERS) == list(OPS)


@pytest.mark.parametrize("op", OPS)
def test_each_row_is_whole(op: str) -> None:
    for provider in PROVIDERS[op].providers:
        assert provider.runtime in providers.RUNTIMES
        assert provider.device in providers.DEVICES
        assert set(provider.dtypes) <= set(providers.DTYPES.values())
        assert {*provider.needs, *provider.dtype_needs.values()} <= set(providers.NEEDS)
        assert provider.library in ("", "kpdeploy/_core", *OPS[op].libraries)


@pytest.mark.parametrize("op", OPS)
def test_our_kernels_take_the_dtypes_that_the_op_names(op: str) -> None:
    ours = {p.runtime: p.dtypes for p in PROVIDERS[op].providers if p.name == "kpdeploy" and p.device == "cpu"}
    assert ours == dict.fromkeys(providers.RUNTIMES, OPS[op].dtypes)


def test_an_example_shape_can_be_read() -> None:
    for op, row in PROVIDERS.items():
        assert len(providers.parse_shape(op, row.dims.example)) == len(row.dims.names)


def onednn_multiplied(capfd: pytest.CaptureFixture[str], op: str, arguments: tuple[object, ...]) -> bool:
    """What oneDNN itself says of a call."""
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(1):
        calls.through_torch(OPS[op], arguments)
    return "primitive,exec,cpu,inner_product" in capfd.readouterr().out


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear_activation", "gated_linear"])
def test_onednn_multiplies_from_the_row_that_the_table_says(
    op: str, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for rows in range(1, FEW_ROWS + 4):
        tensors = [torch.randn(shape, dtype=getattr(torch, dtype)) for shape in ((rows, 16), (32, 16))]
        rest = (tensors[1],) if op == "gated_linear" else (None, "gelu")
        arguments = (*tensors, *rest)
        found[rows] = onednn_multiplied(capfd, op, arguments)
        said = providers.chosen(op, arguments, runtime="torch", device="cpu", dtype=dtype)
        assert said == ("onednn" if found[rows] else "kpdeploy"), rows
    assert set(found.values()) == {True, False}


@pytest.mark.usefixtures("registered")
def test_the_table_is_right_about_every_case(capfd: pytest.CaptureFixture[str]) -> None:
    for op, what, plain in all_cases():
        for dtype in DTYPES:
            arguments = to_dtype(plain, getattr(torch, dtype), OPS[op])
            said = providers.chosen(op, arguments, runtime="torch", device="cpu", dtype=dtype)
            assert said == ("onednn" if onednn_multiplied(capfd, op, arguments) else "kpdeploy"), (op, what, dtype)


def test_the_adapter_names_the_same_threshold() -> None:
    source = Path(__file__).parents[2] / "csrc/torch/ops.cpp"
    assert re.findall(r"kFewRows = (\d+);", source.read_text()) == [str(FEW_ROWS)]


def test_what_is_here_is_known_by_loading_it(torch_library: str, onnx_library: str) -> None:
    at = providers.here()
    for need in ("libkpdeploy_torch.so", "libkpdeploy_onnx.so", "kpdeploy._core"):
        assert isinstance(at[need], Applied), at[need]
    for stand_in in ("no libkpdeploy_torch.so", "no libkpdeploy_onnx.so"):
        assert isinstance(at[stand_in], Skipped)


def test_cudnn_is_known_by_loading_it() -> None:
    import ctypes

    try:
        version = ctypes.CDLL(providers.CUDNN).cudnnGetVersion()
    except OSError:
        assert providers.here()["cuDNN"].reason == f"no {providers.CUDNN} can be loaded: our own kernels run"
    else:
        assert isinstance(providers.here()["cuDNN"], Skipped) == (version in providers.CUDNN_BROKEN)


def test_without_the_libraries_the_stand_ins_are_chosen_and_the_reasons_told() -> None:
    script = (
        "import pathlib\n"
        "from kpdeploy.ops import libraries, providers\n"
        "libraries.FOLDER = pathlib.Path('/nowhere/lib')\n"
        "sizes = providers.parse_shape('linear_activation', '8x16x32')\n"
        "for a in providers.explain('linear_activation', device='cpu', dtype='float32', sizes=sizes,"
        " at=providers.here()):\n"
        "    print(a.provider.runtime, a.provider.name, a.runs, a.why, sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert {(row[0], row[1]) for row in rows if row[2] == "True"} == {
        ("torch", "reference"), ("onnxruntime", "onnx_body"), ("numpy", "kpdeploy")
    }  # fmt: skip
    for runtime, library in (("torch", "libkpdeploy_torch.so"), ("onnxruntime", "libkpdeploy_onnx.so")):
        whys = [row[3] for row in rows if row[:2] == [runtime, "kpdeploy"]]
        assert any(f"this installation holds no lib/{library}" in why for why in whys)


def test_bfloat16_runs_on_a_cpu_without_avx512(torch_library: str) -> None:
    script = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "x, w = torch.ones(16, 32).bfloat16(), torch.ones(24, 32).bfloat16()\n"
        "print(torch.ops.kpdeploy.linear_activation(x, w, None, 'relu').sum().item())"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", script, torch_library]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "12288.0\n"), done.stderr
