"""Products in 8 bits: weights scaled by row, activations by what calibration saw; layers that cost too much stay.

Source of the scheme: static per-tensor scales of activations and per-row scales of weights in e4m3, as in Micikevicius
et al., FP8 Formats for Deep Learning (2022). The choice of layers is by measured error, each alone, then all together.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import Tensors
from kpdeploy.ops import NAMESPACE
from kpdeploy.ops.fp8_quantize import LARGEST
from kpdeploy.optimize.graph import aten, insert, is_call, name_of, parameter, sweep, take

ops = torch.ops.kpdeploy

E4M3 = torch.float8_e4m3fn

Outputs = Sequence[torch.Tensor]

PRODUCTS = {f"{NAMESPACE}::linear_activation": 1, f"{NAMESPACE}::gated_linear": 2}
"""Products, and how many weights of each follow its input."""

MULTIPLE = 16
"""Rows and columns of a weight that the kernels take."""

MARGIN = 0.8
"""Of the budget that 8 bits may use, for the samples are few and the rest of the graph rounds too."""

JUDGED = 4
"""So many samples judge each layer alone."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One product: its node, the name of its weight (of a gated one, of both), the scale of its input, and what it
    costs alone, as error of the outputs. `kept`: it stays in 16 bits."""

    node: Node
    name: str
    scale: float
    error: float
    kept: bool = False


def largest(module: GraphModule, samples: Sequence[Tensors]) -> dict[Node, float]:
    """The largest magnitude in the input of each product, over all samples."""
    looking = _Simulated(module, {})
    for tensors in _tensors(module, samples):
        looking.run(*tensors)
    return looking.largest


def lower(
    module: GraphModule, samples: Sequence[Tensors], budget: float, largest: Mapping[Node, float]
) -> tuple[tuple[Decision, ...], tuple[Layer, ...]]:
    """Rewrite the products of a module in place, as many as hold the budget; what was decided, and every layer.

    `samples`: inputs of the module, by name in the order of its inputs. `largest`: what the scales are for.

    Raises:
        ExportFailed: not one product fits.
    """
    inputs = _tensors(module, samples)
    layers, plain = _judged(module, inputs, largest)
    if not layers:
        raise ExportFailed("there is no product to compute in 8 bits", why="its sizes are no multiples of 16")
    chosen, error = _chosen(module, inputs, plain, layers, budget * MARGIN)
    if not chosen:
        worst = max(layer.error for layer in layers)
        raise ExportFailed(
            "no product can be computed in 8 bits within the budget",
            why=f"each alone costs an error of up to {worst:.1e}, at most {budget:.0e} was asked for",
        )
    _rewrite(module, chosen)
    what = f"fp8 in {len(chosen)} of {len(layers)} products"
    detail = f"scales from {len(samples)} samples, on which it costs an error of {error:.1e}"
    left = sorted((layer for layer in layers if layer not in chosen), key=lambda layer: -layer.error)
    named = ", ".join(f"{layer.name} {layer.error:.1e}" for layer in left[:3])
    why = f"the budget does not hold them; the errors of the worst alone: {named}"
    told = [Skipped(what=f"fp8 in {len(left)} products", reason=why)] if left else []
    judged = tuple(replace(layer, kept=layer in left) for layer in layers)
    return (Applied(what=what, detail=detail), *told), judged


def _tensors(module: GraphModule, samples: Sequence[Tensors]) -> list[list[torch.Tensor]]:
    device = next(module.parameters()).device
    return [[torch.from_numpy(a).to(device) for a in sample.values()] for sample in samples]


# Judging: what each product costs.


def _products(module: GraphModule) -> list[Node]:
    """The products that have a form in 8 bits."""
    return [node for node in module.graph.nodes if name_of(node) in PRODUCTS and all(map(_fits, _weights(node)))]


def _weights(node: Node) -> tuple[Any, ...]:
    return node.args[1 : 1 + PRODUCTS[name_of(node)]]


def _fits(weight: Any) -> bool:
    sizes = weight.meta["val"].shape
    return weight.op == "get_attr" and all(size % MULTIPLE == 0 for size in sizes)


class _Simulated(Interpreter):
    """Runs the module with some of its products rounded to 8 bits, or looks for the largest input of each."""

    def __init__(self, module: GraphModule, scales: Mapping[Node, float], rounded: Collection[Node] = ()) -> None:
        super().__init__(module)
        self.scales = scales
        self.rounded = rounded
        self.largest: dict[Node, float] = {}

    def run_node(self, n: Node) -> Any:
        if (count := PRODUCTS.get(name_of(n), 0)) > 0:
            x, *rest = self.fetch_args_kwargs_from_env(n)[0]
            if n in self.rounded:
                x = _rounded(x, self.scales[n])
                rest[:count] = [_rounded(weight, weight_scales(weight)[:, None]) for weight in rest[:count]]
            elif n not in self.scales:
                self.largest[n] = max(self.largest.get(n, 0), float(x.abs().amax()) if x.numel() else 0.0)
            return n.target(x, *rest)  # type: ignore[operator]
        return super().run_node(n)


def _in_8_bits(value: torch.Tensor, scale: Any) -> torch.Tensor:
    eight: torch.Tensor = (value.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3)
    return eight


def _rounded(value: torch.Tensor, scale: Any) -> torch.Tensor:
    rounded: torch.Tensor = _in_8_bits(value, scale).float() * scale
    return rounded.to(value.dtype)


def weight_scales(weight: torch.Tensor) -> torch.Tensor:
    """float32 [N]: what 1 stands for in each row of a weight [N, K]."""
    return (weight.float().abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)


def _judged(
    module: GraphModule, inputs: Sequence[Sequence[torch.Tensor]], largest: Mapping[Node, float]
) -> tuple[list[Layer], list[Outputs]]:
    """Each product, judged alone; and what the module gives with none rounded."""
    nodes = _products(module)
    scales = {node: max(largest.get(node, 0.0), 1e-6) / LARGEST for node in nodes}
    plain = [Interpreter(module).run(*tensors) for tensors in inputs]
    few = range(min(JUDGED, len(inputs)))
    found = []
    for node in nodes:
        run = _Simulated(module, scales, {node})
        error = max(_error(run.run(*inputs[i]), plain[i]) for i in few)
        name = " + ".join(str(weight.target) for weight in _weights(node))
        found.append(Layer(node=node, name=name, scale=scales[node], error=error))
    return found, plain


def _error(outputs: Outputs, expected: Outputs) -> float:
    """The largest ‖out − ref‖ / ‖ref‖ of the outputs; infinite where one is not finite."""
    pairs = [(a.double(), b.double()) for a, b in zip(outputs, expected, strict=True) if b.is_floating_point()]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def _chosen(
    module: GraphModule,
    inputs: Sequence[Sequence[torch.Tensor]],
    plain: Sequence[Outputs],
    layers: Sequence[Layer],
    budget: float,
) -> tuple[list[Layer], float]:
    """As many of the layers as hold the budget together, those that cost least first; and what they cost."""
    order = sorted(layers, key=lambda layer: layer.error)
    scales = {layer.node: layer.scale for layer in layers}

    def cost(count: int) -> float:
        run = _Simulated(module, scales, {layer.node for layer in order[:count]})
        return max(_error(run.run(*tensors), expected) for tensors, expected in zip(inputs, plain, strict=True))

    low, high, error = 0, len(order) + 1, 0.0
    while high - low > 1:
        # Usually all of them hold: that is asked first.
        middle = len(order) if high > len(order) else (low + high) // 2
        found = cost(middle)
        low, high, error = (middle, high, found) if found <= budget else (low, middle, error)
    return order[:low], error


# Rewriting.

NORMS = {f"{NAMESPACE}::{name}": f"fp8_{name}" for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")}
"""Norms, and the form of each that gives its result in 8 bits, too."""


def _rewrite(module: GraphModule, chosen: Sequence[Layer]) -> None:
    by_node = {layer.node: layer for layer in chosen}
    inputs: dict[Node, Node] = {}
    for node in list(module.graph.nodes):
        if node in by_node:
            _rewrite_one(module, by_node[node], by_node, inputs)
    sweep(module)


def _rewrite_one(module: GraphModule, layer: Layer, chosen: Mapping[Node, Layer], inputs: dict[Node, Node]) -> None:
    node = layer.node
    weights, scales = _weights_in_8_bits(module, node)
    rest = node.args[1 + len(weights) :]
    source = _uncast(node.args[0])
    if source not in inputs:
        inputs[source] = _quantized(module, source, node, layer.scale, chosen)
    # A product whose result only products in 8 bits read gives it to them so.
    reader = _reader(node, chosen)
    out_scale = _scale(module, node, reader.scale) if reader else None
    given = (inputs[source], *weights, _scale(module, node, layer.scale), *scales)
    if rest:  # a bias and an activation
        made = insert(node, ops.fp8_linear_activation.default, (*given, rest[0], out_scale, rest[1]), node)
    else:
        made = insert(node, ops.fp8_gated_linear.default, (*given, out_scale), node)
    node.replace_all_uses_with(made)
    if out_scale is not None:
        inputs[made] = made


def _reader(node: Node, chosen: Mapping[Node, Layer]) -> Layer | None:
    """A product in 8 bits that reads a result, where nothing else does but others of its kind."""
    readers = [chosen.get(user) for user in node.users]
    straight = all(reader is not None and reader.node.args[0] is node for reader in readers)
    return readers[0] if straight and readers else None


def _weights_in_8_bits(module: GraphModule, node: Node) -> tuple[list[Node], list[Node]]:
    """The weights of a product, and the scales of their rows."""
    held = [parameter(module, weight) for weight in _weights(node)]
    plain = [tensor.detach() for tensor in held if tensor is not None]  # all are: _fits
    rows = [weight_scales(weight) for weight in plain]
    eight = [_in_8_bits(weight, scale[:, None]) for weight, scale in zip(plain, rows, strict=True)]
    return [_constant(module, node, t) for t in eight], [_constant(module, node, t) for t in rows]


def _uncast(value: Any) -> Node:
    """The value before a cast to the dtype that the product wanted."""
    node: Node = value
    while is_call(node, aten.to.dtype):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _quantized(module: GraphModule, source: Node, before: Node, scale: float, chosen: Mapping[Node, Layer]) -> Node:
    """The 8-bit form of a product's input: by the norm that made it, or by the attention where it is all that is read
    of it; else by a pass of its own."""
    if is_call(source, ops.attention.default) and _reader(source, chosen):
        return insert(source, ops.attention_fp8.default, (*source.args, _scale(module, source, scale)), source)
    alone = name_of(source) in NORMS
    first = source.target is operator.getitem and source.args[1] == 0
    maker: Any = source.args[0] if first else source
    if name_of(maker) not in NORMS:
        return insert(before, ops.fp8_quantize.default, (source, _scale(module, before, scale)), source)
    target = getattr(ops, NORMS[name_of(maker)]).default
    made = insert(maker, target, (*maker.args, _scale(module, maker, scale)))
    if alone:
        maker.replace_all_uses_with(take(maker, made, 0, maker))
    else:
        for user in list(maker.users):
            user.replace_input_with(maker, made)
    return take(before, made, 1 if alone else 2, source)


def _scale(module: GraphModule, before: Node, scale: float) -> Node:
    return _constant(module, before, torch.tensor([scale], dtype=torch.float32))


def _constant(module: GraphModule, before: Node, value: torch.Tensor) -> Node:
    """A tensor that the module holds from now on, as a node."""
    name = f"fp8_{sum(1 for _ in module.buffers())}"
    module.register_buffer(name, value.to(next(module.parameters()).device))
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(name)
    node.meta["val"] = value
    return node
