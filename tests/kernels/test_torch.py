"""The ops through torch: eager, opcheck, torch.export, AOTInductor, in a process without this package, and absent."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kpdeploy.ops import GPU_OPS, OPS, calls, libraries
from kpdeploy.ops.cases import Case, all_cases, cases_of, error, to_dtype, tolerance
from kpdeploy.ops.providers import chosen

pytestmark = pytest.mark.usefixtures("registered")

DTYPES = (torch.float32, torch.bfloat16)


def op_of(name: str) -> Any:
    return getattr(torch.ops.kpdeploy, name).default


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: f"{case[0]}: {case[1]}")
def test_an_op_gives_the_reference(case: Case, dtype: torch.dtype) -> None:
    name, what, arguments = case
    arguments = to_dtype(arguments, dtype, OPS[name])
    kind = str(dtype).removeprefix("torch.")
    provider = chosen(name, arguments, runtime="torch", device="cpu", dtype=kind)
    outs = calls.through_torch(OPS[name], arguments)
    for out, ref in zip(outs, calls.reference(OPS[name], arguments), strict=True):
        assert out.dtype == dtype
        assert error(out, ref) <= tolerance(provider, kind, what)


def one_of(name: str) -> tuple[Any, ...]:
    """An ordinary call of an op."""
    return max(cases_of(name), key=lambda case: case[2][0].numel() < 3000)[2]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(op_of(name), one_of(name))


@pytest.mark.parametrize("name", [*OPS, *GPU_OPS])
def test_the_library_has_the_schema_of_the_table(name: str) -> None:
    assert str(op_of(name)._schema) == f"kpdeploy::{(OPS | GPU_OPS)[name].schema}"


def test_weights_are_constants_within_a_block_alone(torch_library: str) -> None:
    use = ctypes.CDLL(torch_library).kpdeploy_use_constant_weights
    with libraries.constant_weights():
        with libraries.constant_weights():
            pass
        assert use(1) == 1
    assert use(0) == 0


def calls_for_gpus() -> dict[str, tuple[Any, ...]]:
    """A call of each op that is for GPUs, with tensors of the CPU."""
    x, one = torch.randn(3, 5, 32), torch.tensor([0.5])
    x8, w8 = x.to(torch.float8_e4m3fn), torch.randn(48, 32).to(torch.float8_e4m3fn)
    q = torch.randn(2, 200, 128).bfloat16()
    attention = (q, q[:, :, :64], q[:, :, :64])
    operands = GPU_OPS["fp8_attention_operands"].reference(q, q[:, :, :64], q[:, :, :64], None, 2, 1)
    attended = (x, x, x, torch.tensor([5, 0, 2]), None, 2, 0.25, False)
    return {
        "fp8_quantize": (x, one),
        "fp8_attention_operands": (q, q[:, :, :64], q[:, :, :64], torch.tensor([200, 3]), 2, 1),
        "fp8_attention": (*operands, torch.tensor([200, 3]), one, 0.125, True),
        "attention_fp8": (*attention, torch.tensor([200, 3]), 2, 1, 0.125, True, one),
        "packed_attention_fp8": (*(t[:1] for t in attention), torch.tensor([0, 30, 190]), 2, 1, 0.125, True, one),
        "fp8_linear_activation": (x8, w8, one, one, None, one, "gelu"),
        "linear_add": (x, torch.randn(48, 32), x[0, 0].repeat(2)[:48], torch.randn(3, 5, 48)),
        "fp8_linear_add": (x8, w8, one, one, None, torch.randn(3, 5, 48).bfloat16()),
        "fp8_gated_linear": (x8, w8, w8, one, one, one, None),
        "fp8_layer_norm": (x, x[0, 0], None, 1e-5, one),
        "fp8_rms_norm": (x, x[0, 0], 1e-5, one),
        "fp8_add_layer_norm": (x, x, x[0, 0], x[0, 1], 1e-5, one),
        "fp8_add_rms_norm": (x, x, x[0, 0], 1e-5, one),
        "layer_norm_fp8": (x, x[0, 0], x[0, 1], 1e-5, one),
        "rms_norm_fp8": (x, x[0, 0], 1e-5, one),
        "add_layer_norm_fp8": (x, x, x[0, 0], None, 1e-5, one),
        "add_rms_norm_fp8": (x, x, x[0, 0], 1e-5, one),
        "attention_add_layer_norm": (*attended, torch.randn(32, 32), x[0, 2], x, x[0, 0], None, 1e-5),
        "fp8_attention_add_layer_norm": (*attended, w8[:32], one, one, None, x, x[0, 0], x[0, 1], 1e-5, one),
    }


@pytest.mark.parametrize("name", GPU_OPS)
def test_an_op_for_gpus_has_a_reference_like_its_fake_and_no_kernel_of_8_bits_for_the_cpu(name: str) -> None:
    arguments = calls_for_gpus()[name]
    outs, fakes = (each(*arguments) for each in (GPU_OPS[name].reference, GPU_OPS[name].fake))
    for out, fake in zip(*(v if isinstance(v, tuple) else (v,) for v in (outs, fakes)), strict=True):
        assert (out.shape, out.dtype, out.is_contiguous()) == (fake.shape, fake.dtype, True)
        assert out.float().isfinite().all()
    if "fp8" not in name:
        found = op_of(name)(*arguments)
        pairs = zip(found, outs, strict=True) if isinstance(outs, tuple) else [(found, outs)]
        assert max(error(a, b) for a, b in pairs) < 1e-6
        return
    with pytest.raises(RuntimeError, match=r"(x|query|query8) is on the CPU, and this op has kernels for GPUs"):
        op_of(name)(*arguments)


def test_a_last_dim_that_is_not_contiguous_is_copied() -> None:
    x, w = torch.randn(8, 40).t(), torch.randn(8)
    assert error(op_of("rms_norm")(x, w, 1e-6), OPS["rms_norm"].reference(x.double(), w.double(), 1e-6)) < 1e-6


class Block(torch.nn.Module):
    """All ops in a row, with shapes that depend on the batch and the length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {"w": (64, 64), "up": (96, 64), "gate": (96, 64), "down": (64, 96)}.items():
            self.register_buffer(name, torch.randn(shape) / 8)
        self.register_buffer("ones", torch.ones(64))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.kpdeploy
        h = ops.layer_norm(x, self.ones, None, 1e-5)
        angles = torch.arange(x.shape[1])[None, :, None] * self.ones[:32]
        t = ops.rotary_embedding(h, angles.cos(), angles.sin(), 2)
        a = ops.attention(t, t, h, lengths, 2, 2, 0.18, True)
        packed, offsets = a.reshape(1, -1, 64), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        a = a + ops.packed_attention(packed, packed, packed, offsets, 2, 2, 0.18, True).reshape(a.shape)
        a, s = ops.add_rms_norm(ops.linear_activation(a, self.w, self.ones, "gelu"), x, self.ones, 1e-6)
        m = ops.linear_activation(ops.gated_linear(a, self.gate, self.up), self.down, None, "none")
        n, s = ops.add_layer_norm(m, s, self.ones, self.ones, 1e-5)
        return ops.rms_norm(n + s, self.ones, 1e-5)


