"""`kpdeploy ops`: who runs a call, on machines that are described here and not looked at. No torch."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ConfigFileBroken, KernelsMissing, ShapeMalformed, UnknownName
from kpdeploy.ops import OPS, measured, measured_attention, providers

Run = Callable[..., tuple[int, str, str]]

CPU = ("libkpdeploy_torch.so", "libkpdeploy_onnx.so", "kpdeploy._core", "oneDNN", "bfloat16 in oneDNN")
GPU = (*CPU, "NVIDIA GPU", "CUDA kernels", "torch with CUDA", "ONNX Runtime with CUDA")
BARE = ("no libkpdeploy_torch.so", "no libkpdeploy_onnx.so")


def machine(*found: str) -> dict[str, Decision]:
    """What `here` says on a machine that has only these."""
    return {
        need: Applied(what=need, detail="found") if need in found else Skipped(what=need, reason=f"without {need}")
        for need in providers.NEEDS
    }


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call `kpdeploy ops …` on a machine of CPU kernels: exit code, stdout, stderr."""
    monkeypatch.setattr(providers, "here", lambda: machine(*CPU))
    return functools.partial(run, "ops")


def who(op: str, shape: str, at: Mapping[str, Decision], *, device: str = "cpu", dtype: str = "float32") -> Any:
    """The provider of each runtime that runs the call."""
    answers = providers.explain(op, device=device, dtype=dtype, sizes=providers.parse_shape(op, shape), at=at)
    return {a.provider.runtime: a.provider.name for a in answers if a.runs}


def why(op: str, shape: str, at: Mapping[str, Decision], provider: str, *, device: str = "cpu") -> list[str]:
    sizes = providers.parse_shape(op, shape)
    answers = providers.explain(op, device=device, dtype="float32", sizes=sizes, at=at)
    return [a.why for a in answers if not a.runs and a.provider.name == provider and a.provider.device == device]


OURS = {"torch": "kpdeploy", "onnxruntime": "kpdeploy", "numpy": "kpdeploy"}


def test_a_product_that_was_measured_goes_to_whoever_was_faster_and_says_the_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"device": "found", "op": "linear_activation", "dtype": "bfloat16", "rows": 64, "inputs": 16, "outputs": 32}
    us = (("kpdeploy", 9.0), ("cublaslt", 8.0))
    rows = [
        measured.Measured(**row, activation="relu", provider="cublaslt", us=us),
        measured.Measured(**row, activation="none", provider="kpdeploy", us=us),
    ]
    monkeypatch.setattr(measured, "table", lambda: tuple(rows))
    at = machine(*GPU, "cuBLASLt", "compute capability 9.0")
    sizes = providers.parse_shape("linear_activation", "64x16x32")

    def runs(activation: str, **other: Any) -> providers.Answer:
        asked = {"dtype": "bfloat16", "sizes": sizes, "at": at, "activation": activation} | other
        answers = providers.explain("linear_activation", device="cuda", **asked)
        return next(a for a in answers if a.runs and a.provider.runtime == "torch")

    assert runs("relu").provider.name == "cublaslt"
    assert runs("relu").why == "measured on found in bfloat16 with 64 rows: kpdeploy 9 µs, cublaslt 8 µs"
    assert runs("relu", dtype="float16").why == runs("relu").why  # as many bits, and no row of its own
    near, far = (runs("relu", sizes=dict(sizes, rows=rows)) for rows in (128, 129))
    assert near.why == runs("relu").why
    assert far.why.startswith("calls that no provider before it takes")
    assert runs("none").provider.name == runs("gelu").provider.name == runs("gelu_tanh").provider.name == "kpdeploy"
    assert runs("relu", at=machine(*GPU)).provider.name == "kpdeploy"  # where there is no cuBLASLt
    unmeasured = {"sizes": dict(sizes, inputs=24), "at": machine(*GPU, "cuBLASLt")}  # and no compute capability 9.0
    assert runs("relu", **unmeasured).provider.name == "cublaslt"
    assert runs("silu", **unmeasured).provider.name == "kpdeploy"


