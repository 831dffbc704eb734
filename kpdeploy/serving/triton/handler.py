"""A handler: a model of Triton's python backend that does for another one what its stock TorchServe handler did.

    REPO/<model>_image   files in, labels and probabilities out: image_classifier
    REPO/<model>_text    texts in, labels and probabilities out: text_classifier

It is a model of the repository like any other: versioned, with digests, golden requests and a manifest of the format
`handler`. Its server's Python needs NumPy and what `packages` in its settings names.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.artifact import Manifest
from kpdeploy.baseline import WINDOWS, Baseline, Exchange, Windows
from kpdeploy.errors import OutputUnusable, PackageMissing
from kpdeploy.inputs import Array, of_bytes
from kpdeploy.serving.triton.config import HANDLER_FORMAT
from kpdeploy.serving.triton.launch import REQUIREMENTS
from kpdeploy.signature import BYTES, Axis, Signature, TensorSpec

TOP = 5
"""How many classes the stock image_classifier answers with."""
MOST_TEXTS = 8
CLEAR = 1e-3
"""Golden labels are those of probabilities that differ by more than this share: others change places by rounding."""

Answer = Callable[[Array], Array]
"""The unmodified model: the scores [rows, classes] of a batch."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of TorchServe's stock handlers: what its models are called here, their input, and the packages they need."""

    name: str
    suffix: str
    packages: tuple[str, ...] = ()


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="image_classifier", suffix="image", packages=("pillow",)),
        Kind(name="text_classifier", suffix="text"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The id of each token, and that of all others; None where they have none."""

    ids: Mapping[str, int]
    unknown: int | None


def settings_of(
    kind: Kind, model: Manifest, *, labels: Sequence[str], vocabulary: Vocabulary | None = None
) -> dict[str, Any]:
    """handler.json: what the handler knows of the model behind it.

    Raises:
        OutputUnusable: the model does not give a row of scores for each input.
    """
    (taken, *more), (given, *_) = model.signature.inputs, model.signature.outputs
    classes = given.shape[-1]
    if more or len(given.shape) != 2 or not isinstance(classes, int) or classes < 1:
        raise OutputUnusable(
            f"{model.model} is no classifier: it takes {taken}, and gives {given}",
            why=f"its handler is {kind.name}, which answers with the classes of one row of scores",
            next_step="send it tensors",
        )
    found = {
        "input": kind.suffix,
        "model": model.model,
        "model_input": model.input_names[0],
        "model_output": model.output_names[0],
        "rows": max(1, model.max_batch_size),
        "labels": list(labels),
        "top": min(TOP, classes) if kind.name == "image_classifier" else classes,
    }
    if vocabulary is not None:
        axis = taken.shape[0]
        most = model.signature.axis(axis).max if isinstance(axis, str) else axis
        found |= {"vocabulary": dict(vocabulary.ids), "unknown": vocabulary.unknown, "most": most}
    return found


def write_handler(
    kind: Kind, model: Manifest, settings: Mapping[str, Any], bodies: Iterable[bytes], answer: Answer, files: Path
) -> Manifest:
    """Write a model's handler into the empty folder `files`, as `publish` takes it, with these golden requests.

    Raises:
        PackageMissing: what it needs is not installed here.
    """
    handler = _handler(kind, settings)
    exchanges = tuple(_exchange(handler, settings, answer, body) for body in bodies)
    folder = Path(__file__).parent
    shutil.copyfile(folder / "handler_model.py", files / "model.py")
    shutil.copyfile(folder / f"{kind.name}.py", files / "handler.py")
    (files / "handler.json").write_text(json.dumps(settings, indent=1) + "\n")
    # In the versions that made the golden answers.
    pins = (f"{name}=={version(name)}" for name in kind.packages)
    (files / REQUIREMENTS).write_text("".join(f"{line}\n" for line in ("numpy", *pins)))
    taken = [_timed(handler, answer, exchanges[0].inputs[settings["input"]][0]) for _ in range(WINDOWS)]
    windows = Windows.of(taken, point={"batch": 1}, rows=1, memory_bytes=0)
    Baseline(exchanges=exchanges, latencies=(), environment=model.environment, windows=(windows,)).write(files)
    return _manifest(kind, model, settings)


def _handler(kind: Kind, settings: Mapping[str, Any]) -> Any:
    """The handler as it runs in the server, without one."""
    try:
        module = import_module(f"kpdeploy.serving.triton.{kind.name}")
    except ImportError as error:
        raise PackageMissing(
            f"the handler {kind.name} cannot be made here",
            why=str(error),
            next_step=f"pip install {' '.join(kind.packages)}",
        ) from None
    return module.Handler(settings)


def _timed(handler: Any, answer: Answer, body: bytes) -> float:
    """Milliseconds of a request, with the unmodified model behind the handler, in this process."""
    started = time.perf_counter()
    handler.answer(answer(handler.prepare(body))[0])
    return (time.perf_counter() - started) * 1e3


def _exchange(handler: Any, settings: Mapping[str, Any], answer: Answer, body: bytes) -> Exchange:
    scores = answer(handler.prepare(body))[0]
    labels, probabilities = handler.answer(scores)
    outputs: dict[str, Array] = {"probabilities": probabilities[None]}
    next_ones = np.sort(scores)[::-1][: len(probabilities) + 1]
    if settings["top"] == len(scores) or (-np.diff(next_ones) > CLEAR * next_ones[:-1]).all():
        outputs["labels"] = of_bytes((label.encode() for label in labels), (1, len(labels)))
    return Exchange(inputs={settings["input"]: of_bytes([body], (1,))}, outputs=outputs)


def _manifest(kind: Kind, model: Manifest, settings: Mapping[str, Any]) -> Manifest:
    most = model.max_batch_size or MOST_TEXTS
    outputs = (("labels", BYTES), ("probabilities", "float32"))
    return replace(
        model,
        model=f"{model.model}_{kind.suffix}",
        format=HANDLER_FORMAT,
        filename="model.py",
        signature=Signature(
            inputs=(TensorSpec(name=kind.suffix, dtype=BYTES, shape=("batch",)),),
            outputs=tuple(TensorSpec(name=n, dtype=d, shape=("batch", settings["top"])) for n, d in outputs),
            axes=(Axis(name="batch", min=1, max=most),),
        ),
        max_batch_size=most,
        input_names=(kind.suffix,),
        output_names=tuple(name for name, _ in outputs),
        settings={"packages": list(kind.packages)},
        decisions=(),
        formats=(),
        source={"kind": "handler", "handler": kind.name, "model": model.model},
        padded_axes=(),
        contract={},
        serving={"queue_delay_us": model.serving.get("queue_delay_us", 0)},
    )
