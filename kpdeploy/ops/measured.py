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
        return f"measured on {self.device}: {figures}"


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


def of(op: str, dtype: str, activation: str, shape: tuple[int, ...]) -> list[Measured]:
    """The rows of a product of `shape` (rows, inputs, outputs): one a GPU."""
    key = (op, dtype, activation, *shape)
    return [m for m in table() if (m.op, m.dtype, m.activation, m.rows, m.inputs, m.outputs) == key]