HOPPER = (*GPU, "cuBLASLt", "cuDNN", "compute capability 9.0")


def attention(shape: str, *found: str, dtype: str = "bfloat16", **more: Any) -> providers.Answer:
    """What runs a call of attention in torch on a GPU."""
    sizes = providers.parse_shape("attention", shape)
    at = machine(*(found or HOPPER))
    answers = providers.explain("attention", device="cuda", dtype=dtype, sizes=sizes, at=at, **more)
    return next(a for a in answers if a.runs and a.provider.runtime == "torch")


def cudnn_refuses(shape: str, *found: str, dtype: str = "bfloat16", **more: Any) -> str:
    sizes = providers.parse_shape("attention", shape)
    at = machine(*(found or HOPPER))
    answers = providers.explain("attention", device="cuda", dtype=dtype, sizes=sizes, at=at, **more)
    return next(a.why for a in answers if (a.provider.name, a.provider.runtime) == ("cudnn", "torch"))


def test_attention_that_was_measured_goes_to_whoever_was_faster_and_says_the_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row: dict[str, Any] = {"device": "found", "dtype": "bfloat16", "shape": (4, 64, 64, 8, 128), "kv_heads": 8}
    row |= {"causal": False, "mean_length": 0, "kpdeploy_us": 9.0, "cudnn_us": 8.0, "peer": "cudnn", "peer_us": 8.5}
    theirs = measured_attention.Measured(**row, provider="cudnn")
    ours = measured_attention.Measured(**row | {"causal": True}, provider="kpdeploy")
    grouped = measured_attention.Measured(**row | {"kv_heads": 2}, provider="cudnn")
    monkeypatch.setattr(measured_attention, "table", lambda: (theirs, ours, grouped))
    told = (
        "4x64x64x8x128 measured on found with 8 heads of keys: kpdeploy 9 µs, cuDNN 8 µs, torch's SDPA (cudnn) 8.5 µs"
    )

    found = attention("4x64x64x8x128")
    assert (found.provider.name, found.why) == ("cudnn", told)
    assert attention("8x128x32x8x128").provider.name == "cudnn"
    assert attention("4x129x64x8x128").provider.name == "kpdeploy"
    assert attention("4x64x64x8x128", causal=True).why == ours.told
    assert cudnn_refuses("4x64x64x8x128", causal=True) == ours.told
    assert attention("4x64x64x8x128", lengths=True).provider.name == "kpdeploy"
    assert attention("4x64x64x8x128", kv_heads=2).why == grouped.told
    assert attention("4x64x64x8x128", dtype="float16").provider.name == "kpdeploy"
    without = tuple(need for need in HOPPER if need != "cuDNN")
    assert attention("4x64x64x8x128", *without).provider.name == "kpdeploy"
    assert cudnn_refuses("4x64x64x8x128", *without) == "without cuDNN"


def test_large_heads_are_cudnns_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_attention, "table", tuple)
    for size, name in ((64, "kpdeploy"), (128, "kpdeploy"), (136, "cudnn"), (256, "cudnn"), (250, "kpdeploy")):
        assert attention(f"1x2x2x4x{size}").provider.name == name
    assert cudnn_refuses("1x2x2x4x128").startswith("not measured: our kernels for compute capability 9.0 take it")
    assert cudnn_refuses("1x2x2x4x250") == "it takes heads of a multiple of 8"
    assert cudnn_refuses("1x2x2x4x256", *GPU, "cuDNN") == "not measured: our own kernel runs"
    assert cudnn_refuses("1x2x2x4x256", dtype="float32") == "it takes bfloat16, float16"
    assert cudnn_refuses("1x0x2x4x256") == "there is nothing to attend to"
    assert who("attention", "1x2x2x4x256", machine(*HOPPER), device="cuda", dtype="bfloat16") == {
        "torch": "cudnn", "onnxruntime": "kpdeploy"
    }  # fmt: skip
    for shape, more, takes in (
        ("1x3x2x4x256", {"causal": True}, False),
        ("1x2x3x4x256", {"causal": True}, True),
        ("1x1x3x4x256", {"causal": True}, True),
        ("1x3x3x4x256", {"lengths": True}, False),
    ):
        assert (attention(shape, **more).provider.name == "cudnn") == takes, (shape, more)


