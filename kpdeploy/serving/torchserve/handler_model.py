"""The handler of this archive: one class, which TorchServe loads, and nothing but NumPy and the model's runtime.

It takes, for the model's inputs, by their names:

    {"input_ids": [[…]], …}                             JSON; an array of rows where there is one input
    {"instances": [{"input_ids": […], …}, …]}           KServe v1
    {"inputs": [{"name", "shape", "datatype", "data"}]} KServe v2, its binary tensors too
    an .npz file with an array for each input           as bytes

and answers in kind. What is not valid gets 400 with the reason, alone: the others of its batch are answered.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kpdeploy.runtimes.onnx import load
    from kpdeploy.runtimes.ragged import batches, together

LATENCY = "kpdeploy_handler_seconds"
BATCH = "kpdeploy_batch_rows"
V2 = {
    "BOOL": "bool", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
V2_OF = {dtype: name for name, dtype in V2.items()}
HEADER_LENGTH = "inference-header-content-length"
LARGEST_BYTES = 64 << 20
NPZ = b"PK\x03\x04"


class Handler:
    """What TorchServe loads: the only class of this file."""

    def initialize(self, context: Any) -> None:
        folder = Path(context.system_properties["model_dir"])
        model = json.loads((folder / "model.json").read_text())
        check_digests(folder, model["digests"])
        self.inputs: list[dict[str, Any]] = model["signature"]["inputs"]
        self.outputs: list[dict[str, Any]] = model["signature"]["outputs"]
        self.axes: dict[str, dict[str, Any]] = {axis["name"]: axis for axis in model["signature"]["axes"]}
        self.shapes = ([spec["shape"] for spec in self.inputs], [spec["shape"] for spec in self.outputs])
        self.most: int = model["max_batch_size"]
        self.padded_axes: dict[str, int] = model["padded_axes"]
        self.name, self.version = context.model_name, model["version"]
        settings = settings_here(model["settings"], folder, context.model_yaml_config or {})
        names = {"inputs": model["input_names"], "outputs": model["output_names"]}
        self.run = load(str(folder / model["filename"]), settings=settings, **names)
        self.metric_type = histogram()
        # A first call plans memory and compiles: no client shall wait for that.
        for points in model["warmup"]:
            self.run([np.ones(size, spec["dtype"]) for spec, size in zip(self.inputs, points, strict=True)])

    def handle(self, requests: list[dict[str, Any]], context: Any) -> list[Any]:
        """One answer for each request, in their order."""
        started = time.perf_counter()
        answers: list[Any] = [None] * len(requests)
        asked: dict[int, tuple[list[Any], dict[str, Any]]] = {}
        for index, request in enumerate(requests):
            try:
                form, tensors = read(request, header(context, index, HEADER_LENGTH), self.inputs)
                asked[index] = ([validated(spec, tensors, self.axes, self.most) for spec in self.inputs], form)
                sizes_agree([*zip(self.inputs, asked[index][0], strict=True)], self.axes)
            # Whatever a body makes its parsers raise: it must not fail the others of its batch.
            except Exception as error:
                asked.pop(index, None)
                answers[index] = refused(context, index, 400, said(error))
        members = list(asked)
        arrays = [asked[index][0] for index in members]
        together_here = batches(arrays, self.shapes[0], self.padded_axes, most=self.most) if self.most else None
        for group in together_here or [[i] for i in range(len(members))]:
            self.answer([members[i] for i in group], asked, answers, context)
        self.measure(context, len(requests), time.perf_counter() - started)
        return answers

    def answer(self, members: list[int], asked: Any, answers: list[Any], context: Any) -> None:
        """Fill in the answers to requests that run as one batch; where it fails, each runs alone."""
        try:
            found = together(self.run, [asked[i][0] for i in members], *self.shapes, self.padded_axes)
        except Exception as error:
            if len(members) > 1:
                for index in members:
                    self.answer([index], asked, answers, context)
                return
            logging.exception("a request failed")
            answers[members[0]] = refused(context, members[0], 500, said(error))
            return
        for index, arrays in zip(members, found, strict=True):
            named = [(spec["name"], np.ascontiguousarray(a)) for spec, a in zip(self.outputs, arrays, strict=True)]
            answers[index] = written(context, index, asked[index][1], named, (self.name, self.version))
        self.count(context, sum(len(asked[i][0][0]) if self.most else 1 for i in members))

    def measure(self, context: Any, requests: int, seconds: float) -> None:
        """What the handler took, once for each request that waited for it."""
        for index in range(requests if self.metric_type is not None and context.metrics is not None else 0):
            context.metrics.add_metric(LATENCY, seconds, "seconds", idx=index, metric_type=self.metric_type)

    def count(self, context: Any, rows: int) -> None:
        if self.metric_type is not None and context.metrics is not None:
            context.metrics.add_metric(BATCH, rows, "count", metric_type=self.metric_type)


def histogram() -> Any:
    """TorchServe's own name for the kind; None outside of it."""
    try:
        from ts.metrics.metric_type_enum import MetricTypes  # type: ignore[import-not-found]  # only inside the server
    except ImportError:
        return None
    return MetricTypes.HISTOGRAM


