"""`kpdeploy ops validate`: it passes good kernels, and sees bad ones."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kpdeploy.decision import Skipped
from kpdeploy.errors import KernelsDiffer, KernelsMissing
from kpdeploy.ops import OPS, validate
from kpdeploy.ops.calls import poisoned_memory, through_torch
from kpdeploy.ops.cases import CASES, cases_of, error, to_dtype

Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.usefixtures("registered", "onnx_library")


@pytest.fixture
def run(run: Run) -> Run:
    """Call `kpdeploy ops validate …`."""
    return functools.partial(run, "ops", "validate")


def rows_of(out: str) -> dict[tuple[str, ...], dict[str, Any]]:
    rows = json.loads(out)["checked"]
    return {(r["provider"], r["runtime"], r["device"], r["dtype"]): r for r in rows}


def test_every_provider_of_an_op_that_is_here_is_run_on_every_way(run: Run) -> None:
    code, out, err = run("gated_linear", "--json")
    assert (code, err) == (0, "")
    rows = rows_of(out)
    for dtype in ("float32", "bfloat16"):
        # Every case is of one of torch's two providers.
        cases = len(cases_of("gated_linear"))
        assert (
            rows["onednn", "torch", "cpu", dtype]["cases"] + rows["kpdeploy", "torch", "cpu", dtype]["cases"] == cases
        )
        assert rows["kpdeploy", "onnxruntime", "cpu", dtype]["cases"] == 2 * cases
        assert rows["kpdeploy", "numpy", "cpu", dtype]["cases"] % cases == 0
    # An error of exactly 0 would be no measurement.
    assert all(0 < row["error"] <= row["tolerance"] and row["passed"] for row in rows.values())


def test_the_table_shows_errors_and_what_was_not_run(run: Run) -> None:
    code, out, err = run("rms-norm")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["op", "in", "provider", "dtype", "cases", "error", "allowed"]
    assert ["rms_norm", "torch", "kpdeploy", "f32"] in [line[:4] for line in lines]
    assert {line[-1] for line in lines[1:]} == {"pass"}
    assert torch.cuda.is_available() or "not run: torch on cuda: " in err


def test_a_kernel_that_leaves_memory_unwritten_is_seen(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    core = importlib.import_module("kpdeploy._core")
    good = core.rms_norm

    def forgetful(x: Any, weight: Any, eps: float, out: Any, threads: int = 1) -> None:
        good(x[:-1], weight, eps, out[:-1], threads=threads)

    monkeypatch.setattr(core, "rms_norm", forgetful)
    code, out, err = run("rms_norm")
    assert code == KernelsDiffer.exit_code
    assert "2 of 6 kernels differ from their reference" in err
    assert [line.split()[1] for line in out.splitlines() if line.endswith("FAIL")] == ["numpy", "numpy"]
    assert re.search(r"rms_norm in numpy, f32: \w+, ", out)


def test_a_kernel_that_is_wrong_everywhere_fails_in_json_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["rms_norm"]
    monkeypatch.setitem(OPS, "rms_norm", replace(op, reference=lambda *a: op.reference(*a) * 1.01))
    code, out, _ = run("rms_norm", "--json")
    assert code == KernelsDiffer.exit_code
    assert json.loads(out)["passed"] is False
    assert not any(row["passed"] for row in rows_of(out).values())


def test_a_refusal_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "rms_norm", lambda: iter([("wrong width", (torch.ones(2, 8), torch.ones(7), 1e-5))]))
    op = OPS["rms_norm"]
    monkeypatch.setitem(OPS, "rms_norm", replace(op, reference=lambda x, *rest: x))
    code, out, _ = run("rms_norm")
    assert code == KernelsDiffer.exit_code
    assert "kpdeploy::rms_norm: weight is [7]; [8] fits x" in out


def test_a_machine_without_kernels_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_ways", lambda: ([], [Skipped(what="torch on cpu", reason="no library")]))
    code, _, err = run("rms_norm")
    assert code == KernelsMissing.exit_code
    assert "why: no library" in err


def test_memory_that_torch_allocates_is_poisoned_too() -> None:
    with poisoned_memory() as holds:
        if not holds:
            pytest.skip("this C library has no mallopt")
        for shape in ((3, 7), (70, 65), (2048, 1024)):
            assert (torch.empty(shape) > 3e38).all()
            assert (torch.empty(shape, dtype=torch.bfloat16) > 3e38).all()
        arguments = cases_of("rms_norm")[6][2]
        assert (through_torch(OPS["rms_norm"], arguments)[0].abs() < 1e6).all()
    assert not (torch.empty(3, 7) > 3e38).all()


def test_cases_keep_their_strides_in_every_dtype_and_are_the_same_each_time() -> None:
    for op in CASES:
        for (_, what, first), (_, _, again) in zip(cases_of(op), cases_of(op), strict=True):
            half = to_dtype(first, torch.bfloat16)
            for one, other, narrow in zip(first, again, half, strict=True):
                if isinstance(one, torch.Tensor):
                    assert torch.equal(one, other), (op, what)
                    assert 0 in one.stride() or narrow.stride() == one.stride(), (op, what)


def test_the_cases_hold_what_validate_promises() -> None:
    for op in CASES:
        tensors = [a for _, _, arguments in cases_of(op) for a in arguments if isinstance(a, torch.Tensor)]
        firsts = [arguments[0] for _, _, arguments in cases_of(op)]
        assert any(t.numel() == 0 for t in firsts), op
        assert any(t.shape[:-1].numel() == 1 for t in firsts), op
        assert any(not t.is_contiguous() for t in tensors), op
        assert max(t.numel() for t in tensors) > 100_000, op
        assert any(t.shape[-1] % 16 for t in firsts), op


def test_an_error_is_infinite_for_what_is_no_number_or_no_fit() -> None:
    ref = torch.ones(4, dtype=torch.float64)
    assert error(torch.tensor([1.0, float("nan"), 1, 1]), ref) == float("inf")
    assert error(torch.ones(5), ref) == float("inf")
    assert error(torch.ones(4) * 1.5, ref) == pytest.approx(0.5)
    assert error(torch.ones(0), torch.ones(0)) == 0.0