def exported() -> torch.export.ExportedProgram:
    dims = {"x": {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("seq", min=1, max=512)}}
    example = (torch.randn(3, 9, 64), torch.tensor([9, 2, 5]))
    return torch.export.export(Block(), example, dynamic_shapes=({0: dims["x"][0], 1: dims["x"][1]}, {0: dims["x"][0]}))


def test_export_keeps_every_op_and_the_dynamic_shapes() -> None:
    program = exported()
    found = [str(node.target).split(".")[1] for node in program.graph.nodes if "kpdeploy." in str(node.target)]
    assert sorted(found) == sorted([*OPS, "linear_activation"])
    for batch, length in ((1, 1), (5, 17)):
        inputs = (torch.randn(batch, length, 64), torch.full((batch,), length))
        assert torch.equal(program.module()(*inputs), Block()(*inputs))


SCRIPT = """
import sys, torch
torch.ops.load_library(sys.argv[1])
if sys.argv[2].endswith(".pt2") and "aoti" in sys.argv[2]:
    model = torch._inductor.aoti_load_package(sys.argv[2])
else:
    model = torch.export.load(sys.argv[2]).module()
x, lengths, wanted = torch.load(sys.argv[3])
out = model(x, lengths)
assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5), (out - wanted).abs().max()
assert "kpdeploy" not in sys.modules
print("ran")
"""


