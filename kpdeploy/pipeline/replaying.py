"""The same requests to TorchServe, with an archive as it is, and to Triton, with what was made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpdeploy.artifact import Manifest
from kpdeploy.compare import relative_error, tolerance
from kpdeploy.deployment import Deployment
from kpdeploy.errors import AnswersDiffer, InputMismatch, InputsUnknown, ModelNotFound
from kpdeploy.inputs import Array, Tensors, middle_point, of_bytes, sample
from kpdeploy.pipeline.handlers import SIZES, png
from kpdeploy.progress import Progress
from kpdeploy.serving.client import Client, connect
from kpdeploy.serving.server import serve
from kpdeploy.serving.torchserve.client import TorchServeClient, why
from kpdeploy.serving.torchserve.server import running_archives

if TYPE_CHECKING:
    from kpdeploy.load.archive import Archive

COUNT = 4
JSON, BYTES = "application/json", "application/octet-stream"

Row = Callable[[dict[str, Any]], Any]
FORMS: dict[str, Row] = {
    "a row": lambda rows: next(iter(rows.values()))[0] if len(rows) == 1 else None,
    "a list of rows": lambda rows: next(iter(rows.values())) if len(rows) == 1 else None,
    "an object with a row for each input": lambda rows: {name: value[0] for name, value in rows.items()},
    "an object with rows for each input": lambda rows: rows,
    '{"data": a row}': lambda rows: {"data": next(iter(rows.values()))[0]} if len(rows) == 1 else None,
    '{"instances": rows}': lambda rows: {"instances": next(iter(rows.values()))} if len(rows) == 1 else None,
}
"""How handlers of people take a request whose tensors are known, as JSON: tried until one is answered."""


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """One request that both servers answered: ‖Triton − TorchServe‖ / ‖TorchServe‖ of all their numbers."""

    request: str
    error: float


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What both servers answered: alike, each within `tolerance`. `form`: how TorchServe was asked."""

    form: str
    tolerance: float
    exchanges: tuple[Exchanged, ...]

    @property
    def worst(self) -> float:
        return max(exchange.error for exchange in self.exchanges)

    def to_json(self) -> dict[str, Any]:
        return {"form": self.form, "tolerance": self.tolerance, "requests": [asdict(e) for e in self.exchanges]}


def replay_both(
    archive: Archive, model: Deployment, handler: Deployment | None, files: Sequence[Path], progress: Progress
) -> Replayed:
    """Serve both, ask both, and compare. TorchServe runs the archive's own code.

    Raises:
        AnswersDiffer: an answer is another one, with the request and both answers.
        InputsUnknown, InputMismatch: the archive's handler takes none of the requests that can be made up here, or a
            file cannot be read as the model's inputs.
        And what starting a server raises.
    """
    contents = [(file.name, _read(file)) for file in files]
    ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with (
        running_archives([archive.path], handlers=(archive.stock,), progress=progress) as old,
        serve(model.repository, progress=progress, **ports) as new,  # type: ignore[arg-type]  # all of them are ints
        TorchServeClient(old.http, token=old.token, timeout_s=120) as torchserve,
        connect(f"grpc://{new.grpc}") as triton,
    ):
        both = _Both(archive, torchserve, triton)
        with progress.step("asking both servers"):
            if handler is not None:
                return both.bodies(handler.manifest, contents or list(_made_up(handler)))
            return both.tensors(model.manifest, contents)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelNotFound(f"the request {file} cannot be read", why=str(error), next_step="check its path") from None


def _made_up(handler: Deployment) -> Iterator[tuple[str, bytes]]:
    """Files or texts that the handler of a stock classifier takes."""
    from kpdeploy.baseline import Baseline

    name = handler.manifest.input_names[0]
    golden = Baseline.read(Path(handler.folder)).exchanges
    for index, exchange in enumerate(golden):
        yield f"golden {name} {index + 1}", exchange.inputs[name][0]
    if name == "image":
        for width, height in SIZES:
            yield f"JPEG of {width} x {height}", png(width, height, format="JPEG")


