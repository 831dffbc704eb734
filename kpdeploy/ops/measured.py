"""Products that were measured on a GPU, by whom they were made fastest: the rows of gpu_measured.tsv.

The build compiles the same file into the libraries (csrc/core/gpu_choice.cpp), so that an artifact carries the choice.
benchmarks/hopper_linear.py writes it.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parent / "gpu_measured.tsv"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One product on one GPU: who made it fastest, and the median microseconds of each that computes it.

    `activation` is that of linear_activation. `us` holds "kpdeploy", "cublaslt" where it has that activation, and
    "separate", torch's linear and then its activation.
    """

    device: str
    op: str
    dtype: str
    activation: str
    rows: int
    inputs: int
    outputs: int
    provider: str
    us: tuple[tuple[str, float], ...]

    @property
    def told(self) -> str:
        figures = ", ".join(f"{name} {us:g} µs" for name, us in self.us)
        return f"measured on {self.device} in {self.dtype} with {self.rows} rows: {figures}"


@functools.cache
def table() -> tuple[Measured, ...]:
    """All rows, in the order of the file."""
    with TABLE.open(encoding="utf-8", newline="") as lines:
        return tuple(_row(cells) for cells in csv.DictReader(lines, delimiter="\t"))


def _row(cells: dict[str, str]) -> Measured:
    timed = ((name.removesuffix("_us"), us) for name, us in cells.items() if name.endswith("_us"))
    return Measured(
        device=cells["device"],
        op=cells["op"],
        dtype=cells["dtype"],
        activation=cells["activation"],
        rows=int(cells["rows"]),
        inputs=int(cells["inputs"]),
        outputs=int(cells["outputs"]),
        provider=cells["provider"],
        us=tuple((name, float(us)) for name, us in timed if us != "-"),
    )


NEAR = 2
"""A number of rows goes where the nearest that was measured does, up to so many times as many: kNear of
csrc/core/gpu_choice.cpp."""


def of(op: str, dtype: str, activation: str, shape: tuple[int, ...]) -> list[Measured]:
    """What was measured of a product of `shape` (rows, inputs, outputs) or of the nearest number of rows: one a GPU.
    float16 goes where bfloat16 was measured."""
    rows, *weight = shape
    dtypes = (dtype, "bfloat16") if dtype == "float16" else (dtype,)

    def apart(m: Measured) -> float:
        return max(m.rows, rows) / max(1, min(m.rows, rows))

    found: dict[str, Measured] = {}
    for m in table():
        same = (m.op, m.activation, m.inputs, m.outputs) == (op, activation, *weight) and m.dtype in dtypes
        if same and apart(m) <= NEAR and (m.device not in found or apart(m) < apart(found[m.device])):
            found[m.device] = m
    return list(found.values())