def run_elsewhere(artifact: Path, library: str, folder: Path) -> str:
    """What a process that has the library and not this package says."""
    x, lengths = torch.randn(4, 21, 64), torch.tensor([21, 1, 20, 7])
    torch.save((x, lengths, Block()(x, lengths)), folder / "case.pt")
    command = [sys.executable, "-c", SCRIPT, library, str(artifact), str(folder / "case.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_saved_program_runs_with_the_library_alone(tmp_path: Path, torch_library: str) -> None:
    torch.export.save(exported(), tmp_path / "model.pt2")
    assert run_elsewhere(tmp_path / "model.pt2", torch_library, tmp_path) == "ran\n"


def test_aotinductor_runs_with_the_library_alone(tmp_path: Path, torch_library: str) -> None:
    torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "aoti.pt2"))
    assert run_elsewhere(tmp_path / "aoti.pt2", torch_library, tmp_path) == "ran\n"


def test_two_copies_in_one_process_do_not_end_it(tmp_path: Path, torch_library: str) -> None:
    other = shutil.copy(torch_library, tmp_path)
    script = (
        "import sys, torch\n"
        "for path in sys.argv[1:]: torch.ops.load_library(path)\n"
        "print(torch.ops.kpdeploy.rms_norm(torch.ones(2, 8), torch.ones(8), 0.0).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", script, torch_library, other], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "16.0\n", "")


def test_without_the_library_the_references_stand_in() -> None:
    script = (
        "import pathlib, torch\n"
        "from kpdeploy.ops import libraries, register\n"
        "libraries.FOLDER = pathlib.Path('/nowhere/lib')\n"
        "decision = register()\n"
        "x = torch.randn(2, 8)\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x): return torch.ops.kpdeploy.rms_norm(x, torch.ones(8), 0.0)\n"
        "program = torch.export.export(M(), (x,))\n"
        "assert 'kpdeploy.rms_norm' in str(program.graph), program.graph\n"
        "assert torch.allclose(M()(x), torch.nn.functional.rms_norm(x, (8,), eps=0.0))\n"
        "print(type(decision).__name__, decision.reason)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Skipped this installation holds no lib/libkpdeploy_torch.so")


