"""int8 of an OpenVINO IR: scales by NNCF from calibration data, and layers that err most left in float until the error
at the output fits the budget.

NNCF's own accuracy control reverts one operation after the other and judges the whole model after each: hours for a
model of a hundred layers. Here each layer's own error is measured first, all in one pass, and the number of layers to
leave out is found by bisection: a judgement of the model for each doubling.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.artifact import LayerError
from kpdeploy.compare import Budget
from kpdeploy.decision import Applied, Decision
from kpdeploy.errors import ExportFailed, KpdeployError
from kpdeploy.inputs import Array, Tensors

HELD_OUT = 4
"""One sample in so many is not calibrated on: on these the error is measured."""

SMOOTHING = (0.75, None)
"""SmoothQuant's alpha: how much of the range of activations moves into the weights (arXiv 2211.10438; NNCF's own 0.95
left MiniLM an error of 0.27 where 0.75 leaves 0.16). None: nothing moves, which is tried where the first is not within
the budget, and alone of models without attention, whose activations have not the outliers that it is for."""

APART = 8
"""Layers whose errors are measured in one pass are so many apart: a block of a transformer has as many products."""

OWN_SAMPLES = 4
"""A layer's own error differs little from sample to sample: it only has to give an order."""

LAYERS = ("MatMul", "Convolution", "GroupConvolution")


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What became of a model: the decision for the report, each layer's error, and the distance at the output."""

    decision: Decision
    layers: tuple[LayerError, ...]
    distance: float


def quantize(
    source: Path,
    folder: Path,
    samples: Sequence[Tensors],
    *,
    budget: Budget,
    scheme: str = "static",
    precision: str = "f32",
    activation_group: int = 0,
) -> Quantized:
    """Write `source` (model.xml) into `folder` with int8 weights, a scale each channel, by one of SCHEMES.

    `samples` are requests by input name, valid for the model; a quarter of them judges the result, by `budget`. What
    is not int8 computes in `precision`, here and when it is judged; `activation_group` is the runtime's setting.

    Raises:
        ExportFailed: NNCF cannot quantize it, or no layer can be int8 within the budget.
    """
    from kpdeploy.export.capture import quiet, reason

    judges, learned = list(samples[::HELD_OUT]), [s for i, s in enumerate(samples) if i % HELD_OUT] or list(samples)
    judge = _Judge(source, judges, budget, precision, activation_group)
    try:
        # NNCF's progress bars go to stdout, which is for the report.
        with quiet(), redirect_stdout(io.StringIO()):
            distances, best, model = _best(SCHEMES[scheme](source, learned), judge)
            layers = _layers(model, source)
            errors = _own_errors(model, layers, judge)
            left, distance = _left_out(model, layers, errors, judge, distances[best])
            _save(model, folder / source.name)
    except KpdeployError:
        raise
    except Exception as error:
        raise ExportFailed(
            "the model cannot be quantized to int8", why=reason(error), next_step="export it at a lower --level"
        ) from None
    found = tuple(
        LayerError(name=layer.name, error=round(error, 6), precision=precision if layer in left else "int8")
        for layer, error in zip(layers, errors, strict=True)
    )
    whole = ", ".join(f"{off:.1e} {how}" for how, off in distances.items())
    detail = (
        f"{len(layers) - len(left)} of {len(layers)} layers, {best}; {budget.metric} off by {distance:.1e} (all: "
        f"{whole}) on {len(judges)} samples apart from the {len(learned)} that scales were found with"
    )
    return Quantized(decision=Applied(what="int8 by NNCF", detail=detail), layers=found, distance=distance)


def _best(made: Iterable[tuple[str, Any]], judge: _Judge) -> tuple[dict[str, float], str, Any]:
    """The distance of each model by how it was made, as far as the first within the budget; and the best of them."""
    distances: dict[str, float] = {}
    best: tuple[str, Any] = ("", None)
    for how, model in made:
        distances[how] = judge.distance(model)
        if distances[how] <= min(distances.values()):
            best = (how, model)
        if distances[how] <= judge.budget.bound:
            break
    return distances, *best


