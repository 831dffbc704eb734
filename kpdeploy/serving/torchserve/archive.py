"""A model archive (.mar): the artifact, its libraries, the handler that runs it, and how TorchServe shall run that.

The same model gives the same bytes: names in order, one date, nothing compressed (weights hardly are smaller, and a
stored file is read as it is), and nothing in it that was measured.
"""

from __future__ import annotations

import ast
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kpdeploy.artifact import BASELINE, GOLDEN, Manifest, sha256
from kpdeploy.errors import RepositoryBroken
from kpdeploy.inputs import middle_point
from kpdeploy.runtimes import PACKAGES, source
from kpdeploy.serving.torchserve.config import model_config

HANDLER = "handler.py"
MODEL = "model.json"
CONFIG = "model-config.yaml"
MANIFEST = "MAR-INF/MANIFEST.json"
DATE = (1980, 1, 1, 0, 0, 0)
"""The first that a zip file can hold."""


def archive_name(model: str) -> str:
    return f"{model}.mar"


def handler_source(format: str) -> str:
    """handler.py for a format: the very files that prove an artifact, and the class that serves it."""
    parts = [
        source(format),
        source("ragged"),
        Path(__file__).with_name("handler_model.py"),
    ]
    text = parts[-1].read_text()
    doc = ast.get_docstring(ast.parse(text), clean=False)
    head = f'"""{doc}"""\n\nfrom __future__ import annotations\n'
    sections = (f"# From kpdeploy's {part.parent.name}/{part.name}.\n\n{_body(part.read_text())}\n" for part in parts)
    return "\n".join((head, *sections))


def _body(text: str) -> str:
    """A module without its docstring, its __future__ import, and what is there for type checkers only."""
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if _left_out(node):
            assert node.end_lineno is not None
            del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines).strip() + "\n"


def _left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        # Of strings only the docstring: the others tell of the constant above them.
        return isinstance(node.value, ast.Constant) and node.lineno == 1
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def write_archive(manifest: Manifest, files: Path, path: Path) -> None:
    """Write the archive of a version: `files` holds the artifact, its libraries, and the baseline, which stays out."""
    # Weights may be in files beside the model's.
    names = sorted(file.name for file in files.iterdir() if file.name not in (GOLDEN, BASELINE))
    texts = {
        HANDLER: handler_source(manifest.format),
        MODEL: json.dumps(described(manifest, files, names), indent=2, default=list) + "\n",
        CONFIG: model_config(manifest),
        MANIFEST: json.dumps(archive_manifest(manifest), indent=2) + "\n",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted((*texts, *names)):
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = 0o644 << 16
            if name in texts:
                archive.writestr(entry, texts[name])
                continue
            entry.file_size = (files / name).stat().st_size
            with (files / name).open("rb") as source_file, archive.open(entry, "w") as target:
                while block := source_file.read(1 << 20):
                    target.write(block)
    with path.open("rb") as written:
        os.fsync(written.fileno())


def unpack_artifact(path: Path, folder: Path) -> None:
    """The artifact of an archive of ours, and what lies beside it, as its runtime loads them."""
    with zipfile.ZipFile(path) as archive:
        for name in json.loads(archive.read(MODEL))["digests"]:
            archive.extract(name, folder)


def described(manifest: Manifest, files: Path, names: list[str]) -> dict[str, Any]:
    """model.json: what the handler knows of the model."""
    signature = manifest.signature
    most = max(1, manifest.max_batch_size)
    points = [middle_point(signature, batch=size) for size in sorted({1, most})]
    return {
        "version": manifest.version,
        "filename": manifest.filename,
        "input_names": manifest.input_names,
        "output_names": manifest.output_names,
        "settings": dict(manifest.settings),
        "digests": {name: sha256(files / name) for name in names},
        "signature": signature.to_json(),
        "max_batch_size": manifest.max_batch_size,
        "padded_axes": {name: signature.axis(name).max for name in manifest.padded_axes},
        "warmup": [[spec.dims(point) for spec in signature.inputs] for point in points],
    }


def archive_manifest(manifest: Manifest) -> dict[str, Any]:
    """MAR-INF/MANIFEST.json. Without a creation time, which TorchServe does not read."""
    return {
        "createdOn": "01/01/1980 00:00:00",
        "runtime": "python",
        "model": {
            "modelName": manifest.model,
            "serializedFile": manifest.filename,
            "handler": HANDLER,
            "modelVersion": str(manifest.version),
            "configFile": CONFIG,
        },
        "archiverVersion": "0.12.0",
    }


def requirements(manifest: Manifest) -> str:
    """What the handler needs, in the versions that proved the artifact. A local version such as +cpu is no one's."""
    proven = manifest.environment.get("packages", {})
    return "".join(f"{line}\n" for line in _pins(manifest.format, proven))


def _pins(format: str, proven: dict[str, str]) -> Iterator[str]:
    for package in ("numpy", *PACKAGES[format]):
        version = str(proven.get(package, "")).partition("+")[0]
        yield f"{package}=={version}" if version else package


def version_of(data: Any, *, where: str) -> int | None:
    """The version that an archive says it holds, if kpdeploy made it. `data` is a path or a file.

    Raises:
        RepositoryBroken: it cannot be read.
    """
    try:
        with zipfile.ZipFile(data) as archive:
            if MODEL not in archive.namelist():
                return None
            return int(json.loads(archive.read(MANIFEST))["model"]["modelVersion"])
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError) as error:
        raise RepositoryBroken(
            f"{where} cannot be read as a model archive", why=str(error), next_step="export the model again"
        ) from None
