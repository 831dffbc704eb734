"""A model archive (.mar) of anybody, for TorchServe: what is in it, read so that none of its code runs.

TorchServe itself runs an archive's handler, imports its model file and unpickles its weights. Here the archive is
checked before a file of it is written, handlers are read as text, and weights as tensors only. A model file is Python:
it is imported only where `trust` says so. TorchScript runs in libtorch's interpreter, which knows no Python.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import (
    FormatUnavailable,
    InputsUnknown,
    ModelBroken,
    ModelNotFound,
    ModelUnsafe,
    PackageMissing,
)
from kpdeploy.load.vocabulary import VOCABULARY

if TYPE_CHECKING:
    import torch

MANIFEST = "MAR-INF/MANIFEST.json"
LABELS = "index_to_name.json"
MOST_FILES = 10_000
MOST_BYTES = 64 << 30
RATIO, RATIO_FROM_BYTES = 100, 10 << 20
"""A file larger than this that was compressed to less than a hundredth is no weights."""

CLASSIFIERS = ("image_classifier", "text_classifier")
STOCK = (*CLASSIFIERS, "object_detector", "image_segmenter", "base_handler")
MOST_TOKENS = 512
"""Of a text: words, and pairs of words."""
CARRIED = {"batchSize", "maxBatchDelay", "minWorkers", "maxWorkers"}
OVERRIDES = ("preprocess", "inference", "postprocess", "handle")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What an archive says of its model. `folder` holds its files; `config` is its model-config.yaml."""

    path: Path
    folder: Path
    name: str
    serialized: str
    model_file: str
    handler: str
    labels: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stock(self) -> str:
        """The stock handler; empty for a handler of the archive's own."""
        return self.handler if self.handler in STOCK else ""

    @property
    def classifier(self) -> str:
        """The stock handler that answers with classes; empty for others, and for ONNX files, which it cannot run."""
        return self.stock if self.stock in CLASSIFIERS and not self.serialized.endswith(".onnx") else ""

    @property
    def batch(self) -> int:
        return _whole(self.config.get("batchSize"), 1)

    @property
    def serving(self) -> dict[str, Any]:
        """What Manifest.serving takes of the archive's configuration."""
        found: dict[str, Any] = {}
        if "maxBatchDelay" in self.config and self.batch > 1:
            found["queue_delay_us"] = _whole(self.config["maxBatchDelay"], 0) * 1000
        if "minWorkers" in self.config or "maxWorkers" in self.config:
            workers = _whole(self.config.get("minWorkers"), 1), _whole(self.config.get("maxWorkers"), 1)
            found["instances"] = max(1, *workers)
        if self.labels:
            found["labels"] = list(self.labels)
        return found


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1_000_000 else default


def read_archive(path: Path, folder: Path) -> Archive:
    """Unpack an archive into the empty `folder`, once all of it was checked.

    Raises:
        ModelNotFound: there is no such file.
        ModelUnsafe: a path or link that leads out, or files that unpack to far more than they are.
        ModelBroken: no zip file, or a manifest that does not name a model of it.
    """
    if not path.is_file():
        raise ModelNotFound(f"there is no archive {path}", next_step="give the path of a .mar file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            _check(path, archive.infolist())
            for entry in entries:
                place = folder / entry.filename
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, place.open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        FileExistsError,
        NotADirectoryError,
    ) as error:
        raise _broken(
            path, str(error), "check that it is whole; a .tar.gz archive must be made again as .mar"
        ) from None
    return _described(path, folder)


def _check(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename.lower().rstrip("/") for entry in entries]
    if len(set(names)) != len(names):
        raise _broken(path, "it holds two files of one name", "do not use this file")
    if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > MOST_BYTES:
        raise _unsafe(path, f"it unpacks to {len(entries)} files of {sum(e.file_size for e in entries) / 1e9:.1f} GB")
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.filename.startswith("/") or ".." in parts or re.search(r"[\\:\0]", entry.orig_filename):
            raise _unsafe(path, f"the path {entry.orig_filename!r} leads out of the archive")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _unsafe(path, f"{entry.filename!r} is a link or a device, not a file")
        if entry.file_size > RATIO_FROM_BYTES and entry.file_size > RATIO * max(1, entry.compress_size):
            raise _unsafe(path, f"{entry.filename!r} unpacks from {entry.compress_size} to {entry.file_size} bytes")