def test_the_kernels_go_by_the_same_table_and_thresholds() -> None:
    core = Path(__file__).parents[2] / "csrc/core"
    assert f"kNear = {measured.NEAR};" in (core / "gpu_choice.cpp").read_text()
    assert f"kOwnHead = {providers.OWN_HEAD};" in (core / "attention.cu").read_text()
    versions = " && ".join(f"l.version() != {version}" for version in providers.CUDNN_BROKEN)
    assert versions in (core / "cudnn_attention.cpp").read_text()
    assert providers.CUDNN in (core / "cudnn_attention.cpp").read_text()
    assert measured_attention.TABLE.read_text().splitlines()[0] == "\t".join(measured_attention.COLUMNS)
    for row in measured_attention.table():
        gains = row.cudnn_us is not None and measured_attention.is_gain(row.kpdeploy_us, row.cudnn_us)
        assert row.provider == ("cudnn" if gains else "kpdeploy")
        more = {"kv_heads": row.kv_heads, "causal": row.causal, "lengths": row.mean_length > 0}
        assert measured_attention.nearest(row.device, row.dtype, row.shape, **more) == row


def test_the_table_of_what_was_measured_can_be_read_and_names_the_faster() -> None:
    assert measured.table()
    for row in measured.table():
        us = dict(row.us)
        computes = {name: us[name] for name in ("kpdeploy", "cublaslt") if name in us}
        assert row.provider == min(computes, key=computes.__getitem__), row


@pytest.mark.parametrize("op", ["linear_activation", "gated_linear"])
def test_torch_leaves_many_rows_to_onednn_and_few_to_us(op: str) -> None:
    assert who(op, "5x384x1536", machine(*CPU)) == {**OURS, "torch": "onednn"}
    assert who(op, "4x384x1536", machine(*CPU)) == OURS
    assert why(op, "4x384x1536", machine(*CPU), "onednn") == ["up to 4 rows our own kernel is as fast"]


@pytest.mark.parametrize("shape", ["0x8x8", "8x0x8", "8x8x0"])
def test_nothing_to_multiply_is_ours(shape: str) -> None:
    assert who("linear_activation", shape, machine(*CPU)) == OURS


def test_bfloat16_is_ours_where_onednn_has_none() -> None:
    at = machine(*(need for need in CPU if need != "bfloat16 in oneDNN"))
    assert who("linear_activation", "64x8x8", at, dtype="bfloat16") == OURS
    assert who("linear_activation", "64x8x8", at) == {**OURS, "torch": "onednn"}


def test_a_torch_without_onednn_runs_ours() -> None:
    at = machine(*(need for need in CPU if "oneDNN" not in need))
    assert who("linear_activation", "64x8x8", at) == OURS
    assert why("linear_activation", "64x8x8", at, "onednn") == ["without oneDNN"]


@pytest.mark.parametrize("op", OPS)
def test_without_libraries_the_stand_ins_run(op: str) -> None:
    shape = providers.PROVIDERS[op].dims.example
    assert who(op, shape, machine(*BARE)) == {"torch": "reference", "onnxruntime": "onnx_body"}


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_runs_every_op_in_three_dtypes_where_it_and_the_library_are(op: str) -> None:
    shape = providers.PROVIDERS[op].dims.example
    for dtype in ("float32", "bfloat16", "float16"):
        found = who(op, shape, machine(*GPU), device="cuda", dtype=dtype)
        assert found == {"torch": "kpdeploy", "onnxruntime": "kpdeploy"}
    assert who(op, shape, machine(*CPU), device="cuda") == {}
    assert why(op, shape, machine(*CPU), "kpdeploy", device="cuda") == ["without NVIDIA GPU"] * 2
    built_without = machine(*(need for need in GPU if need != "CUDA kernels"))
    assert why(op, shape, built_without, "kpdeploy", device="cuda") == ["without CUDA kernels"] * 2


