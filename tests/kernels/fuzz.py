"""Random shapes, strides and dtypes through every kernel; not a test by itself, but the load for a sanitizer.

    cmake -S csrc -B build/sanitized -G Ninja -DKPDEPLOY_SANITIZE=ON -DKPDEPLOY_PYBIND11=... (csrc/BUILD.md)
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \\
        PYTHONPATH=build/sanitized/lib python tests/kernels/fuzz.py --calls 10000

Every array is an allocation of its own, of exactly the bytes that its strides reach. NumPy only. A call that is refused
is as good as one that runs: both must leave the process alive, and outputs whole (no NaN where none went in).
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import numpy as np

Rng = np.random.Generator


def array(rng: Rng, shape: tuple[int, ...], dtype: str, fill: float | None = None) -> Any:
    """Of random values, rows apart by up to 3 elements, now and then a broadcast or transposed leading dim."""
    room = int(rng.integers(0, 4)) if shape[-1] else 0
    count = int(np.prod(shape[:-1])) * (shape[-1] + room) - (room if np.prod(shape) else 0)
    flat = np.full(max(count, 0), fill, np.float32) if fill is not None else rng.standard_normal(max(count, 0))
    flat = flat.astype(np.float32)
    if dtype == "bf16":
        flat = (flat.view(np.uint32) >> 16).astype(np.uint16)
    strides = [flat.itemsize]
    step = (shape[-1] + room) * flat.itemsize
    for size in reversed(shape[:-1]):
        strides.insert(0, step)
        step *= max(size, 1)
    return np.lib.stride_tricks.as_strided(flat, shape, strides)


def size(rng: Rng, most: int) -> int:
    return int(rng.integers(0, most)) if rng.random() < 0.9 else int(rng.choice([0, 1, 15, 16, 17, 31, 32, 33]))


def norm(core: Any, rng: Rng, dtype: str) -> list[Any]:
    shape = (*(size(rng, 7) for _ in range(rng.integers(0, 3))), size(rng, 200))
    x, r, out, total = (array(rng, shape, dtype, fill) for fill in (None, None, np.nan, np.nan))
    width = (shape[-1] if rng.random() < 0.97 else size(rng, 200),)
    w, b = array(rng, width, dtype), array(rng, width, dtype) if rng.random() < 0.5 else None
    match rng.integers(0, 4):
        case 0:
            core.layer_norm(x, w, b, 1e-5, out)
            return [out]
        case 1:
            core.rms_norm(x, w, 1e-5, out)
            return [out]
        case 2:
            core.add_layer_norm(x, r, w, b, 1e-5, out, total)
        case _:
            core.add_rms_norm(x, r, w, 1e-5, out, total)
    return [out, total]


def linear(core: Any, rng: Rng, dtype: str) -> list[Any]:
    lead, k, n = tuple(size(rng, 12) for _ in range(rng.integers(1, 3))), size(rng, 150), size(rng, 150)
    x, w, u = array(rng, (*lead, k), dtype), array(rng, (n, k), dtype), array(rng, (n, k), dtype)
    out = np.full((*lead, n), np.nan, np.float32)
    if dtype == "bf16":
        out = np.full((*lead, n), 0x7FC0, np.uint16)
    packed = bool(rng.random() < 0.5)
    if rng.random() < 0.4:
        core.gated_linear(x, w, u, out, packed=packed)
        return [out]
    activation = str(rng.choice(["none", "relu", "gelu", "gelu_tanh", "silu"]))
    bias = array(rng, (n if rng.random() < 0.97 else size(rng, 150),), dtype) if rng.random() < 0.5 else None
    core.linear_activation(x, w, bias, activation, out, packed=packed)
    return [out]


def attention(core: Any, rng: Rng, dtype: str) -> list[Any]:
    batch, queries, keys, kv_heads, head = size(rng, 4), size(rng, 60), size(rng, 300), size(rng, 4), size(rng, 140)
    heads = kv_heads * int(rng.integers(1, 4))
    q, out = (array(rng, (batch, queries, heads * head), dtype, fill) for fill in (None, np.nan))
    k, v = (array(rng, (batch, keys, kv_heads * head), dtype) for _ in range(2))
    lengths = rng.integers(0, keys + 1 + (rng.random() < 0.05), batch) if rng.random() < 0.5 else None
    core.attention(q, k, v, lengths, heads, kv_heads, 0.2, bool(rng.random() < 0.5), out)
    return [out]


def packed_attention(core: Any, rng: Rng, dtype: str) -> list[Any]:
    lengths, kv_heads, head = rng.integers(0, 90, size(rng, 6)), size(rng, 4), size(rng, 140)
    heads, rows = kv_heads * int(rng.integers(1, 4)), int(lengths.sum()) + size(rng, 9)
    q, out = (array(rng, (1, rows, heads * head), dtype, fill) for fill in (None, np.nan))
    k, v = (array(rng, (1, rows, kv_heads * head), dtype) for _ in range(2))
    offsets = np.cumsum([0, *lengths]) + (rng.random() < 0.05) * rng.integers(-1, 2, len(lengths) + 1)
    core.packed_attention(q, k, v, offsets, heads, kv_heads, 0.2, bool(rng.random() < 0.5), out)
    return [out]


def rotation(core: Any, rng: Rng, dtype: str) -> list[Any]:
    batch, rows, heads, head = size(rng, 4), size(rng, 20), size(rng, 5), size(rng, 140)
    x, out = (array(rng, (batch, rows, heads * head), dtype, fill) for fill in (None, np.nan))
    turned = 2 * int(rng.integers(0, head // 2 + 1)) + (rng.random() < 0.03)
    cos, sin = (array(rng, (batch if rng.random() < 0.5 else 1, rows, turned), "f32") for _ in range(2))
    core.rotary_embedding(x, cos, sin, heads, out)
    return [out]


def whole(out: Any) -> bool:
    values = (out.astype(np.uint32) << 16).view(np.float32) if out.dtype == np.uint16 else out
    return not np.isnan(values).any()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    try:
        core = importlib.import_module("_core")
    except ImportError:
        core = importlib.import_module("kpdeploy._core")
    for kind in (norm, linear, attention, packed_attention, rotation):
        ran = 0
        for call in range(chosen.calls):
            rng = np.random.default_rng((chosen.seed, call))
            core.use_isa(["avx512", "avx2", "baseline"][call % 3])
            try:
                outs = kind(core, rng, "bf16" if rng.random() < 0.5 else "f32")
            except ValueError:
                continue
            ran += 1
            assert all(whole(out) for out in outs), (kind.__name__, chosen.seed, call)
        print(f"{kind.__name__}: {ran} of {chosen.calls} ran, the others were refused")


if __name__ == "__main__":
    main()
