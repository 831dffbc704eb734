"""Calls of attention that were measured on a GPU beside torch's own: the rows of attention_measured.tsv.

benchmarks/hopper_attention.py writes it. Our kernel runs the op whatever they say: they tell what another would take.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parent / "attention_measured.tsv"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One call on one GPU: median microseconds of ours, and of the fastest backend of scaled_dot_product_attention.

    `shape` is the batch, queries, keys, heads and head size. `mean_length`: of the rows' keys; 0: all of them count.
    """

    device: str
    dtype: str
    shape: tuple[int, ...]
    kv_heads: int
    causal: bool
    mean_length: int
    kpdeploy_us: float
    peer: str
    peer_us: float

    @property
    def told(self) -> str:
        heads = f"{self.kv_heads} heads of keys" + ", causal" * self.causal
        length = f", lengths of {self.mean_length} on average" if self.mean_length else ""
        ours, theirs = f"kpdeploy {self.kpdeploy_us:g} µs", f"torch's SDPA ({self.peer}) {self.peer_us:g} µs"
        return f"measured on {self.device} with {heads}{length}: {ours}, {theirs}"


def table() -> list[Measured]:
    """All rows, in the order of the file."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return [_row(cells) for cells in csv.DictReader(lines, delimiter="\t")]


def _row(cells: dict[str, str]) -> Measured:
    return Measured(
        device=cells["device"],
        dtype=cells["dtype"],
        shape=tuple(int(cells[name]) for name in ("batch", "queries", "keys", "heads", "size")),
        kv_heads=int(cells["kv_heads"]),
        causal=cells["causal"] == "yes",
        mean_length=int(cells["mean_length"]),
        kpdeploy_us=float(cells["kpdeploy_us"]),
        peer=cells["peer"],
        peer_us=float(cells["peer_us"]),
    )


def of(dtype: str, shape: tuple[int, ...]) -> list[Measured]:
    """The rows of a call, on any GPU, of any number of heads of keys."""
    return [row for row in table() if (row.dtype, row.shape) == (dtype, shape)]
