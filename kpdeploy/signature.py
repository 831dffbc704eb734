"""Names, dtypes, shapes and valid values of a model's inputs and outputs.

A Signature is the only source of I/O names, dynamic axes, Triton dims and ONNX names. No torch here: a serving
host reads signatures too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kpdeploy.errors import InputMismatch, InputSyntax

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64",
)  # fmt: skip
"""Dtypes an input or output of a model can have. NumPy's own: bfloat16 is converted to float32 at the boundary."""

BYTES = "bytes"
"""The dtype of files and texts, which only a handler in front of a model takes: arrays of objects, each `bytes`."""

Point = Mapping[str, int]
"""One size for each dynamic axis, such as {"batch": 8, "seq": 128}."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A dynamic axis: its name and the sizes it may have, both ends included."""

    name: str
    min: int
    max: int


@dataclass(frozen=True, kw_only=True)
class Values:
    """Which values are valid in an input.

    `normal`: N(0, 1). `range`: uniform between `low` and `high`, both included (integers: of the dtype).
    `prefix_mask`: ones followed by zeros along the last axis, at least one 1 a row (an attention mask).
    """

    kind: Literal["normal", "range", "prefix_mask"]
    low: float = 0
    high: float = 0


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: its shape holds ints, or names of dynamic axes; an output's free axis is -1."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    values: Values | None = None

    def dims(self, point: Point) -> tuple[int, ...]:
        """The concrete shape at a point of the dynamic range."""
        return tuple(point[d] if isinstance(d, str) else d for d in self.shape)

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs and outputs in call order, and the dynamic axes that their shapes name."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = ()
    axes: tuple[Axis, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise InputMismatch(
                f"two tensors have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}",
                next_step="give every input and output a name of its own",
            )
        known = {axis.name for axis in self.axes}
        for spec in self.inputs:
            if missing := [d for d in spec.shape if isinstance(d, str) and d not in known]:
                raise InputMismatch(f"input {spec.name} names the axis {missing[0]!r}, which has no range")

    def axis(self, name: str) -> Axis:
        return next(axis for axis in self.axes if axis.name == name)

    @property
    def batch_axis(self) -> Axis | None:
        """The axis that leads every input and every output, if there is one."""
        leads = {spec.shape[0] if spec.shape else None for spec in (*self.inputs, *self.outputs)}
        lead = leads.pop() if len(leads) == 1 else None
        return self.axis(lead) if isinstance(lead, str) else None

    def with_outputs(self, outputs: Iterable[TensorSpec]) -> Signature:
        return replace(self, outputs=tuple(outputs))

    def freeze_axis(self, name: str, size: int) -> Signature:
        """The same signature with one dynamic axis fixed at `size`."""

        def fixed(spec: TensorSpec) -> TensorSpec:
            return replace(spec, shape=tuple(size if d == name else d for d in spec.shape))

        return Signature(
            inputs=tuple(map(fixed, self.inputs)),
            outputs=tuple(map(fixed, self.outputs)),
            axes=tuple(axis for axis in self.axes if axis.name != name),
        )

    def to_json(self) -> dict[str, Any]:
        def spec(s: TensorSpec) -> dict[str, Any]:
            value: dict[str, Any] = {"name": s.name, "dtype": s.dtype, "shape": list(s.shape)}
            if s.values is not None:
                value["values"] = {"kind": s.values.kind, "low": s.values.low, "high": s.values.high}
            return value

        return {
            "inputs": [spec(s) for s in self.inputs],
            "outputs": [spec(s) for s in self.outputs],
            "axes": [{"name": a.name, "min": a.min, "max": a.max} for a in self.axes],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        def spec(s: Mapping[str, Any]) -> TensorSpec:
            values = Values(**s["values"]) if s.get("values") else None
            return TensorSpec(name=s["name"], dtype=s["dtype"], shape=tuple(s["shape"]), values=values)

        return cls(
            inputs=tuple(map(spec, data["inputs"])),
            outputs=tuple(map(spec, data["outputs"])),
            axes=tuple(Axis(**a) for a in data["axes"]),
        )


SYNTAX = 'write it as name:dtype[dims]{low..high}, for example "input_ids:int64[batch=1..32,seq=1..512]{0..30521}"'
_INPUT = re.compile(
    r"\s*(?P<name>[A-Za-z_][\w.]*)\s*:\s*(?P<dtype>\w+)\s*\[(?P<dims>[^\]]*)\]\s*(\{(?P<values>[^}]*)\})?\s*"
)
_RANGE = re.compile(r"(?P<name>[A-Za-z_]\w*)(?:\s*=\s*(?P<min>[0-9]+)\s*\.\.\s*(?P<max>[0-9]+))?")


def parse_inputs(texts: Iterable[str]) -> Signature:
    """Read `--input` options into a Signature (without outputs).

    A dim is an integer, `name=min..max` (a dynamic axis), or `name` of an axis given elsewhere. `{low..high}`
    states the valid values, `{mask}` a prefix mask.

    Raises:
        InputSyntax: a text that does not parse, an unknown dtype, an empty or contradictory range.
    """
    axes: dict[str, Axis] = {}
    specs = []
    for text in texts:
        match = _INPUT.fullmatch(text)
        if not match:
            raise InputSyntax(f"cannot read the input {text!r}", next_step=SYNTAX)
        if match["dtype"] not in DTYPES:
            raise InputSyntax(
                f"input {match['name']} has the unknown dtype {match['dtype']!r}",
                next_step=f"use one of {', '.join(DTYPES)}",
            )
        dims = match["dims"].split(",") if match["dims"].strip() else []
        shape = tuple(_dim(d.strip(), axes, text) for d in dims)
        values = _values(match["values"], match["dtype"], text) if match["values"] is not None else None
        if values is not None and values.kind == "prefix_mask" and not shape:
            raise InputSyntax(f"input {match['name']} is a number and cannot be a mask", next_step=SYNTAX)
        specs.append(TensorSpec(name=match["name"], dtype=match["dtype"], shape=shape, values=values))
    for spec in specs:
        for d in spec.shape:
            if isinstance(d, str) and d not in axes:
                raise InputSyntax(
                    f"the axis {d!r} of input {spec.name} has no range", next_step=f"write {d}=1..64 at its first use"
                )
    return Signature(inputs=tuple(specs), axes=tuple(axes.values()))


def _dim(text: str, axes: dict[str, Axis], whole: str) -> int | str:
    if re.fullmatch(r"[1-9][0-9]*", text):
        return int(text)
    match = _RANGE.fullmatch(text)
    if not match:
        raise InputSyntax(f"cannot read the dim {text!r} of {whole!r}", next_step=SYNTAX)
    name = match["name"]
    if match["min"] is not None:
        axis = Axis(name=name, min=int(match["min"]), max=int(match["max"]))
        if axis.min < 1 or axis.max < axis.min:
            raise InputSyntax(f"the range of axis {name!r} is empty: {axis.min}..{axis.max}", next_step=SYNTAX)
        if axes.setdefault(name, axis) != axis:
            raise InputSyntax(f"the axis {name!r} has two ranges", next_step="state its range once")
    return name


def _values(text: str, dtype: str, whole: str) -> Values:
    if text.strip() == "mask":
        return Values(kind="prefix_mask")
    low, _, high = text.partition("..")
    try:
        values = Values(kind="range", low=float(low), high=float(high))
    except ValueError:
        raise InputSyntax(f"cannot read the values {{{text}}} of {whole!r}", next_step=SYNTAX) from None
    if not math.isfinite(values.high - values.low):
        raise InputSyntax(f"the values {{{text}}} of {whole!r} are not a finite range", next_step=SYNTAX)
    if values.high < values.low:
        raise InputSyntax(f"the values {{{text}}} of {whole!r} are an empty range", next_step=SYNTAX)
    _check_dtype_holds(values, dtype, text)
    return values


def _check_dtype_holds(values: Values, dtype: str, text: str) -> None:
    import numpy as np

    if dtype.startswith("float"):
        least, most = float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    else:
        least, most = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if values.low % 1 or values.high % 1:
            raise InputSyntax(f"the values {{{text}}} of an {dtype} must be whole numbers", next_step=SYNTAX)
    # A float keeps whole numbers exactly up to 2**53.
    if dtype == "int64":
        least, most = -(2**53), 2**53
    if values.low < least or values.high > most:
        raise InputSyntax(
            f"{dtype} does not hold the values {{{text}}}", next_step=f"stay between {least:g} and {most:g}"
        )