class _Judge:
    """How far a model's answers to the judging samples are from the float32 model's."""

    def __init__(
        self, source: Path, samples: Sequence[Tensors], budget: Budget, precision: str, activation_group: int
    ) -> None:
        self.samples, self.budget, self.precision, self.group = samples, budget, precision, activation_group
        self.wanted = _answers(_compiled(_read(source), "f32", 0), samples)

    def distance(self, model: Any) -> float:
        found = _answers(_compiled(model, self.precision, self.group), self.samples)
        return self.budget.of_all([self.budget.distance(o, r) for o, r in zip(found, self.wanted, strict=True)])


# Schemes


def _static(source: Path, samples: Sequence[Tensors]) -> Iterator[tuple[str, Any]]:
    """Weights and activations with fixed scales."""
    attends = any(op.get_type_name() in ("Softmax", "ScaledDotProductAttention") for op in _read(source).get_ops())
    for alpha in SMOOTHING if attends else (None,):
        how = f"with SmoothQuant {alpha}" if alpha else "without SmoothQuant"
        yield how, _with_fixed_scales(source, samples, alpha, attends=attends)


def _with_fixed_scales(source: Path, samples: Sequence[Tensors], alpha: float | None, *, attends: bool) -> Any:
    nncf = _import_nncf()
    return nncf.quantize(
        _read(source),
        nncf.Dataset(list(samples)),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if attends else None,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1 if alpha is None else alpha),
            # A corrected bias would be wrong for a layer that goes back to float, and corrects nothing measurable.
            disable_bias_correction=True,
            # Halved weights keep older processors from overflow; level 3 asks for those that have no need of it.
            overflow_fix=nncf.OverflowFix.DISABLE,
            # The range of all samples: NNCF's mean of each sample's range cuts off what makes outliers.
            activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX,
        ),
    )


def _dynamic(source: Path, samples: Sequence[Tensors]) -> Iterator[tuple[str, Any]]:
    """Weights with fixed scales; the runtime finds those of activations, which then need no samples."""
    nncf = _import_nncf()
    made = nncf.compress_weights(_read(source), mode=nncf.CompressWeightsMode.INT8_ASYM)
    yield "activations scaled at run time", made


SCHEMES: Mapping[str, Callable[[Path, Sequence[Tensors]], Iterator[tuple[str, Any]]]] = {
    "static": _static,
    "dynamic": _dynamic,
}
"""How a model is quantized: the models to try, each with how it was made."""


def _import_nncf() -> Any:
    """NNCF, without the news of every use that it sends to its maker, except in CI."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        import nncf
        import nncf.quantization.range_estimator
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


# Layers


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    """A quantized operation in the graph, and its twin on the same inputs before they are rounded."""

    name: str
    node: Any
    twin: Any


def _layers(model: Any, source: Path) -> list[_Layer]:
    """The operations that have rounded inputs, in the graph's order, each with a twin that nothing uses yet."""
    from openvino.utils.node_factory import NodeFactory

    originals = {op.get_friendly_name(): op for op in _read(source).get_ops()}
    found = []
    for node in model.get_ordered_ops():
        original = originals.get(node.get_friendly_name())
        if node.get_type_name() not in LAYERS or original is None:
            continue
        exact = [_exact(node, index, original) for index in range(2)]
        if any(port is not None for port in exact):
            ports = [node.input_value(i) if port is None else port for i, port in enumerate(exact)]
            # All of LAYERS are of the first opset.
            twin = NodeFactory("opset1").create(node.get_type_name(), ports, node.get_attributes())
            found.append(_Layer(name=_name(node), node=node, twin=twin))
    return found


def _exact(node: Any, index: int, original: Any) -> Any:
    """What an input of a node was before it was rounded: the original's weights, or the activation ahead of its
    FakeQuantize (and of SmoothQuant's scale, where the weights have their part of it). None: it is not rounded."""
    import openvino.opset13 as ov

    ahead = node.input_value(index).get_node()
    weights = _constant(original.input_value(index).get_node())
    if weights is not None:
        return ov.constant(weights).output(0) if _constant(ahead) is None else None
    if ahead.get_type_name() != "FakeQuantize":
        return None
    plain = ahead.input_value(0)
    if "smooth_quant" in plain.get_node().get_friendly_name():
        plain = plain.get_node().input_value(0)
    return plain


def _constant(node: Any) -> Array | None:
    """The value of a constant, through a conversion; None for what is computed."""
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    found: Array = np.array(node.get_data(), dtype=np.float32)
    return found