def test_float16_runs_nowhere_on_a_cpu_with_libraries() -> None:
    assert who("rms_norm", "4x8", machine(*CPU), dtype="float16") == {}


@pytest.mark.parametrize(("size", "runs"), [(1, True), (256, True), (257, False), (0, False)])
def test_heads_have_a_largest_size(size: int, runs: bool) -> None:
    assert bool(who("attention", f"1x2x2x4x{size}", machine(*CPU))) == runs


def test_every_runtime_has_at_most_one_that_runs() -> None:
    for op, row in providers.PROVIDERS.items():
        sizes = providers.parse_shape(op, row.dims.example)
        answers = providers.explain(op, device="cpu", dtype="float32", sizes=sizes, at=machine(*CPU, *BARE))
        running = [a.provider.runtime for a in answers if a.runs]
        assert len(running) == len(set(running)) == 3
        assert [a.provider for a in answers] == list(row.providers)
        assert all(a.why for a in answers)


# The command line.


def test_the_list_names_every_op_and_whether_its_providers_are_here(run: Run) -> None:
    code, out, err = run()
    assert code == 0
    assert all(op in out for op in OPS)
    assert "onednn, kpdeploy," in out
    assert "without NVIDIA GPU" in out
    assert "next: kpdeploy ops validate" in err


def test_the_list_as_json_has_a_row_for_each_provider_of_an_op(run: Run) -> None:
    code, out, err = run("--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)["providers"]
    assert len(rows) == sum(len(row.providers) for row in providers.PROVIDERS.values())
    missing = {(r["provider"], r["device"]): r["reason"] for r in rows if not r["here"]}
    assert missing["kpdeploy", "cuda"] == "without NVIDIA GPU"
    assert all(r["library"] in ("", "kpdeploy/_core", *OPS[r["op"]].libraries) for r in rows)


def test_explain_says_who_runs_and_why_the_others_do_not(run: Run) -> None:
    call = ("linear_activation", "--device", "cpu", "--dtype", "f32", "--shape", "1024x384x1536")
    code, out, err = run("explain", *call)
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "linear_activation: 1024 rows, 384 inputs, 1536 outputs; float32 on cpu"
    assert any(line.startswith("torch onednn runs calls of more than 4 rows") for line in lines)
    assert "torch kpdeploy onednn takes the call first" in lines
    assert "torch cuda kpdeploy it is for cuda" in lines
    assert "next: kpdeploy ops validate linear_activation" in err
    code, out, err = run("explain", *call, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["runs"] == {**OURS, "torch": "onednn"}
    assert told["sizes"] == {"rows": 1024, "inputs": 384, "outputs": 1536}
    assert run("--json", "explain", *call) == (0, out, "")


def test_explain_tells_where_a_call_ends_in_an_error(run: Run) -> None:
    code, _, err = run("explain", "rms_norm", "--dtype", "f16", "--shape", "4x8")
    assert code == 0
    assert "in torch nothing runs this call" in err


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (("linear-activaton",), UnknownName, "did you mean 'linear_activation'?"),
        (("frobnicate",), UnknownName, "use one of attention, packed_attention, linear_activation"),
        (("rms_norm", "--dtype", "f23"), UnknownName, "did you mean 'f32'?"),
        (("rms_norm", "--dtype", "int8"), UnknownName, "use one of f32, bf16, f16"),
        (("rms_norm", "--device", "cud"), UnknownName, "did you mean 'cuda'?"),
        (("rms_norm", "--device", "tpu"), UnknownName, "use one of cpu, cuda"),
        (("rms_norm", "--shape", "4"), ShapeMalformed, "it has 1 dims; the shape of rms_norm is rows x width"),
        (("rms_norm", "--shape", "4x-1"), ShapeMalformed, "'-1' is no size"),
        (("rms_norm", "--shape", "4xx8"), ShapeMalformed, "'' is no size"),
        (("rms_norm", "--shape", "4x1.5"), ShapeMalformed, "'1.5' is no size"),
        (("rms_norm", "--shape", "²x8"), ShapeMalformed, "'²' is no size"),
        (("rms_norm", "--shape", "x".join(["9" * 5000, "8"])), ShapeMalformed, "is no size"),
    ],
)
def test_what_is_wrong_is_named_with_the_near_one(run: Run, words: tuple[str, ...], kind: Any, said: str) -> None:
    given = words if "--shape" in words else (*words, "--shape", "4x8")
    code, out, err = run("explain", *given)
    assert (code, out) == (kind.exit_code, "")
    assert said in err
    code, out, _ = run("explain", *given, "--json")
    assert code == kind.exit_code
    assert json.loads(out)["error"]["kind"] == kind.__name__


