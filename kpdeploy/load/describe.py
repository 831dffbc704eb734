"""From a module and example inputs to a Model: names, dtypes, dynamic axes, valid values, outputs, and the proof that
the module runs at all and gives one answer."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kpdeploy.compare import relative_error
from kpdeploy.decision import Applied, Decision
from kpdeploy.errors import InputMismatch, InputsUnknown, ModelRejectsInputs, OutputUnusable
from kpdeploy.inputs import Array, default_values, sample
from kpdeploy.load.flat import WIDER, Flat, named_tensors
from kpdeploy.model import Model
from kpdeploy.signature import DTYPES, Axis, Signature, TensorSpec, Values

SEED = 20_26


def model_from_module(
    module: torch.nn.Module,
    signature: Signature,
    *,
    name: str,
    source: Mapping[str, Any],
    keywords: bool,
    kind: str = "module",
    decisions: Sequence[Decision] = (),
) -> Model:
    """Complete a signature that knows its inputs: valid values, then outputs by running the module.

    Raises:
        ModelRejectsInputs: the module raised. OutputUnusable: no tensor, NaN, or two answers to one question.
    """
    dtypes = [_inner_dtype(module, spec) for spec in signature.inputs]
    names = [spec.name for spec in signature.inputs]
    flat = Flat(module, names if keywords else None, dtypes if any(dtypes) else ())
    if kind != "program":  # an exported program has its mode captured, and refuses to change it
        flat.eval()
    signature, found = _with_valid_values(flat, signature)
    signature, fixed = _with_outputs(flat, signature)
    _check_answers(flat, signature)
    return Model(
        name=name,
        kind=kind,
        signature=signature,
        source=source,
        module=flat,
        decisions=(*decisions, *found, *fixed),
    )


def signature_from_example(example: Mapping[str, Array], *, max_batch: int) -> Signature:
    """Inputs as the example shows them; the first axis is the batch where all inputs share its size."""
    leads = {array.shape[0] if array.ndim else None for array in example.values()}
    batched = len(leads) == 1 and None not in leads and max_batch > 1
    axes = (Axis(name="batch", min=1, max=max_batch),) if batched else ()
    specs = [
        TensorSpec(
            name=name,
            dtype=str(array.dtype),
            shape=("batch", *array.shape[1:]) if batched else array.shape,
            values=_values_of(array),
        )
        for name, array in example.items()
    ]
    return Signature(inputs=tuple(specs), axes=axes)


def _values_of(array: Array) -> Values | None:
    """Integers stay within what the example shows; floats are drawn from N(0, 1)."""
    if array.dtype.kind not in "iu" or array.size == 0:
        return None
    return Values(kind="range", low=int(array.min()), high=int(array.max()))


def forward_names(module: torch.nn.Module, count: int) -> list[str]:
    """The names of the first `count` parameters of forward; input_0, … where it takes *args, or does not say."""
    try:
        known = inspect.signature(module.forward).parameters.values()
    except ValueError:  # of a TorchScript method
        return [f"input_{i}" for i in range(count)]
    parameters = [p.name for p in known if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return parameters[:count] if len(parameters) >= count else [f"input_{i}" for i in range(count)]


def require_inputs(module: torch.nn.Module) -> InputsUnknown:
    """The error for a module of which nobody said what it takes, with a line to complete."""
    try:
        count = len(inspect.signature(module.forward).parameters)
    except ValueError:  # a TorchScript method has none
        count = 1
    names = forward_names(module, count) or ["input"]
    return InputsUnknown(
        "nothing says what the model's inputs are",
        why="the model came without example inputs, and no --input or --example was given",
        next_step=" ".join(f'--input "{n}:float32[batch=1..8,…]"' for n in names[:3])
        + "  (or --example sample.npz, or a factory that returns (module, inputs))",
    )


def to_tensors(arrays: Mapping[str, Array]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays.values()]


def _inner_dtype(module: torch.nn.Module, spec: TensorSpec) -> torch.dtype | None:
    """The module's own dtype for a float input, where the boundary's differs (bfloat16 modules get float32)."""
    if np.dtype(spec.dtype).kind != "f":
        return None
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    return own if own in WIDER and spec.dtype == "float32" else None


class _Lookups(TorchDispatchMode):
    """Watches embedding lookups: which tensor indexes a table of how many rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[tuple[torch.Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.rows.append((args[1], args[0].shape[0]))
        return func(*args, **(kwargs or {}))


def _with_valid_values(flat: Flat, signature: Signature) -> tuple[Signature, list[Decision]]:
    """Find the range of integer inputs of which nothing is known, from the embedding tables that they index."""
    unknown = {s.name for s in signature.inputs if s.values is None and np.dtype(s.dtype).kind in "iu"}
    if not unknown:
        return signature, []
    arrays = sample(signature, _small_point(signature), np.random.default_rng(SEED))
    tensors = to_tensors(arrays)
    with _Lookups() as lookups:
        _run(flat, tensors, signature)
    decisions: list[Decision] = []
    specs = []
    for spec, tensor in zip(signature.inputs, tensors, strict=True):
        if spec.name in unknown:
            rows = [n for index, n in lookups.rows if _same(index, tensor)]
            values = Values(kind="range", low=0, high=min(rows) - 1) if rows else default_values(spec.dtype)
            reason = "the embedding table that it indexes" if rows else "not known; state it with {low..high}"
            what = f"values of {spec.name}: {int(values.low)}..{int(values.high)}"
            decisions.append(Applied(what=what, detail=reason))
            spec = replace(spec, values=values)
        specs.append(spec)
    return replace(signature, inputs=tuple(specs)), decisions


def _same(index: torch.Tensor, tensor: torch.Tensor) -> bool:
    if index.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        return True
    return (
        index.numel() == tensor.numel() and tensor.unique().numel() > 2 and bool(torch.equal(index, tensor.to(index)))
    )


def _with_outputs(flat: Flat, signature: Signature) -> tuple[Signature, list[Decision]]:
    """Name the outputs and find their dynamic axes, by running at two points whose sizes all differ."""
    decisions: list[Decision] = []
    answers = []
    for doubled in (False, True):
        point = _small_point(signature, doubled=doubled)
        tensors = to_tensors(sample(signature, point, np.random.default_rng(SEED + doubled)))
        answers.append((point, _run(flat, tensors, signature)))
    (first_point, first), (second_point, second) = answers
    if not first:
        raise OutputUnusable(
            "the model's answer holds no tensor", next_step="return a tensor, or a tuple or dict of tensors"
        )
    taken = {spec.name for spec in signature.inputs}
    specs = []
    for (name, a), (_, b) in zip(first, second, strict=True):
        while name in taken:
            name += "_out"
        taken.add(name)
        shape = tuple(_free(m, n, first_point, second_point) for m, n in zip(a.shape, b.shape, strict=True))
        dtype = str(WIDER.get(a.dtype, a.dtype)).removeprefix("torch.")
        if dtype != str(a.dtype).removeprefix("torch."):
            decisions.append(Applied(what=f"output {name} as {dtype}", detail=f"the model gives {a.dtype}"))
        specs.append(TensorSpec(name=name, dtype=dtype, shape=shape))
    return signature.with_outputs(specs), decisions


def _free(first: int, second: int, a: Mapping[str, int], b: Mapping[str, int]) -> int | str:
    """The axis that an output's dim follows: its name, -1 if none that is known, or its fixed size."""
    for name in a:
        if (a[name], b[name]) == (first, second) and a[name] != b[name]:
            return name
    return first if first == second else -1


def _small_point(signature: Signature, *, doubled: bool = False) -> dict[str, int]:
    """Small sizes that differ from axis to axis; twice as large (so that a stride shows too) when `doubled`."""
    point: dict[str, int] = {}
    for index, axis in enumerate(signature.axes):
        size = 2 + 5 * index if axis.min <= 2 + 5 * index else axis.min + 5 * index
        small = min(size, axis.max)
        large = min(2 * size + 1, axis.max)
        point[axis.name] = (large if large != small else axis.min) if doubled else small
    return point


def _run(flat: Flat, tensors: Sequence[torch.Tensor], signature: Signature) -> list[tuple[str, torch.Tensor]]:
    try:
        with torch.inference_mode():
            return list(named_tensors(flat.call(tensors)))
    except Exception as error:
        shapes = ", ".join(f"{s.name}:{s.dtype}{list(t.shape)}" for s, t in zip(signature.inputs, tensors, strict=True))
        raise ModelRejectsInputs(
            f"the model raised when called with {shapes}",
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            next_step="check names, dtypes and dims of the inputs; state them with --input or --example",
        ) from None


def _check_answers(flat: Flat, signature: Signature) -> None:
    arrays = sample(signature, _small_point(signature), np.random.default_rng(SEED))
    first, second = (_run(flat, to_tensors(arrays), signature) for _ in range(2))
    for (name, a), (_, b) in zip(first, second, strict=True):
        one, two = (t.to(WIDER.get(t.dtype, t.dtype)).numpy() for t in (a, b))
        if one.dtype.kind == "f" and np.isnan(one).any():
            raise OutputUnusable(
                f"output {name} of the unmodified model holds NaN",
                why="valid random inputs gave it, so nothing could be compared",
                next_step="check the weights, or state valid input values with --input '…{low..high}'",
            )
        if relative_error(one, two) > 1e-6:
            raise OutputUnusable(
                f"output {name} of the unmodified model differs from call to call",
                why="the same inputs gave two answers: something draws random numbers, or keeps state",
                next_step="make forward() deterministic in evaluation mode",
            )


def example_from_npz(path: Any, names: Sequence[str] | None = None) -> dict[str, Array]:
    """The arrays of an .npz, in the order of `names` where given."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array without a name")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputMismatch(
            f"cannot read the example {path}",
            why=str(error),
            next_step="write it with numpy.savez(path, input_name=array, …)",
        ) from None
    for name, array in arrays.items():
        if str(array.dtype) not in DTYPES:
            raise InputMismatch(
                f"the array {name} of the example {path} is of the dtype {array.dtype}",
                next_step=f"use one of {', '.join(DTYPES)}",
            )
    if names is not None and set(arrays) != set(names):
        raise InputMismatch(
            f"the example {path} holds {', '.join(arrays)}",
            why=f"the model takes {', '.join(names)}",
            next_step="give each array the name of an input",
        )
    return {name: arrays[name] for name in names or arrays}
