"""A repository for the bundled server, made from a native one: the same models, run by Triton's python backend.

The bundled tritonserver has no onnxruntime, openvino or pytorch backend. An overlay's model.py loads the very artifact
of the native repository, in the runtime that proved it; nothing of the native repository is copied or changed.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from kpdeploy.artifact import DIGEST, Manifest, located
from kpdeploy.deployment import Deployment
from kpdeploy.errors import RepositoryBroken
from kpdeploy.runtimes import GPU_PACKAGES, PACKAGES, source
from kpdeploy.serving.triton.config import (
    CONFIG,
    HANDLER_FORMAT,
    LABELS,
    WARMUP,
    allow_ragged,
    holds_model_py,
    read_config,
    write_config,
)
from kpdeploy.serving.triton.launch import REQUIREMENTS

BACKENDS = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "torchscript": "pytorch",
    "pt2": "pytorch",
    "cuda": "python",
    HANDLER_FORMAT: "python",
}
"""The folder name of the native backend that NVIDIA's container runs each format with."""


def backend_of(manifest: Manifest) -> str:
    """That of one version. A format that is none of ours is served by the backend of its name."""
    return "python" if holds_model_py(manifest) else BACKENDS.get(manifest.format, manifest.format)


@dataclass(frozen=True, kw_only=True)
class Served:
    """One deployment as the server runs it: `native` by a backend of its own, else through the overlay. `instances`
    are processes of the python backend."""

    deployment: Deployment
    native: bool
    runtime: str
    instances: int

    @property
    def padding(self) -> str:
        """How requests of different sizes share a batch here, which no native backend does; empty where they do not."""
        axes = self.deployment.manifest.padded_axes
        if self.native or not axes:
            return ""
        return (
            f"{self.deployment.model}: requests of different {' and '.join(axes)} are padded and merged here; "
            "NVIDIA's container merges only those of equal sizes"
        )

    def __str__(self) -> str:
        manifest = self.deployment.manifest
        what = f"{manifest.model} v{manifest.version}: {manifest.filename} run by"
        backend = backend_of(manifest)
        if self.native:
            return f"{what} Triton's {backend} backend"
        return (
            f"{what} {self.runtime} inside Triton's python backend; "
            f"NVIDIA's container runs the same file with its {backend} backend"
        )


def write_overlay(
    deployment: Deployment, folder: Path, *, backends_dir: Path | None, versions: Mapping[str, str]
) -> Served:
    """Write `folder/<model>`, replacing what is there; `versions` are those of the runtime packages.

    Raises:
        DigestMismatch: a file of the native repository is not the one that was proven.
        RepositoryBroken: config.pbtxt cannot be read.
    """
    manifest = deployment.manifest
    version_folder = Path(deployment.folder).absolute()
    model_folder = version_folder.parent
    manifest.check_files(version_folder)
    target = folder / manifest.model
    backend = backend_of(manifest)
    if manifest.format == HANDLER_FORMAT or (backends_dir is not None and (backends_dir / backend).is_dir()):
        _replace_link(target, model_folder)
        processes = instances(_native_config(model_folder / CONFIG)) if manifest.format == HANDLER_FORMAT else 0
        return Served(deployment=deployment, native=True, runtime=backend, instances=processes)
    if target.is_symlink():
        target.unlink()
    files = target / str(manifest.version)
    files.mkdir(parents=True, exist_ok=True)
    _copy_model(manifest.format, files)
    config = overlay_config(_native_config(model_folder / CONFIG))
    allow_ragged(config, manifest)
    (files / "artifact.json").write_text(json.dumps(artifact(manifest, version_folder, config), default=list))
    if LABELS in manifest.files:
        _replace_link(files / LABELS, version_folder / LABELS)
    if (model_folder / WARMUP).is_dir():
        _replace_link(target / WARMUP, model_folder / WARMUP)
    # config.pbtxt comes last, as in the native repository: it names the version.
    aside = target / f"{CONFIG}.part"
    aside.write_text(write_config(config))
    aside.replace(target / CONFIG)
    package = PACKAGES[manifest.format][0]
    runtime = f"{package} {versions.get(package, '')}".strip()
    return Served(deployment=deployment, native=False, runtime=runtime, instances=instances(config))


