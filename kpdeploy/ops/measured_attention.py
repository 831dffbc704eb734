"""Calls of attention that were measured on a GPU, by whom they were run fastest: the rows of attention_measured.tsv.

The build compiles the same file into the libraries (csrc/core/gpu_choice.cpp), so that an artifact carries the choice.
benchmarks/hopper_attention.py writes it.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

from kpdeploy.ops.measured import NEAR

TABLE = Path(__file__).parent / "attention_measured.tsv"
COLUMNS = ("device", "op", "dtype", "batch", "queries", "keys", "heads", "kv_heads", "size", "causal", "mean_length",
           "provider", "kpdeploy_us", "cudnn_us", "peer", "peer_us")  # fmt: skip


LEAST_GAIN = 1.02


def is_gain(kpdeploy_us: float, cudnn_us: float) -> bool:
    """Whether cuDNN is faster by more than two runs differ. A tie is ours: cuDNN makes a plan for every new shape."""
    return kpdeploy_us > LEAST_GAIN * cudnn_us


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One call on one GPU: median microseconds of our kernels, of cuDNN called by us, and of the fastest backend of
    torch's scaled_dot_product_attention.

    `shape` is the batch, queries, keys, heads and head size. `mean_length`: of the rows' keys; 0: all of them count.
    `provider`: "kpdeploy" or "cudnn". `cudnn_us` is None where cuDNN was not called.
    """

    device: str
    dtype: str
    shape: tuple[int, ...]
    kv_heads: int
    causal: bool
    mean_length: int
    provider: str
    kpdeploy_us: float
    cudnn_us: float | None
    peer: str
    peer_us: float

    @property
    def told(self) -> str:
        heads = f"{self.kv_heads} heads of keys" + ", causal" * self.causal
        length = f", lengths of {self.mean_length} on average" if self.mean_length else ""
        cudnn = "" if self.cudnn_us is None else f"cuDNN {self.cudnn_us:g} µs, "
        figures = f"kpdeploy {self.kpdeploy_us:g} µs, {cudnn}torch's SDPA ({self.peer}) {self.peer_us:g} µs"
        shape = "x".join(map(str, self.shape))
        return f"{shape} measured on {self.device} with {heads}{length}: {figures}"


@functools.cache
def table() -> tuple[Measured, ...]:
    """All rows, in the order of the file."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return tuple(_row(cells) for cells in csv.DictReader(lines, delimiter="\t"))


def _row(cells: dict[str, str]) -> Measured:
    return Measured(
        device=cells["device"],
        dtype=cells["dtype"],
        shape=tuple(int(cells[name]) for name in ("batch", "queries", "keys", "heads", "size")),
        kv_heads=int(cells["kv_heads"]),
        causal=cells["causal"] == "yes",
        mean_length=int(cells["mean_length"]),
        provider=cells["provider"],
        kpdeploy_us=float(cells["kpdeploy_us"]),
        cudnn_us=None if cells["cudnn_us"] == "-" else float(cells["cudnn_us"]),
        peer=cells["peer"],
        peer_us=float(cells["peer_us"]),
    )


def of(dtype: str, shape: tuple[int, ...]) -> list[Measured]:
    """The rows of a call, on any GPU, of any number of heads of keys."""
    return [row for row in table() if (row.dtype, row.shape) == (dtype, shape)]


def nearest(
    device: str, dtype: str, shape: tuple[int, ...], *, kv_heads: int, causal: bool, lengths: bool
) -> Measured | None:
    """The row that a call goes by: chosen_for of csrc/core/gpu_choice.cpp.

    Of as many rows of the batch, queries and keys, or the nearest numbers up to NEAR times as many or as few of each.
    A single query sees all keys: it is not causal.
    """
    found, apart = None, float("inf")
    for row in table():
        same = (row.device, row.dtype, row.shape[3:], row.kv_heads) == (device, dtype, shape[3:], kv_heads)
        if not same or row.causal != (causal and shape[1] > 1) or (row.mean_length > 0) != lengths:
            continue
        times = [max(a, b) / max(1, min(a, b)) for a, b in zip(row.shape[:3], shape[:3], strict=True)]
        more = times[0] * times[1] * times[2]
        if max(times) <= NEAR and more < apart:
            found, apart = row, more
    return found