def _described(path: Path, folder: Path) -> Archive:
    try:
        model = json.loads((folder / MANIFEST).read_text())["model"]
        name, handler = model["modelName"], model["handler"]
        serialized, model_file = model.get("serializedFile") or "", model.get("modelFile") or ""
        texts = (name, handler, serialized, model_file)
        if not all(isinstance(text, str) for text in texts) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,127}", name):
            raise ValueError(f"modelName {name!r} is no name, or a file's name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(path, f"{MANIFEST}: {error}", "make the archive again with torch-model-archiver") from None
    for file in (serialized, model_file):
        # Only names of its own files: the manifest is not what was checked above.
        if file and (PurePosixPath(file).name != file or not (folder / file).is_file()):
            raise _broken(path, f"its manifest names {file!r}, which it does not hold", "make the archive again")
    if not serialized and not model_file:
        raise _broken(path, "its manifest names no model", "a handler that makes its own model cannot be migrated")
    return Archive(
        path=path,
        folder=folder,
        name=name,
        serialized=serialized,
        model_file=model_file,
        handler=handler,
        labels=_labels(path, folder / LABELS),
        config=_config(path, folder, model.get("configFile")),
    )


def _labels(path: Path, file: Path) -> tuple[str, ...]:
    """Labels by index, as TorchServe reads index_to_name.json; an index without one has an empty line."""
    if not file.is_file():
        return ()
    try:
        mapping = json.loads(file.read_text())
        if isinstance(mapping.get("object_type_names"), list):
            mapping = dict(enumerate(mapping["object_type_names"]))
        named = {int(k): str(v[-1] if isinstance(v, list) else v) for k, v in mapping.items()}
        if not named or min(named) < 0 or max(named) > 1_000_000:
            raise ValueError("its indices are not those of classes")
    except (ValueError, AttributeError, IndexError, TypeError, RecursionError) as error:
        raise _broken(path, f"{LABELS}: {error}", 'write it as {"0": "cat", "1": "dog"}') from None
    return tuple(" ".join(named.get(index, "").split()) for index in range(max(named) + 1))


def _config(path: Path, folder: Path, name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or PurePosixPath(name).name != name or not (folder / name).is_file():
        return {}
    try:
        import yaml
    except ImportError:
        raise PackageMissing(f"{name} of {path} cannot be read", next_step="pip install pyyaml") from None
    try:
        found = yaml.safe_load((folder / name).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _broken(path, f"{name}: {error}", "correct it, and make the archive again") from None
    return found if isinstance(found, dict) else {}


def _broken(path: Path, why: str, next_step: str) -> ModelBroken:
    return ModelBroken(f"{path} is no model archive that can be read", why=why, next_step=next_step)


def _unsafe(path: Path, why: str) -> ModelUnsafe:
    return ModelUnsafe(
        f"{path} is not what torch-model-archiver makes", why=why, next_step="do not use this file; nothing was written"
    )


def told(archive: Archive) -> list[Decision]:
    """What of an archive is carried over beside its model, and what is not."""
    found: list[Decision] = [*_told_handler(archive)]
    for key, value in sorted(archive.config.items(), key=lambda item: str(item[0])):
        if key in CARRIED:
            found.append(Applied(what=f"{key} {value}", detail="into config.pbtxt"))
        else:
            found.append(Skipped(what=f"{key} of its configuration", reason="Triton has no setting of that meaning"))
    if archive.labels:
        found.append(Applied(what=f"{len(archive.labels)} labels", detail="labels.txt; ask for classes by class_count"))
    known = {archive.serialized, archive.model_file, LABELS, MANIFEST, "model-config.yaml", _handler_file(archive)}
    known |= {VOCABULARY} if archive.stock == "text_classifier" else set()
    for file in sorted(p for p in archive.folder.rglob("*") if p.is_file()):
        name = file.relative_to(archive.folder).as_posix()
        if name not in known:
            found.append(Skipped(what=f"the extra file {name}", reason="only its handler knows what it is for"))
    return found


def _handler_file(archive: Archive) -> str:
    name = archive.handler.partition(":")[0]
    return name if name.endswith(".py") else f"{name}.py"


def _told_handler(archive: Archive) -> list[Decision]:
    if archive.classifier:
        detail = "a part of the model's graph, and proven with it"
        return [Applied(what=f"softmax of {archive.classifier}", detail=detail)]
    if archive.stock in CLASSIFIERS:
        return [Skipped(what=f"the handler {archive.stock}", reason="TorchServe's own cannot run an ONNX file")]
    if archive.stock:
        return []
    file = archive.folder / _handler_file(archive)
    if not file.is_file():
        return [Skipped(what=f"the handler {archive.handler}", reason="the archive does not hold it")]
    try:
        methods = [
            node.name
            for kind in ast.walk(ast.parse(file.read_text()))
            if isinstance(kind, ast.ClassDef)
            for node in kind.body
            if isinstance(node, ast.FunctionDef) and node.name in OVERRIDES
        ]
    except (SyntaxError, ValueError, RecursionError) as error:
        return [Skipped(what=f"the handler {archive.handler}", reason=f"it cannot be read: {error}")]
    reason = "it is Python of its own: move it into the client, or into the model before exporting it"
    return [Skipped(what=f"{method}() of {file.name}", reason=reason) for method in dict.fromkeys(methods)]


def exportable(archive: Archive, *, trust: bool) -> str | torch.nn.Module:
    """The model as `kpdeploy.export` takes it: a file's path, or a module, with what the stock handler does after it.

    Raises:
        ModelUnsafe: it needs the archive's own Python, and `trust` is not given.
        FormatUnavailable: it cannot be served by Triton, with the reason.
        ModelBroken: it cannot be loaded.
    """
    if archive.stock in ("object_detector", "image_segmenter"):
        raise FormatUnavailable(
            f"{archive.path} cannot be migrated: its handler is {archive.stock}",
            why="its model gives lists and dicts of as many boxes as it finds, which no tensor of Triton's holds"
            if archive.stock == "object_detector"
            else "its model gives a dict, of which the handler makes an image",
            next_step="write a module that returns tensors (padded, with a count), and kpdeploy export that",
        )
    suffix = Path(archive.serialized).suffix
    if archive.model_file:
        return _after(archive, _eager(archive, trust=trust))
    if suffix == ".onnx":
        return str(archive.folder / archive.serialized)
    if suffix in (".pt", ".pth"):
        return _torchscript(archive)
    raise FormatUnavailable(
        f"{archive.path} holds {archive.serialized}, which cannot be migrated",
        why="machine code of another export: what it computes cannot be read from it"
        if suffix in (".so", ".pt2")
        else "it is neither TorchScript, ONNX, nor weights with a model file",
        next_step="export the model that it was made from: kpdeploy export MODEL --target triton",
    )


def _torchscript(archive: Archive) -> str:
    import torch

    from kpdeploy.load.untrusted import archive_names

    path = archive.folder / archive.serialized
    archive_names(path)
    if not archive.classifier:
        return str(path)
    try:
        module = _after(archive, torch.jit.load(str(path), map_location="cpu").eval())
        path = archive.folder / "with_handler.pt"
        torch.jit.script(module).save(str(path))
    except RuntimeError as error:
        raise _broken(archive.path, str(error).strip().splitlines()[-1], "check that it is TorchScript") from None
    return str(path)


def _eager(archive: Archive, *, trust: bool) -> torch.nn.Module:
    import torch

    if not trust:
        raise ModelUnsafe(
            f"{archive.path} holds Python that makes its model ({archive.model_file})",
            why="importing it runs whatever is in it, as you",
            next_step=f"read it, then migrate with --trust; its weights are read as tensors only: {archive.serialized}",
        )
    path = archive.folder / archive.model_file
    spec = importlib.util.spec_from_file_location(f"kpdeploy_archive_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(code)
        kinds = [v for v in vars(code).values() if isinstance(v, type) and v.__module__ == code.__name__]
        if len(kinds) != 1:
            raise ValueError(f"it defines {len(kinds)} classes, TorchServe takes one")
        module: torch.nn.Module = kinds[0]()
    except Exception as error:  # the archive's own code
        raise _broken(archive.path, f"{archive.model_file}: {type(error).__name__}: {error}", "correct it") from None
    if archive.serialized:
        try:
            weights = torch.load(archive.folder / archive.serialized, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ModelUnsafe(
                f"{archive.serialized} of {archive.path} holds more than tensors",
                why=str(error).strip().splitlines()[0],
                next_step="save the weights as a state_dict: torch.save(model.state_dict(), path)",
            ) from None
        try:
            module.load_state_dict(weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            why = " ".join(str(error).split())[:300]
            raise _broken(archive.path, why, f"the weights are not those of {archive.model_file}") from None
    return module.eval()


def _after(archive: Archive, module: torch.nn.Module) -> torch.nn.Module:
    """The module, and after it what the stock handler computes."""
    import torch
    from torch import Tensor, nn

    class Probabilities(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, data: Tensor) -> Tensor:
            return torch.softmax(self.model(data), dim=1)

    class TokenProbabilities(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, data: Tensor) -> Tensor:
            # One text: its tokens are one bag.
            return torch.softmax(self.model(data, torch.zeros([1], dtype=torch.int64)), dim=1)

    kinds: dict[str, type[nn.Module]] = {
        "image_classifier": Probabilities,
        "text_classifier": TokenProbabilities,
    }
    return kinds[archive.stock](module).eval() if archive.stock in kinds else module


def inputs(archive: Archive, given: tuple[str, ...], vocabulary: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """The inputs: as given, or those that a stock handler's model has; a text's tokens by the ids of `vocabulary`.

    Raises:
        InputsUnknown: neither tells.
    """
    if given or Path(archive.serialized).suffix == ".onnx":
        return given
    batch = f"batch=1..{max(archive.batch, 8)}" if archive.batch != 1 else "batch=1..8"
    if archive.stock == "image_classifier":
        return (f"data:float32[{batch},3,224,224]",)
    if archive.stock == "text_classifier" and vocabulary:
        return (f"data:int64[tokens=1..{MOST_TOKENS}]{{0..{max(vocabulary.values())}}}",)
    raise InputsUnknown(
        f"{archive.path} does not say what its model takes",
        why="archives hold no shapes",
        next_step='state them: --input "data:float32[batch=1..16,3,32,32]"',
    )