def _name(node: Any) -> str:
    """The module that a layer was, by the name of its bias, or as the graph has it."""
    for use in node.output(0).get_target_inputs():
        if use.get_node().get_type_name() == "Add":
            for value in use.get_node().input_values():
                name = str(value.get_node().get_friendly_name())
                if name.endswith(".bias"):
                    return name.removeprefix("module.").removesuffix(".bias")
    return str(node.get_friendly_name())


def _own_errors(model: Any, layers: Sequence[_Layer], judge: _Judge) -> list[float]:
    """‖out − twin‖ / ‖twin‖ of each layer over some samples: in APART passes, for OpenVINO (2026.4) gives wrong
    values of some layers when all of a block's are outputs."""
    found: dict[_Layer, float] = {}
    for first in range(APART):
        some = layers[first::APART]
        found.update(zip(some, _errors_of(model, some, judge), strict=True))
    return [found[layer] for layer in layers]


def _errors_of(model: Any, layers: Sequence[_Layer], judge: _Judge) -> list[float]:
    """The same, in one pass with all of these as outputs."""
    outputs = [port for layer in layers for port in (layer.node.output(0), layer.twin.output(0))]
    if not outputs:
        return []
    results = model.add_outputs(outputs)
    try:
        compiled = _compiled(model, "f32", judge.group)
        ports = compiled.outputs[-len(outputs) :]
        squares = np.zeros((len(layers), 2))
        request = compiled.create_infer_request()
        for sample in judge.samples[:OWN_SAMPLES]:
            answer = request.infer(dict(sample))
            for index in range(len(layers)):
                out, ref = (answer[ports[2 * index + side]].astype(np.float64) for side in (0, 1))
                squares[index] += ((out - ref) ** 2).sum(), (ref**2).sum()
    finally:
        for result in results:
            model.remove_result(result.get_node())
    return [float(np.sqrt(off / whole)) if whole else 0.0 for off, whole in squares]


def _left_out(
    model: Any, layers: Sequence[_Layer], errors: Sequence[float], judge: _Judge, distance: float
) -> tuple[list[_Layer], float]:
    """Put the fewest layers back to float that bring the model from `distance` within the budget, those with the
    largest errors first: which, and the distance then. Twice as many each time, then by bisection.

    Raises:
        ExportFailed: all would have to go.
    """
    order = [layer for layer, _ in sorted(zip(layers, errors, strict=True), key=lambda pair: -pair[1])]
    known, out = {0: distance}, 0

    def put_back(count: int) -> bool:
        nonlocal out
        for layer in order[out:count]:
            _swap(layer.node, layer.twin)
        for layer in order[count:out]:
            _swap(layer.twin, layer.node)
        out = count
        if count not in known:
            known[count] = judge.distance(model)
        return known[count] <= judge.budget.bound

    low, high = -1, 0
    while high < len(order) and not put_back(high):
        low, high = high, max(1, 2 * high)
    if high >= len(order):
        raise ExportFailed(
            f"no layer can be int8 within {judge.budget}",
            why=f"on {len(judge.samples)} samples apart from those that gave scales; with all but {low} of "
            f"{len(order)} layers it is off by {known[low]:.2e}",
            next_step="allow more with --accuracy-budget, or give real samples with --calibrate",
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if put_back(middle) else (middle, high)
    put_back(high)
    return order[:high], known[high]


def _swap(before: Any, after: Any) -> None:
    """Let all that reads `before` read `after`."""
    for use in list(before.output(0).get_target_inputs()):
        use.replace_source_output(after.output(0))


# OpenVINO


def _read(source: Path) -> Any:
    import openvino

    return openvino.Core().read_model(source)


def _compiled(model: Any, precision: str, activation_group: int) -> Any:
    import openvino

    config = {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(activation_group)}
    return openvino.Core().compile_model(model, "CPU", config)


def _save(model: Any, path: Path) -> None:
    import openvino

    openvino.save_model(model, str(path), compress_to_fp16=False)


def _answers(compiled: Any, samples: Sequence[Tensors]) -> list[list[Array]]:
    request = compiled.create_infer_request()
    return [[np.array(value) for value in request.infer(dict(sample)).values()] for sample in samples]
