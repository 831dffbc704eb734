"""Would a model load in a container, or here? Every answer is a decision: Applied, or Skipped with the reason."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kpdeploy.artifact import Manifest
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import DigestMismatch
from kpdeploy.hardware import detect, memory_bytes, packages
from kpdeploy.memory import MemoryPlan, point_told, size
from kpdeploy.ops.libraries import contract
from kpdeploy.serving.triton.config import HANDLER_FORMAT, holds_model_py
from kpdeploy.serving.triton.containers import (
    CALL_SPEC_SINCE,
    CONTAINERS,
    TORCH_AOTI_SINCE,
    VERSIONS,
    Container,
    onnxruntime_since,
    openvino_since,
    order,
    settled,
)
from kpdeploy.serving.triton.overlay import backend_of

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torchscript": "torch", "pt2": "torch", "cuda": "torch"}
"""The field of a Container that says which runtime loads a format."""

HERE = "this machine"

LIBSTDCXX = "libstdc++.so.6"

NOT_KNOWN = "not known"
"""How the reason of a Skipped begins where the table cannot tell."""

_LABELS = {
    "glibc": "glibc",
    "glibcxx": "libstdc++ (GLIBCXX)",
    "cuda": "CUDA",
    "driver": "NVIDIA driver",
    "onnxruntime": "ONNX Runtime",
    "torch": "PyTorch",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True, kw_only=True)
class Need:
    """`what` needs at least version `least` of a field of Container, `name`; None: it is not known which."""

    what: str
    name: str
    least: str | None


def here() -> Container:
    """This machine in a container's words: the packages of this Python, its glibc and libstdc++, and its driver."""
    found = packages()
    gpus = detect().gpus
    libraries = [
        path for place in ("lib64", "lib", "lib/*-linux-gnu") for path in Path("/usr").glob(f"{place}/{LIBSTDCXX}")
    ]
    return Container(
        tag=HERE,
        glibc=platform.libc_ver()[1] or None,
        glibcxx=contract(libraries[0]).get("glibcxx") if libraries else None,
        driver=gpus[0].driver if gpus else None,
        onnxruntime=found.get("onnxruntime"),
        torch=found.get("torch"),
        openvino=found.get("openvino"),
        torch_aoti="torch" in found,
    )


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """One version in one place: everything that decides whether it loads there.

    A decision is Applied where that part loads, Skipped where it does not, or where that is not known (the reason
    then begins with NOT_KNOWN).
    """

    manifest: Manifest
    decisions: tuple[Decision, ...]

    @property
    def against(self) -> tuple[Skipped, ...]:
        return tuple(decision for decision in self.decisions if isinstance(decision, Skipped))

    @property
    def loads(self) -> bool:
        return not self.against

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.manifest.model,
            "version": self.manifest.version,
            "format": self.manifest.format,
            "loads": self.loads,
            "checks": [{"kind": type(d).__name__.lower(), **asdict(d)} for d in self.decisions],
        }


def check(manifest: Manifest, folder: Path, where: Container, config: Any | None = None) -> Compatibility:
    """Check a version against what a container, or this machine, is known to hold.

    `folder` holds the version's files. `config`, its ModelConfig, is looked at for the paths of kernel libraries.
    """
    decisions = [_files(manifest, folder), *_runtime_decisions(manifest, needs(manifest, folder), where)]
    if where.tag == HERE and manifest.memory:
        decisions.append(_memory(MemoryPlan.from_json(manifest.memory)))
    if config is not None and where.tag != HERE:
        decisions += _library_paths(manifest, config)
    return Compatibility(manifest=manifest, decisions=tuple(decisions))


def _runtime_decisions(manifest: Manifest, wanted: tuple[Need, ...], where: Container) -> list[Decision]:
    where, origins = settled(where)
    return [_backend(manifest, where), *(_meets(need, where, origins) for need in wanted)]


def newest(manifest: Manifest, folder: Path) -> Container:
    """The newest container that would load a version; where none would, the newest of which that is known."""
    known = [container for container in reversed(CONTAINERS.values()) if container.onnxruntime and container.torch]
    wanted = needs(manifest, folder)
    for container in known:
        decisions = _runtime_decisions(manifest, wanted, container)
        if not any(isinstance(decision, Skipped) for decision in decisions):
            return container
    return known[0]


