"""int8 of an OpenVINO IR by NNCF: scales from calibration data, and layers left out until the error fits the budget."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.compare import relative_error
from kpdeploy.decision import Applied, Decision
from kpdeploy.errors import ExportFailed
from kpdeploy.inputs import Array, Tensors

HELD_OUT = 4
"""One sample in so many is not calibrated on: on these the error is measured."""


def quantize(source: Path, folder: Path, samples: Sequence[Tensors], *, budget: float) -> Decision:
    """Write `source` (model.xml) into `folder` with int8 weights and activations.

    `samples` are requests by input name, valid for the model; a quarter of them judges the result. Layers whose
    quantization costs most are left in float until the worst error ‖out − ref‖ / ‖ref‖ of these is within `budget`.

    Raises:
        ExportFailed: NNCF cannot quantize it.
    """
    import openvino

    from kpdeploy.export.capture import quiet, reason

    nncf = _import_nncf()
    model = openvino.Core().read_model(source)
    judges, learned = list(samples[::HELD_OUT]), [s for i, s in enumerate(samples) if i % HELD_OUT] or list(samples)
    exact = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    wanted = dict(zip(map(id, judges), _answers(exact, judges), strict=True))
    attends = any(op.get_type_name() in ("Softmax", "ScaledDotProductAttention") for op in model.get_ops())

    def accuracy(compiled: Any, data: Iterable[Tensors]) -> tuple[float, list[float]]:
        picked = list(data)
        errors = [_worst(out, wanted[id(s)]) for out, s in zip(_answers(compiled, picked), picked, strict=True)]
        return 1 - max(errors), [1 - error for error in errors]

    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        # Its progress bars go to stdout, which is for the report.
        with quiet(), redirect_stdout(io.StringIO()):
            made = nncf.quantize_with_accuracy_control(
                model,
                nncf.Dataset(learned),
                nncf.Dataset(judges),
                accuracy,
                max_drop=budget,
                drop_type=nncf.DropType.ABSOLUTE,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(learned),
                model_type=nncf.ModelType.TRANSFORMER if attends else None,
            )
            openvino.save_model(made, str(folder / source.name), compress_to_fp16=False)
    except Exception as error:
        raise ExportFailed(
            "the model cannot be quantized to int8", why=reason(error), next_step="export it at a lower --level"
        ) from None
    kept = sum(op.get_type_name() == "FakeQuantize" for op in made.get_ops())
    if not kept:
        raise ExportFailed(
            f"no layer can be int8 within an error of {budget:g}",
            why=f"on {len(judges)} samples that it was not calibrated on",
            next_step="allow more with --accuracy-budget, or give real samples with --calibrate",
        )
    detail = f"{kept} quantized tensors, scales from {len(learned)} samples, judged on {len(judges)} others"
    return Applied(what="int8 by NNCF", detail=detail)


def _import_nncf() -> Any:
    """NNCF, without the news of every use that it sends to its maker, except in CI."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        import nncf
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
    return nncf


def _answers(compiled: Any, samples: Sequence[Tensors]) -> list[list[Array]]:
    request = compiled.create_infer_request()
    return [[np.array(value) for value in request.infer(dict(sample)).values()] for sample in samples]


def _worst(out: Sequence[Array], ref: Sequence[Array]) -> float:
    return max(min(1.0, relative_error(a, b)) for a, b in zip(out, ref, strict=True))
