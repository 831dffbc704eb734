"""Which levels a machine has, and why it has not the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kpdeploy.backends import cpu, lowerings, nvidia
from kpdeploy.decision import Skipped
from kpdeploy.errors import FormatUnavailable, KpdeployError, LevelUnavailable, UnknownName
from kpdeploy.hardware import Gpu, Hardware, Problem
from kpdeploy.pipeline.levels import rungs_of as rungs
from kpdeploy.pipeline.levels import unusable

PLAIN = Hardware(
    cpu="Old CPU", physical_cores=2, logical_cores=2, usable_cores=2.0, isa=("avx2",), memory_bytes=1 << 30, gpus=()
)
MODERN = replace(PLAIN, cpu="New CPU", isa=("avx2", "avx512f", "avx512_vnni", "amx_bf16", "amx_int8"))
GPU = Gpu(name="NVIDIA H100", capability="9.0", memory_bytes=80 << 30, driver="580.1")


def test_a_processor_with_the_instructions_has_both_levels_and_int8_leaves_the_rest_in_bf16() -> None:
    bf16, fused, int8, dynamic = cpu.lowerings(MODERN)
    assert (bf16.level, bf16.missing, bf16.settings) == (2, "", {"precision": "bf16"})
    assert (fused.level, fused.fused, fused.precision, fused.format) == (2, True, "bfloat16", "torchscript")
    assert (int8.level, int8.missing, int8.settings["precision"], int8.quantized) == (3, "", "bf16", "static")
    assert (dynamic.level, dynamic.quantized, dynamic.settings["activation_group"]) == (3, "dynamic", 128)


def test_a_processor_without_says_which_instructions_it_lacks() -> None:
    bf16, fused, int8, _ = cpu.lowerings(PLAIN)
    assert "Old CPU has no bf16 instructions (amx_bf16" in bf16.missing
    assert fused.missing == bf16.missing
    assert "has no int8 instructions" in int8.missing
    # What is not quantized then computes in float32.
    assert int8.settings["precision"] == "f32"


def test_int8_without_nncf_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cpu.lowerings(MODERN)[2].missing == "the package nncf is missing: pip install nncf"


def test_a_gpu_has_ways_of_its_own_and_without_its_runtime_it_is_told_that_it_lies_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kpdeploy.backends.nvidia._lacks", lambda gpu, runtime: f"{gpu} lies idle: no {runtime}")
    known = [way for way in lowerings(replace(MODERN, gpus=(GPU, GPU))) if way.on_gpu]
    ways = [way for way in known if way.format == "cuda"]
    assert [way.what for way in ways] == [
        "level 1 (float32)",
        "level 2 (float16)",
        "level 2 (bfloat16)",
        "level 3 (fp8)",
    ]
    assert {way.missing for way in ways} == {"NVIDIA H100 lies idle: no torch with CUDA"}
    others = [way for way in known if way not in ways]
    assert [(way.format, way.level, way.precision) for way in others] == [
        ("onnx", 1, "float32"),
        ("onnx", 2, "float16"),
        ("onnx", 2, "bfloat16"),
    ]
    assert {way.missing for way in others} == {"NVIDIA H100 lies idle: no ONNX Runtime with CUDA"}
    assert not any(way.on_gpu for way in lowerings(MODERN))


def test_what_is_for_a_gpu_is_for_a_target_that_serves_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    on(replace(MODERN, gpus=(GPU,)), monkeypatch)
    monkeypatch.setattr("kpdeploy.backends.nvidia._lacks", lambda gpu, runtime: "")
    (ways,) = rungs("torchserve", "onnx", "auto", None)
    assert {way.missing for way in ways if way.on_gpu} == {"torchserve runs models on the CPU here"}
    (ways,) = rungs("triton", "onnx", "1", None)
    assert [(way.format, way.precision) for way in ways if not way.missing] == [("onnx", "float32")]


def on(hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpdeploy.pipeline.levels.detect", lambda: hardware)


def test_the_format_of_a_gpu_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    on(MODERN, monkeypatch)
    with pytest.raises(FormatUnavailable, match="no NVIDIA GPU"):
        rungs("triton", "cuda", "1", None)


def test_8_bits_are_for_the_tensor_cores_that_the_kernels_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpdeploy.backends.nvidia._lacks", lambda gpu, runtime: "")
    older = replace(GPU, name="NVIDIA A100", capability="8.0")
    found = nvidia.lowerings(replace(MODERN, gpus=(older,)))
    ways = {way.precision: way.missing for way in found if way.format == "cuda"}
    assert ways == {"float32": "", "float16": "", "bfloat16": "", "fp8": ways["fp8"]}
    assert "NVIDIA A100 has compute capability 8.0" in ways["fp8"]
    assert not any(way.missing for way in nvidia.lowerings(replace(MODERN, gpus=(GPU,))))


def test_level_1_tries_nothing_and_auto_all_ways_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    on(MODERN, monkeypatch)
    assert rungs("triton", "auto", "1", None) == [()]
    (all_at_once,) = rungs("triton", "auto", "auto", None)
    assert [way.level for way in all_at_once] == [2, 2, 3, 3]


def test_with_a_latency_budget_each_level_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    on(MODERN, monkeypatch)
    assert [[way.level for way in step] for step in rungs("triton", "auto", "auto", 5.0)] == [[], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("hardware", "target", "format", "level", "says"),
    [
        (PLAIN, "triton", "auto", "2", "Old CPU has no bf16 instructions"),
        (MODERN, "torchserve", "auto", "3", "which torchserve does not serve"),
        (MODERN, "triton", "onnx", "2", "onnx was asked for"),
    ],
)
def test_a_level_that_cannot_be_had_is_an_error_and_in_auto_a_reason(
    hardware: Hardware, target: str, format: str, level: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(hardware, monkeypatch)
    with pytest.raises(LevelUnavailable) as told:
        rungs(target, format, level, None)
    assert says in told.value.why
    (ways,) = rungs(target, format, "auto", None)
    assert says in ways[0].missing


def test_a_gpu_that_cannot_be_used_is_told_beside_the_level_that_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Problem(what="the NVIDIA GPUs cannot be used: the module is of another version", next_step="restart")
    on(replace(PLAIN, problems=(wrong,)), monkeypatch)
    with pytest.raises(LevelUnavailable) as refused:
        rungs("triton", "auto", "3", None)
    assert "of another version: restart" in refused.value.why
    (told,) = unusable("auto")
    assert isinstance(told, Skipped)
    assert told.reason == str(wrong)
    assert unusable("1") == []


@pytest.mark.parametrize(("level", "latency"), [("4", None), ("2", 0.0), ("2", float("nan"))])
def test_a_level_or_latency_that_is_none_is_refused(
    level: str, latency: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(MODERN, monkeypatch)
    with pytest.raises(UnknownName) as told:
        rungs("triton", "auto", level, latency)
    assert isinstance(told.value, KpdeployError)
    assert told.value.next_step