def needs(manifest: Manifest, folder: Path) -> tuple[Need, ...]:
    """What the model's file needs of its runtime, and what each kernel library's contract says."""
    found: list[Need] = []
    if manifest.format in _READERS and (folder / manifest.filename).is_file():
        found += _READERS[manifest.format](manifest, folder / manifest.filename)
    for library, versions in manifest.contract.items():
        found += [Need(what=library, name=name, least=least) for name, least in versions.items()]
    return tuple(found)


def _onnx(manifest: Manifest, path: Path) -> Iterator[Need]:
    try:
        opset, ir = onnx_versions(path)
    except ValueError:
        yield Need(what=f"{path.name}, no ONNX file", name="onnxruntime", least=None)
        return
    yield Need(
        what=f"{path.name} (opset {opset}, IR version {ir})", name="onnxruntime", least=onnxruntime_since(opset, ir)
    )


def onnx_versions(path: Path) -> tuple[int, int]:
    """The opset of the standard domain and the IR version of an ONNX file.

    Raises:
        ValueError: it is none.
    """
    # A server's machine need not have the onnx package; a message without fields keeps those it does not know.
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.message import DecodeError
    from google.protobuf.unknown_fields import UnknownFieldSet

    def fields(data: bytes) -> list[tuple[int, Any]]:
        unknown = UnknownFieldSet(Empty.FromString(data))
        return [(unknown[index].field_number, unknown[index].data) for index in range(len(unknown))]

    try:
        model = fields(path.read_bytes())
        opsets = [dict(fields(data)) for number, data in model if number == 8]
        standard = [opset[2] for opset in opsets if opset.get(1, b"") in (b"", b"ai.onnx")]
        return int(standard[0]), int(dict(model)[1])
    except (DecodeError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no ONNX file: {error}") from None


def _openvino(manifest: Manifest, path: Path) -> Iterator[Need]:
    sets = {0}
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "layer" and (found := re.fullmatch(r"opset(\d+)", element.get("version", ""))):
                sets.add(int(found[1]))
    except ElementTree.ParseError:
        sets = {0}
    least = openvino_since(max(sets)) if max(sets) else None
    yield Need(what=f"{path.name} (opset{max(sets)})", name="openvino", least=least)


def _pt2(manifest: Manifest, path: Path) -> Iterator[Need]:
    # It holds a compiled library, uncompressed. The functions of libtorch that such a library calls become more with
    # each release, so an older libtorch may lack one.
    yield Need(what=path.name, name="torch", least=_torch_of(manifest))
    for name, least in contract(path).items():
        yield Need(what=path.name, name=name, least=least)


_READERS: Mapping[str, Callable[[Manifest, Path], Iterator[Need]]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "pt2": _pt2,
}


def _files(manifest: Manifest, folder: Path) -> Decision:
    try:
        manifest.check_files(folder)
    except DigestMismatch as error:
        return Skipped(what="files", reason=f"{error.what}: {error.why}")
    libraries = {*manifest.contract, *manifest.settings.get("op_libraries", ())}
    if missing := libraries - manifest.files.keys():
        return Skipped(what="files", reason=f"the manifest names no digest of {', '.join(sorted(missing))}")
    return Applied(what="files", detail=f"{len(manifest.files)} files, each with the digest of the manifest")


def _backend(manifest: Manifest, where: Container) -> Decision:
    """Is there something that loads the format at all?"""
    if manifest.format == HANDLER_FORMAT:
        needed = " and ".join(("NumPy", *manifest.settings.get("packages", ())))
        return Applied(what="backend", detail=f"python; its Python needs {needed}, which launch.sh installs")
    name = backend_of(manifest)
    if manifest.format == "pt2":
        name = "torch_aoti"
    if where.tag == HERE:
        runtime = RUNTIMES.get(manifest.format, "")
        version = getattr(where, runtime, None)
        if version is None:
            return Skipped(what="backend", reason=f"{_LABELS.get(runtime, name)} is not installed here")
        return Applied(what="backend", detail=f"{_LABELS[runtime]} {version}")
    if manifest.format == "pt2":
        if not where.torch_aoti:
            return Skipped(what="backend", reason=f"torch_aoti came with tritonserver:{TORCH_AOTI_SINCE}")
        indexed = all(re.fullmatch(r"INPUT__\d+", given) for given in manifest.input_names)
        if not indexed and where.tag < CALL_SPEC_SINCE:
            return Skipped(what="backend", reason=f"torch_aoti knows such names since tritonserver:{CALL_SPEC_SINCE}")
        cpu = manifest.environment.get("cpu", "that of the export")
        return Applied(what="backend", detail=f"torch_aoti; the package is machine code for a CPU like {cpu}")
    return Applied(what="backend", detail=name + _older_libtorch(manifest, where))


def _older_libtorch(manifest: Manifest, where: Container) -> str:
    """TorchScript that newer releases wrote mostly loads; PyTorch promises it the other way round only."""
    wrote = _torch_of(manifest)
    if manifest.format != "torchscript" or wrote is None or where.torch is None or order(where.torch) >= order(wrote):
        return ""
    return f"; its PyTorch {where.torch} is older than {wrote}, which wrote the file: it loads unless an op is newer"


def _torch_of(manifest: Manifest) -> str | None:
    found: str | None = manifest.environment.get("packages", {}).get("torch")
    return found.partition("+")[0] if found else None


def _meets(need: Need, where: Container, origins: Mapping[str, str]) -> Decision:
    label = _LABELS.get(need.name, need.name)
    if need.name not in VERSIONS:
        # A GPU's own, such as its architecture: no container has it.
        return Applied(what=need.what, detail=f"asks the GPU for {label} {need.least}")
    if need.least is None:
        return Skipped(what=need.what, reason=f"{NOT_KNOWN}: which {label} it needs")
    found, origin = getattr(where, need.name), origins.get(need.name)
    wanted = f"{label} {need.least} or later"
    if found is None:
        return Skipped(what=need.what, reason=f"{NOT_KNOWN}: needs {wanted}; no source tells which is there")
    if order(found) >= order(need.least):
        return Applied(what=need.what, detail=f"{wanted}: {found}" + (f" since {origin}" if origin else ""))
    if origin:
        return Skipped(what=need.what, reason=f"{NOT_KNOWN}: needs {wanted}; {origin} had {found}, later is not told")
    return Skipped(what=need.what, reason=f"needs {wanted}; there is {found}{_alpha(found, need.least)}")


def _memory(plan: MemoryPlan) -> Decision:
    """Does what was planned for all instances fit into this machine?"""
    there, measured = memory_bytes(), f", measured {size(plan.measured_bytes)}" if plan.measured_bytes else ""
    planned = f"{plan.instances} x {size(plan.instance_bytes())} planned {point_told(plan)}{measured}"
    if plan.total_bytes() > there:
        return Skipped(what="memory", reason=f"{planned}; this machine has {size(there)}")
    return Applied(what="memory", detail=f"{planned}; this machine has {size(there)}")


def _alpha(found: str, least: str) -> str:
    return ", a snapshot from before that release" if order(found)[:-1] == order(least)[:-1] else ""


def _library_paths(manifest: Manifest, config: Any) -> Iterator[Decision]:
    """config.pbtxt's op_library_filename goes to dlopen as it is: it must be the file's place below the mount."""
    written = set(config.model_operations.op_library_filename)
    folder = manifest.mounted
    right = {str(folder / name) for name in manifest.files}
    native = manifest.format == "onnx" and not holds_model_py(manifest)
    expected = manifest.settings.get("op_libraries", ()) if native else ()
    for path in sorted(written | {str(folder / name) for name in expected}):
        what = "op_library_filename"
        if path not in written:
            yield Skipped(what=what, reason=f"config.pbtxt does not name {path}")
        elif path not in right:
            yield Skipped(what=what, reason=f"{path} is no file of this version, mounted at {manifest.mount}")
        else:
            yield Applied(what=what, detail=f"{path}, with the repository mounted at {manifest.mount}")
