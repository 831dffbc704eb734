"""ONNX, through torch.onnx's dynamo exporter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpdeploy.errors import ExportFailed
from kpdeploy.export import custom_ops, joined_attention
from kpdeploy.ops.op import OPSET

if TYPE_CHECKING:
    import torch

    from kpdeploy.export.capture import Capture

INLINE_BYTES = 16_000_000
"""Larger weights go to a file beside the graph: a protobuf holds 2 GB at most, costs several copies of its contents
to write and to read, and cannot be mapped into memory."""


def export(capture: Capture, folder: Path, program: torch.export.ExportedProgram | None = None) -> None:
    """Write model.onnx (and model.onnx.data for large weights) into `folder`: of `program`, a rewritten form of the
    capture's, or of the capture as it is.

    Raises:
        ExportFailed: the exporter refused, or an ONNX file keeps its weights elsewhere.
    """
    if program is None and capture.model.kind == "onnx":
        assert capture.model.path is not None
        _copy(capture.model.path, folder)
        return
    target = folder / "model.onnx"
    if program is None and "onnx_file" in capture.__dict__:
        for file in capture.onnx_file.parent.iterdir():
            (folder / file.name).hardlink_to(file)
        return
    from kpdeploy.export.capture import quiet, reason

    try:
        with quiet(), _laid_out(program or capture.widened) as source:
            import torch

            made = torch.onnx.export(
                source,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=dict(custom_ops.translations()),
                verbose=False,
            )
        assert made is not None
        joined_attention.join(made.model.graph)
        custom_ops.define(made.model)
        _attend_nothing_where_all_is_masked(made.model.graph)
        _name_tensors(made.model, capture)
        _forget_sources(made.model.graph)
        weights = [v.const_value for v in made.model.graph.initializers.values() if v.const_value is not None]
        large = sum(tensor.nbytes for tensor in weights) > INLINE_BYTES
        made.save(str(target), external_data=large)
    except ExportFailed:
        raise
    except Exception as error:
        raise ExportFailed(
            f"{capture.model.name} cannot be written as ONNX",
            why=reason(error.__cause__ or error),
            next_step="try another format: --format openvino, torchscript or pt2",
        ) from None


@contextmanager
def _laid_out(program: torch.export.ExportedProgram) -> Iterator[torch.export.ExportedProgram]:
    """The program with a copy after each attention, until the context ends.

    The exporter runs the graph in several passes, in which attention's result has different strides: a view that was
    right in one is refused in the next. The copies become Identity, and go.
    """
    import torch

    added = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            with program.graph.inserting_after(node):
                kept = {"memory_format": torch.contiguous_format}
                copy = program.graph.call_function(torch.ops.aten.clone.default, (node,), kept)
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
            added.append((node, copy))
    try:
        yield program
    finally:
        for node, copy in added:
            copy.replace_all_uses_with(node)
            program.graph.erase_node(copy)


def _copy(path: Path, folder: Path) -> None:
    """Copy an ONNX model with its external data, which it names relative to itself."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    shutil.copyfile(path, folder / "model.onnx")
    names = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    for name in names:
        if Path(name).name != name:
            raise ExportFailed(f"{path} keeps its weights outside its own folder", why=f"location {name!r}")
        shutil.copyfile(path.parent / name, folder / name)


def _attend_nothing_where_all_is_masked(graph: Any) -> None:
    """Make attention with a boolean mask give zeros for a query that may look at nothing, as PyTorch does.

    The exporter masks with the lowest finite number, whose softmax over such a row is uniform, and then looks for
    NaN, which never comes: `Where(IsNaN(weights), 0, weights)`. This becomes `weights * mask` (a Where would do too,
    but OpenVINO's compiler fails on it).
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Where" or _maker(node.inputs[0]) != "IsNaN":
            continue
        weights = node.inputs[2]
        if _maker(weights) != "Softmax" or _maker(weights.producer().inputs[0]) != "Add":
            continue
        masks = [v.producer() for v in weights.producer().inputs[0].producer().inputs if _maker(v) == "Where"]
        if len(masks) == 1:
            cast = ir.node("CastLike", [masks[0].inputs[0], weights])
            kept = ir.node("Mul", [weights, cast.outputs[0]])
            kept.outputs[0].dtype, kept.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
            graph.insert_before(node, [cast, kept])
            ir.convenience.replace_all_uses_with(node.outputs[0], kept.outputs[0])
            graph.remove(node, safe=True)


def _maker(value: Any) -> str:
    """The operator that makes a value; empty for inputs and weights."""
    node = value.producer() if value is not None else None
    return "" if node is None else str(node.op_type)


def _forget_sources(graph: Any) -> None:
    """Drop each node's Python stack trace: the paths of whoever exported are nobody else's business."""
    import onnx_ir as ir

    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _name_tensors(model: Any, capture: Capture) -> None:
    """Give inputs, outputs and axes the signature's names, moving other values that hold one of them."""
    import onnx_ir as ir

    graph, signature = model.graph, capture.signature
    wanted = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    values = {output for node in ir.traversal.RecursiveGraphIterator(graph) for output in node.outputs}
    for value in (*graph.inputs, *graph.initializers.values(), *values):
        if value.name in wanted:
            value.name = f"{value.name}__inner"
    for value, spec in zip(graph.inputs, signature.inputs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(spec.shape)
    taken: set[Any] = set(graph.inputs) | set(graph.initializers.values())
    for index, spec in enumerate(signature.outputs):
        value = graph.outputs[index]
        if value in taken:  # one value under two names, or an input passed through
            node = ir.node("Identity", [value])
            graph.append(node)
            value = node.outputs[0]
            value.dtype, value.type = graph.outputs[index].dtype, graph.outputs[index].type
            graph.outputs[index] = value
        taken.add(value)
        value.name = spec.name
        value.shape = ir.Shape([d if d != -1 else f"{spec.name}_{i}" for i, d in enumerate(spec.shape)])