def check_digests(folder: Path, digests: dict[str, str]) -> None:
    """A file that is not the proven one is never loaded: a library would run its code."""
    for name, digest in digests.items():
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise RuntimeError(f"{name} is not the file that was proven: sha256 {found}, not {digest}")


def settings_here(settings: dict[str, Any], folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the proof: libraries by their paths here, and the cores shared among this model's workers."""
    libraries = [str(folder / name) for name in settings.get("op_libraries", ())]
    workers = int(config.get("maxWorkers", 1))
    cores = max(1, len(os.sched_getaffinity(0)) // max(1, workers))
    threads = {"threads": cores} if workers > 1 and not settings.get("threads") else {}
    return {**settings, **threads, "op_libraries": libraries}


def header(context: Any, index: int, name: str) -> str:
    """A header of a request, whatever case it came in; empty where there is none."""
    headers = context.get_all_request_header(index)
    return next((str(v) for k, v in headers.items() if k.lower() == name and isinstance(v, str)), "")


def read(request: dict[str, Any], json_bytes: str, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    """How a request wants its answer, and its tensors by name, as arrays or as JSON has them."""
    body = request.get("body", request.get("data"))
    if isinstance(body, (bytes, bytearray)):
        raw = bytes(body)
        if raw.startswith(NPZ):
            return {"kind": "npz"}, read_npz(raw)
        if json_bytes and not 0 < int(json_bytes) <= len(raw):
            raise ValueError(f"Inference-Header-Content-Length is {json_bytes}, the body has {len(raw)} bytes")
        length = int(json_bytes or len(raw))
        try:
            body = json.loads(raw[:length])
        except ValueError as error:
            raise ValueError(f"the body is neither JSON nor .npz: {error}") from None
        tail = raw[length:]
    else:
        tail = b""
    if isinstance(body, dict) and isinstance(body.get("inputs"), list) and is_v2(body["inputs"]):
        return read_v2(body, tail)
    if isinstance(body, dict) and isinstance(body.get("instances"), list):
        return {"kind": "v1"}, read_v1(body["instances"], inputs)
    if isinstance(body, list) and len(inputs) == 1:
        return {"kind": "json"}, {inputs[0]["name"]: body}
    if not isinstance(body, dict):
        raise ValueError(f"the body must be a JSON object with {', '.join(spec['name'] for spec in inputs)}")
    return {"kind": "json"}, body


def is_v2(inputs: list[Any]) -> bool:
    """Whether they are tensors with names, and not the rows of an input that is called `inputs`."""
    return bool(inputs) and isinstance(inputs[0], dict) and "name" in inputs[0]


def read_npz(raw: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        # A few bytes can be written so that they unpack to more than the memory.
        if sum(entry.file_size for entry in file.infolist()) > LARGEST_BYTES:
            raise ValueError(f"the arrays of the .npz are larger than {LARGEST_BYTES} bytes")
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read_v1(instances: list[Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
    if not instances:
        raise ValueError("instances is empty")
    if len(inputs) == 1 and not isinstance(instances[0], dict):
        return {inputs[0]["name"]: instances}
    if not all(isinstance(row, dict) for row in instances):
        raise ValueError("each of instances must be an object with the model's inputs")
    return {spec["name"]: [row[spec["name"]] for row in instances] for spec in inputs}


def read_v2(body: dict[str, Any], tail: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request of the Open Inference Protocol, with tensors in its JSON or, by the binary extension, after it."""
    tensors, offset = {}, 0
    for entry in body["inputs"]:
        name, shape, dtype = entry["name"], [int(d) for d in entry["shape"]], V2.get(entry["datatype"])
        if dtype is None:
            raise ValueError(f"{name} has the datatype {entry['datatype']!r}, which no input has")
        size = entry.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = typed(name, entry["data"], dtype)
        else:
            data = tail[offset : offset + int(size)]
            offset += int(size)
            if len(data) != int(size) or int(size) % np.dtype(dtype).itemsize:
                raise ValueError(f"{name} has {len(data)} of {size} bytes of binary data")
            values = np.frombuffer(data, dtype)
        if values.size != np.prod(shape, dtype=np.int64) or min(shape, default=0) < 0:
            raise ValueError(f"{name} has {values.size} values, its shape {shape} takes another number")
        tensors[name] = values.reshape(shape)
    asked = body.get("outputs") or ()
    binary = bool(body.get("parameters", {}).get("binary_data_output"))
    wanted = {o["name"]: bool(o.get("parameters", {}).get("binary_data", binary)) for o in asked}
    return {"kind": "v2", "id": body.get("id"), "binary": binary, "outputs": wanted or None}, tensors


def typed(name: str, values: Any, dtype: str) -> Any:
    """Values of JSON as an array of a dtype; what the dtype does not hold is refused."""
    try:
        found = np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths") from None
    wanted = np.dtype(dtype)
    allowed = {"f": "iuf", "b": "b"}.get(wanted.kind, "iu")
    if found.dtype.kind not in allowed and found.size:
        raise ValueError(f"{name} must hold {dtype}")
    if wanted.kind in "iu" and found.size:
        limits = np.iinfo(wanted)
        if int(found.min()) < limits.min or int(found.max()) > limits.max:
            raise ValueError(f"{name} holds a number that {dtype} does not")
    return found.astype(wanted)


def validated(spec: dict[str, Any], tensors: dict[str, Any], axes: dict[str, Any], most: int) -> Any:
    """One input as the model takes it, or ValueError with what is wrong."""
    name, shape = spec["name"], spec["shape"]
    if name not in tensors:
        raise ValueError(f"input {name} is missing")
    value = tensors[name]
    array = value if isinstance(value, np.ndarray) else typed(name, value, spec["dtype"])
    if array.dtype != np.dtype(spec["dtype"]):
        raise ValueError(f"{name} is {array.dtype}, the model takes {spec['dtype']}")
    if array.ndim != len(shape) or any(not isinstance(d, str) and d != n for d, n in zip(shape, array.shape)):  # noqa: B905
        raise ValueError(f"{name} has the shape {list(array.shape)}, the model takes {shape}")
    for axis, size in zip(shape, array.shape, strict=True):
        if isinstance(axis, str) and not axes[axis]["min"] <= size <= axes[axis]["max"]:
            raise ValueError(f"{axis} of {name} is {size}, the model takes {axes[axis]['min']} to {axes[axis]['max']}")
    if most and len(array) > most:
        raise ValueError(f"{name} has {len(array)} rows, at most {most} are taken at once")
    values = spec.get("values") or {}
    low, high = {"range": (values.get("low"), values.get("high")), "prefix_mask": (0, 1)}.get(
        values.get("kind", ""), (None, None)
    )
    if low is not None and array.dtype.kind in "iu" and not (low <= array.min() and array.max() <= high):
        raise ValueError(
            f"{name} holds values from {array.min()} to {array.max()}, the model takes {low:g} to {high:g}"
        )
    return array


def sizes_agree(tensors: list[tuple[dict[str, Any], Any]], axes: dict[str, Any]) -> None:
    found: dict[str, int] = {}
    for spec, array in tensors:
        for axis, size in zip(spec["shape"], array.shape, strict=True):
            if axis in axes and found.setdefault(axis, size) != size:
                raise ValueError(f"{axis} is {found[axis]} in one input and {size} in {spec['name']}")


def written(context: Any, index: int, form: dict[str, Any], named: list[Any], model: tuple[str, Any]) -> Any:
    """An answer in the form that its request has."""
    if form["kind"] == "npz":
        file = io.BytesIO()
        np.savez(file, **dict(named))
        context.set_response_content_type(index, "application/octet-stream")
        return file.getvalue()
    if form["kind"] == "v2":
        return written_v2(context, index, form, named, model)
    context.set_response_content_type(index, "application/json")
    if form["kind"] == "v1":
        single = len(named) == 1
        rows = range(len(named[0][1]))
        found = [named[0][1][r].tolist() if single else {n: a[r].tolist() for n, a in named} for r in rows]
        return json.dumps({"predictions": found}).encode()
    return json.dumps({name: array.tolist() for name, array in named}).encode()


def written_v2(context: Any, index: int, form: dict[str, Any], named: list[Any], model: tuple[str, Any]) -> bytes:
    wanted = form["outputs"] or {name: form["binary"] for name, _ in named}
    if unknown := set(wanted) - {name for name, _ in named}:
        return refused(context, index, 400, f"the model has no output {min(unknown)!r}")
    outputs, tail = [], []
    for name, array in named:
        if name not in wanted:
            continue
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": V2_OF[str(array.dtype)]}
        if wanted[name]:
            tail.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = array.reshape(-1).tolist()
        outputs.append(entry)
    answer = {"model_name": model[0], "model_version": str(model[1]), "outputs": outputs}
    text = json.dumps({**answer, "id": form["id"]} if form["id"] is not None else answer).encode()
    if tail:
        context.set_response_header(index, "Inference-Header-Content-Length", str(len(text)))
        context.set_response_content_type(index, "application/octet-stream")
    else:
        context.set_response_content_type(index, "application/json")
    return b"".join((text, *tail))


def refused(context: Any, index: int, code: int, reason: str) -> bytes:
    context.set_response_status(code=code, phrase="Bad Request" if code == 400 else "Internal Server Error", idx=index)
    context.set_response_content_type(index, "application/json")
    return json.dumps({"code": code, "error": reason}).encode()


def said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