def _copy_model(format: str, files: Path) -> None:
    """What runs an artifact inside the python backend."""
    shutil.copyfile(source(format), files / "runtime.py")
    for module in ("ragged", "buckets", *(["onnx_graphs"] if format == "onnx" else [])):
        shutil.copyfile(source(module), files / f"{module}.py")
    shutil.copyfile(str(importlib.resources.files(__package__) / "overlay_model.py"), files / "model.py")


def write_model(manifest: Manifest, files: Path) -> None:
    """Make a version that Triton's python backend runs as it is, for a format that no backend of NVIDIA's knows. The
    server's Python needs the packages of the format's runtime."""
    _copy_model(manifest.format, files)
    beside = {"path": manifest.filename, "settings": dict(manifest.settings)}
    (files / "artifact.json").write_text(json.dumps({**_described(manifest), **beside}, default=list))
    known = manifest.environment.get("packages", {})
    needed = GPU_PACKAGES.get(manifest.format, PACKAGES[manifest.format])
    pins = (_pinned(name, known) for name in needed)
    (files / REQUIREMENTS).write_text("".join(f"{line}\n" for line in ("numpy", *pins)))


def _pinned(name: str, known: Mapping[str, str]) -> str:
    """A requirement, with the version that the artifact was proven with where that is known."""
    version = known.get(name.partition("[")[0], "").partition("+")[0]
    return f"{name}=={version}" if version else name


def _native_config(path: Path) -> Any:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryBroken(f"{path} cannot be read", why=str(error), next_step="export the model again") from None
    return read_config(text, where=str(path))


def overlay_config(native: Any) -> Any:
    """The native configuration, served by the python backend: names, shapes, batching, warm-up and versions stay."""
    config = ModelConfig()
    config.CopyFrom(native)
    for field in ("platform", "default_model_filename", "cc_model_filenames", "optimization", "model_operations"):
        config.ClearField(field)
    # Parameters of native backends mean nothing, or something else, to the python backend.
    for key in [key for key in config.parameters if key != DIGEST]:
        del config.parameters[key]
    config.backend = "python"
    # The runtimes here are those of the CPU, whatever the native backend would use.
    if not config.instance_group:
        config.instance_group.add()
    for group in config.instance_group:
        group.kind = group.KIND_CPU
        group.count = max(group.count, 1)
        group.ClearField("gpus")
    return config


def instances(config: Any) -> int:
    """How many processes run the model."""
    return sum(group.count for group in config.instance_group)


def artifact(manifest: Manifest, version_folder: Path, config: Any) -> dict[str, Any]:
    """What model.py loads: artifact.json."""
    settings = located(manifest.settings, version_folder)
    if (count := instances(config)) > 1 and not settings.get("threads"):
        settings["threads"] = max(1, len(os.sched_getaffinity(0)) // count)
    return {**_described(manifest), "path": str(version_folder / manifest.filename), "settings": settings}


def _described(manifest: Manifest) -> dict[str, Any]:
    """What artifact.json says of the artifact wherever it is."""
    signature = manifest.signature
    return {
        "inputs": manifest.input_names,
        "outputs": manifest.output_names,
        "input_shapes": [spec.shape for spec in signature.inputs],
        "output_shapes": [spec.shape for spec in signature.outputs],
        "padded_axes": {name: signature.axis(name).max for name in manifest.padded_axes},
    }


def link_backends(folder: Path, python_backend: Sequence[Path], *, backends_dir: Path | None) -> None:
    """Fill the server's backend directory: the bundled python backend, and links to all in `backends_dir`."""
    for entry in sorted(backends_dir.iterdir()) if backends_dir else ():
        if entry.name != "python":
            _replace_link(folder / entry.name, entry.absolute())
    python = folder / "python"
    python.mkdir(parents=True, exist_ok=True)
    for file in python_backend:
        _replace_link(python / file.name, file)


def _replace_link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)