def test_a_name_may_be_written_as_one_types_it(run: Run) -> None:
    assert run("explain", "RMS-norm", "--dtype", "Float32", "--shape", "4X8")[0] == 0


def test_a_mistyped_subcommand_names_the_near_one(run: Run) -> None:
    code, _, err = run("explian")
    assert code == 2
    assert "did you mean 'explain'?" in err


@pytest.mark.parametrize("name", ["explain", "validate"])
def test_help_of_each_subcommand_teaches_with_an_example(run: Run, name: str) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert "--json" in out
    assert f"  kpdeploy ops {name} " in out
    if name == "explain":
        assert all(f"{' x '.join(row.dims.names)}" in out for row in providers.PROVIDERS.values())


def test_validate_names_an_unknown_op_before_it_runs_anything(run: Run) -> None:
    code, _, err = run("validate", "rms_nrm")
    assert code == UnknownName.exit_code
    assert "did you mean 'rms_norm'?" in err


def test_validate_without_torch_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    code, _, err = run("validate")
    assert code == KernelsMissing.exit_code
    assert "torch, which computes the references, is not installed" in err


def test_the_ops_and_their_table_import_no_torch() -> None:
    program = (
        "import sys, kpdeploy.ops.providers, kpdeploy.ops.cases, kpdeploy.ops.calls, kpdeploy.ops.validate,"
        " kpdeploy.cli.ops\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "numpy", "rich"} & {n.split(".")[0] for n in done.stdout.split()}


def test_a_subcommand_has_its_own_table_in_the_config_file(run: Run) -> None:
    Path("kpdeploy.toml").write_text('[ops.explain]\ndtype = "bf16"\nshape = "8x16"\n')
    code, out, _ = run("explain", "rms_norm", "--json")
    assert code == 0
    assert (json.loads(out)["dtype"], json.loads(out)["sizes"]) == ("bfloat16", {"rows": 8, "width": 16})
    assert run("--json", "explain", "rms_norm") == (0, out, "")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[ops.explian]\n", "holds [ops.explian], which does not exist"),
        ("[ops.explain]\ndtpye = 'f32'\n", "did you mean 'dtype'?"),
        ("[ops.explain]\ndtype = 3.5\njson = 'yes'\n", "see `kpdeploy ops explain --help`"),
        ("[ops]\nshape = '8x16'\n", "holds shape under [ops], which does not exist"),
    ],
)
def test_a_wrong_table_of_a_subcommand_is_named(run: Run, table: str, said: str) -> None:
    Path("kpdeploy.toml").write_text(table)
    code, _, err = run("explain", "rms_norm", "--shape", "8x16")
    assert code == ConfigFileBroken.exit_code
    assert said in err


def test_every_attention_that_was_measured_is_told_with_both_figures(run: Run) -> None:
    rows = measured_attention.table()
    assert rows
    assert all(row in measured_attention.of(row.dtype, row.shape) for row in rows)
    slower = max(rows, key=lambda row: row.kpdeploy_us / row.peer_us)
    shape = "x".join(map(str, slower.shape))
    code, out, _ = run("explain", "attention", "--device", "cuda", "--dtype", "bf16", "--shape", shape)
    assert code == 0
    assert slower.told in " ".join(out.split())
    code, out, _ = run(
        "explain", "attention", "--device", "cuda", "--dtype", "bf16", "--shape", shape, "--causal", "--lengths",
        "--kv-heads", "1", "--json",
    )  # fmt: skip
    assert code == 0
    assert all(not row["runs"] for row in json.loads(out)["providers"] if row["device"] == "cuda")
