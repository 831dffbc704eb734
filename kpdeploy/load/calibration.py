"""Samples that show what a model's tensors hold in use: the user's own, or valid random ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kpdeploy.errors import InputMismatch, PackageMissing
from kpdeploy.inputs import Array, middle_point, sample
from kpdeploy.load.describe import example_from_npz
from kpdeploy.signature import Signature, TensorSpec

RANDOM = 64
TOKENS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""The inputs that a tokenizer makes, and what `tokenizers` calls them."""

LEAST = 8
"""Fewer samples than this say too little."""


def calibration(
    signature: Signature, path: str | os.PathLike[str] | None, tokenizer: Path | None = None
) -> list[dict[str, Array]]:
    """Requests of one row each: the rows of the arrays in the .npz `path`, the lines of a .txt as the tokenizer in the
    folder `tokenizer` reads them, or random ones of many sizes.

    Raises:
        InputMismatch: the file is neither, lacks an input, or holds what the model does not take, NaN included.
        PackageMissing: texts were given, and the package tokenizers is not here.
    """
    if path is None:
        return _random(signature)
    if Path(path).suffix == ".txt":
        return _texts(signature, Path(path), tokenizer)
    arrays = example_from_npz(Path(path))
    names = [spec.name for spec in signature.inputs]
    if set(arrays) != set(names):
        raise _refused(path, f"it holds {', '.join(sorted(arrays)) or 'nothing'}; the inputs are {', '.join(names)}")
    counts = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(counts) > 1 or min(counts) < LEAST:
        held = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise _refused(path, f"{held}: the first axis counts the samples, the same in all arrays, {LEAST} at least")
    for spec in signature.inputs:
        _check(path, spec, arrays[spec.name], signature)
    lead = signature.batch_axis is not None
    return [
        {spec.name: arrays[spec.name][i : i + 1] if lead else arrays[spec.name][i] for spec in signature.inputs}
        for i in range(counts.pop())
    ]


def _random(signature: Signature) -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    usual = middle_point(signature, batch=1)
    lead = signature.batch_axis.name if signature.batch_axis is not None else ""
    samples = []
    for _ in range(RANDOM):
        part = rng.uniform(0.1, 1)
        sizes = {a.name: max(a.min, round(usual[a.name] * part)) for a in signature.axes if a.name != lead}
        samples.append(sample(signature, {**usual, **sizes}, rng))
    return samples


def _texts(signature: Signature, path: Path, folder: Path | None) -> list[dict[str, Array]]:
    """A request of its own length for each line that is not empty, cut at the longest that the model takes."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(path, str(error)) from None
    wanted = [spec.name for spec in signature.inputs]
    if folder is None or not set(wanted) <= set(TOKENS):
        raise _refused(path, f"{', '.join(wanted)} cannot be made of texts: the model brings no tokenizer for them")
    if len(lines) < LEAST:
        raise _refused(path, f"it holds {len(lines)} texts, {LEAST} at least are needed")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise PackageMissing("texts need the package tokenizers", next_step="pip install tokenizers") from None
    read = Tokenizer.from_file(str(folder / "tokenizer.json"))
    read.no_padding()
    axes = {a.name: a for a in signature.axes}
    length = signature.inputs[0].shape[-1]
    read.enable_truncation(axes[length].max if isinstance(length, str) else length)
    if isinstance(length, int):
        read.enable_padding(length=length)
    dtypes = {spec.name: spec.dtype for spec in signature.inputs}
    return [
        {name: np.array([getattr(entry, TOKENS[name])], dtypes[name]) for name in wanted}
        for entry in read.encode_batch(lines)
    ]


def _check(path: str | os.PathLike[str], spec: TensorSpec, array: Array, signature: Signature) -> None:
    dims = spec.shape[1:] if signature.batch_axis is not None else spec.shape
    found = array.shape[1:]
    ranges = {a.name: (a.min, a.max) for a in signature.axes}
    ends = [ranges[dim] if isinstance(dim, str) else (dim, dim) for dim in dims]
    fits = len(found) == len(ends) and all(low <= size <= high for size, (low, high) in zip(found, ends, strict=True))
    if not fits:
        wanted = ", ".join(str(dim) for dim in dims)
        raise _refused(path, f"{spec.name} has samples of {list(found)}; the model takes [{wanted}]")
    if array.dtype != np.dtype(spec.dtype):
        raise _refused(path, f"{spec.name} is {array.dtype}; the model takes {spec.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        where = int(np.argwhere(~np.isfinite(array))[0][0])
        raise _refused(path, f"{spec.name} holds NaN or infinity, first in sample {where}")


def _refused(path: str | os.PathLike[str], why: str) -> InputMismatch:
    return InputMismatch(
        f"{path} is no calibration data for this model",
        why=why,
        next_step="write one array per input with numpy.savez, samples along the first axis (or a text a line into a "
        ".txt, where the model brings a tokenizer); or leave --calibrate out",
    )