X, W = torch.ones(4, 8), torch.ones(6, 8)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("linear_activation", (X, W[:, :5], None, "gelu"), "weight is [6, 5], which does not fit x [4, 8]"),
        ("linear_activation", (X, W, X[0], "gelu"), "bias is [8]; [6] fits"),
        ("linear_activation", (X, W, None, "tanh"), "activation is none of"),
        ("linear_activation", (X, W.double(), None, "gelu"), "weight is another dtype"),
        ("linear_activation", (X, W.bfloat16(), None, "gelu"), "weight is bfloat16, and x is float32"),
        ("linear_activation", (torch.tensor(1.0), W, None, "gelu"), "x has 0 dims"),
        ("gated_linear", (X, W, W[:3]), "gate_weight is [6, 8], and up_weight is [3, 8]"),
        ("rms_norm", (X.half(), X[0].half(), 1e-5), "x is float16; the CPU kernels take float32 and bfloat16"),
        ("linear_activation", (X, W[0], None, "gelu"), "weight has 1 dims, not at least 2"),
        ("linear_activation", (X[:0], W[:, :5], None, "gelu"), "weight is [6, 5], which does not fit x [0, 8]"),
        ("linear_activation", (X.int(), W.int(), None, "gelu"), "x is another dtype"),
        ("linear_activation", (X, None, None, "gelu"), "weight is missing"),
        ("linear_activation", (X, W, None, None), "Expected a value of type 'str' for argument 'activation'"),
        ("gated_linear", (X, None, W), "gate_weight is missing"),
        ("gated_linear", (X, W, None), "up_weight is missing"),
        ("gated_linear", (X, W[:, :5], W), "gate_weight is [6, 5], which does not fit x [4, 8]"),
        ("rms_norm", (X, None, 1e-5), "weight is missing"),
        ("rms_norm", (X[:0], W[0, :7], 1e-5), "weight is [7]; [8] fits x"),
        ("rms_norm", (X, W[0].to("meta"), 1e-5), "kpdeploy::rms_norm: its tensors are on cpu and meta"),
        ("rms_norm", (X.to_sparse(), W[0], 1e-5), "Could not run 'kpdeploy::rms_norm'"),
        ("layer_norm", (X, None, None, 1e-5), "weight is missing"),
        ("layer_norm", (X, W[0], W[0, :7], 1e-5), "bias is [7]; [8] fits x"),
        ("layer_norm", (X, W, None, 1e-5), "weight is [6, 8]; [8] fits x"),
        ("add_layer_norm", (X, None, X[0], None, 1e-5), "residual is missing"),
        ("add_rms_norm", (None, X, X[0], 1e-5), "the first tensor is missing"),
        ("add_rms_norm", (X, X.bfloat16(), X[0], 1e-5), "residual is bfloat16, and x is float32"),
        ("attention", (X[None], None, X[None], None, 2, 2, 1.0, False), "key is missing"),
        ("attention", (X[None], X[None], X[None], torch.ones(1), 2, 2, 1.0, False), "lengths is not int64"),
        ("attention", (X[None], X[None], X[None], torch.tensor([-1]), 2, 2, 1.0, False), "lengths[0] is -1, with 4"),
        ("attention", (X[None], X[None], X[None], None, 0, 0, 1.0, False), "heads is 0, not a multiple of"),
        ("packed_attention", (X[None], X[None], X[None], None, 2, 2, 1.0, False), "offsets is missing"),
        (
            "packed_attention",
            (X[None], X[None], X[None], torch.tensor([0, 5]), 2, 2, 1.0, False),
            "offsets[1] is 5, after",
        ),
        ("add_layer_norm", (X, X[:1], X[0], None, 1e-5), "residual is [1, 8], and x is [4, 8]"),
        ("rotary_embedding", (X, X[None], X[None], 1), "x has 2 dims, not at least 3"),
        ("rotary_embedding", (X[None], X[None], None, 1), "sin is missing"),
        ("rotary_embedding", (X[None], X[None].bfloat16(), X[None], 1), "cos is not float32"),
        ("rotary_embedding", (X[None], X[None], X[None], 3), "x is [1, 4, 8]: its last dim is not 3 heads"),
        ("rotary_embedding", (X[None], X[None, :, :3], X[None, :, :3], 1), "cos is [1, 4, 3]; x is [1, 4, 8] in heads"),
        ("rotary_embedding", (X[None], X[None], X[None, :3], 1), "sin is [1, 3, 8]; x is [1, 4, 8] in heads of 8"),
        ("rotary_embedding", (X[None], X[None], X[None, :, :4], 1), "sin is [1, 4, 4], and cos is [1, 4, 8]"),
        ("attention", (X, X, X, None, 2, 2, 1.0, False), "query has 2 dims, not at least 3"),
        ("attention", (X[None], X[None], X[None], torch.tensor([5]), 2, 2, 1.0, False), "lengths[0] is 5, with 4"),
    ],
)
def test_wrong_use_is_one_clear_error(name: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        op_of(name)(*arguments)
    assert message in str(raised.value)
    # The process lives, and the op with it.
    assert calls.through_torch(OPS["rms_norm"], (X, W[0], 1e-5))[0].isfinite().all()