class _Both:
    """Both servers with one model."""

    def __init__(self, archive: Archive, torchserve: TorchServeClient, triton: Client) -> None:
        self._archive = archive
        self._torchserve = torchserve
        self._triton = triton

    def bodies(self, handler: Manifest, requests: Sequence[tuple[str, bytes]]) -> Replayed:
        """Files or texts, as they are, to both: the stock handler there, the one that was made of it here."""
        limit = tolerance("float32", handler.tolerances)
        found = []
        for name, body in requests:
            theirs = self._answer(name, body, BYTES)
            answer = self._triton.infer(handler, {handler.input_names[0]: of_bytes([body], (1,))})
            labels = [label.decode() for label in answer["labels"][0]]
            ours = dict(zip(labels, answer["probabilities"][0].tolist(), strict=True))
            if not isinstance(theirs, dict) or theirs.keys() != ours.keys():
                raise self._differ(name, "other labels", ours, theirs)
            arrays = [np.array([chances[label] for label in ours], np.float32) for chances in (ours, theirs)]
            found.append(self._compared(name, arrays[0], arrays[1], limit))
        return Replayed(form=f"the bytes of {handler.input_names[0]}s", tolerance=limit, exchanges=tuple(found))

    def tensors(self, model: Manifest, contents: Sequence[tuple[str, bytes]]) -> Replayed:
        """JSON to the archive's handler, and the same numbers as tensors to Triton."""
        limit = tolerance("float32", model.tolerances)
        if contents:
            form, requests = "the files", [(name, body, _tensors(name, body, model)) for name, body in contents]
        else:
            form, requests = self._drawn(model)
        found = []
        for name, body, tensors in requests:
            said = self._answer(name, body, JSON)
            answer = self._triton.infer(model, tensors)
            ours = np.concatenate([array.reshape(-1) for array in answer.values()]).astype(np.float64)
            theirs = np.array(list(numbers(said)), np.float64)
            if theirs.size != ours.size:
                raise self._differ(name, f"{theirs.size} numbers and not {ours.size}", ours.tolist(), said)
            found.append(self._compared(name, ours, theirs, limit))
        return Replayed(form=form, tolerance=limit, exchanges=tuple(found))

    def _drawn(self, model: Manifest) -> tuple[str, list[tuple[str, bytes, Tensors]]]:
        """Random requests in the first form that the handler answers."""
        rng = np.random.default_rng()
        point = middle_point(model.signature, batch=1)
        drawn = [sample(model.signature, point, rng) for _ in range(COUNT)]
        refusals = []
        for form, shaped in FORMS.items():
            bodies = [shaped({name: array.tolist() for name, array in tensors.items()}) for tensors in drawn]
            if bodies[0] is None:
                continue
            texts = [json.dumps(body).encode() for body in bodies]
            status, _ = self._torchserve.predict(self._archive.name, texts[0], JSON)
            if status == 200:
                names = (f"random {index + 1}" for index in range(COUNT))
                return form, list(zip(names, texts, drawn, strict=True))
            refusals.append(f"{form}: HTTP {status}")
        raise InputsUnknown(
            f"the handler of {self._archive.path} answers none of the requests that can be made up here",
            why="; ".join(refusals),
            next_step="give it one that it answers: --request body.json",
        )

    def _answer(self, name: str, body: bytes, kind: str) -> Any:
        status, content = self._torchserve.predict(self._archive.name, body, kind)
        if status != 200:
            raise InputMismatch(
                f"TorchServe refuses the request {name}",
                why=f"HTTP {status}: {why(content)}",
                next_step="give requests that the archive's handler answers, with --request",
            )
        try:
            return json.loads(content)
        except ValueError:
            raise self._differ(name, "no JSON", "tensors", content[:200]) from None

    def _compared(self, name: str, ours: Array, theirs: Array, limit: float) -> Exchanged:
        error = relative_error(ours, theirs)
        if not error <= limit:
            raise self._differ(name, f"off by {error:.2g}, at most {limit:.0e}", ours.tolist(), theirs.tolist())
        return Exchanged(request=name, error=error)

    def _differ(self, name: str, how: str, ours: Any, theirs: Any) -> AnswersDiffer:
        return AnswersDiffer(
            f"Triton does not answer as TorchServe does with {self._archive.path}: {how}",
            why=f"request {name}: TorchServe {_short(theirs)}, Triton {_short(ours)}",
            next_step="nothing was published; what its handler does before or after the model may be the reason: "
            "migrate without --replay, and move that into the client or into the model",
        )


def numbers(said: Any) -> Iterator[float]:
    """All numbers of an answer in JSON, in their order."""
    if isinstance(said, dict | list):
        for entry in said.values() if isinstance(said, dict) else said:
            yield from numbers(entry)
    elif isinstance(said, int | float):
        yield float(said)


def _tensors(name: str, body: bytes, model: Manifest) -> Tensors:
    """The tensors in a JSON request, in any of FORMS."""
    specs = model.signature.inputs
    try:
        said = json.loads(body)
        if isinstance(said, dict) and not any(spec.name in said for spec in specs):
            said = next(said[key] for key in ("instances", "data", "inputs") if key in said)
        values = said if isinstance(said, dict) else {specs[0].name: said}
        arrays = {spec.name: np.asarray(values[spec.name], spec.dtype) for spec in specs}
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputMismatch(
            f"the request {name} cannot be read as the model's inputs",
            why=f"{type(error).__name__}: {error}",
            next_step=f"write it as JSON: {', '.join(FORMS)}",
        ) from None
    # One row without the axis that counts rows.
    return {s.name: a[None] if a.ndim == len(s.shape) - 1 else a for s, a in zip(specs, arrays.values(), strict=True)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
