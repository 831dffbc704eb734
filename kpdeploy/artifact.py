"""An exported file and all that must be known to run it again: the Artifact, the Verdict on it, and manifest.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import DigestMismatch, RepositoryBroken
from kpdeploy.signature import Signature

MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
BASELINE = "baseline.json"
DIGEST = "kpdeploy_digest"
"""The parameter of a served model's configuration that holds Manifest.digest."""
SCHEMA = 1
MOUNT = "/models"
"""Where NVIDIA's examples mount a repository in their container."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def located(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings that a runtime loads an artifact with: kernel libraries in `folder` by their paths."""
    libraries = [str(folder.absolute() / name) for name in settings.get("op_libraries", ())]
    return {**settings, "op_libraries": libraries} if libraries else dict(settings)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model in one format: the folder it is in, its main file, and the names it gives its tensors.

    `settings` are what its runtime is loaded with (see kpdeploy.runtimes), and what the server's config states.
    """

    format: str
    folder: Path
    filename: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / self.filename

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The worst error of one output over all points, against its tolerance, by a metric of kpdeploy.compare: "error" is
    ‖out − ref‖ / ‖ref‖, "cosine" and "top1" what they lack of 1. Of that worst answer, for all metrics: `cosine`, with
    its reference, the least over the rows of its first axis; `top1`, the share of rows along the last axis with the
    same largest element; both 1 for integers."""

    output: str
    error: float
    tolerance: float
    cosine: float = 1.0
    top1: float = 1.0
    metric: str = "error"

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        """Measured / allowed: 2.0e-03 / 1e-02, or cosine 0.9960 / 0.99."""
        if self.metric == "error":
            return f"{self.error:.1e} / {self.tolerance:.0e}"
        return f"{self.metric} {1 - self.error:.4f} / {1 - self.tolerance:g}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the proof of one artifact showed.

    `padded_axes`: along these a request may be padded by zeros and gets the same answer; `padding` says what showed it.
    """

    comparisons: tuple[Comparison, ...]
    points: int
    max_batch_size: int
    notes: tuple[str, ...] = ()
    padded_axes: tuple[str, ...] = ()
    padding: Decision | None = None

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and all(c.passed for c in self.comparisons)

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda c: c.error / c.tolerance if c.tolerance else c.error)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """A layer that can be quantized: its own error ‖out − ref‖ / ‖ref‖ on what it is given when it is, and the
    precision that it got."""

    name: str
    error: float
    precision: str


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one call at one point of the dynamic range, in one process on an otherwise idle machine."""

    point: Mapping[str, int]
    p50_ms: float
    p99_ms: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of manifest.json: where a version comes from, what was tried, and the digest of every file.

    `mount`: where the repository will be for the server that reads config.pbtxt. `contract`: for each kernel library
    among the files, what it needs, such as {"libkpdeploy_onnx.so": {"onnxruntime": "1.21", "glibc": "2.34"}}.
    `serving`: how the server shall run it where that was stated or measured: queue_delay_us, instances, allocator,
    labels (by index). `memory`: a kpdeploy.memory.MemoryPlan. `tuning`: what was measured to choose instances.
    """

    model: str
    version: int
    target: str
    format: str
    filename: str
    signature: Signature
    max_batch_size: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    settings: Mapping[str, Any]
    files: Mapping[str, str]
    tolerances: Mapping[str, float]
    decisions: tuple[Decision, ...]
    formats: tuple[Mapping[str, Any], ...]
    source: Mapping[str, Any]
    environment: Mapping[str, Any]
    created: str
    padded_axes: tuple[str, ...] = ()
    mount: str = MOUNT
    contract: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def mounted(self) -> PurePosixPath:
        """The version's folder as the server sees it."""
        return PurePosixPath(self.mount, self.model, str(self.version))

    @property
    def digest(self) -> str:
        """One sha256 for the whole version: over the names and digests of its files, as `sha256sum` would list them."""
        listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["signature"] = self.signature.to_json()
        data["decisions"] = [{"kind": type(d).__name__.lower(), **asdict(d)} for d in self.decisions]
        for name, value in data.items():
            data[name] = dict(value) if isinstance(value, Mapping) else value
        return data

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(self.to_json(), indent=2, default=list) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a version's folder.

        Raises:
            RepositoryBroken: there is none, or it is not one that this release reads.
        """
        path = folder / MANIFEST
        try:
            data = json.loads(path.read_text())
            if data["schema"] != SCHEMA:
                raise RepositoryBroken(
                    f"{path} has schema {data['schema']}; this release reads {SCHEMA}",
                    next_step="use the release of kpdeploy that wrote it, or export the model again",
                )
            data["signature"] = Signature.from_json(data["signature"])
            data["decisions"] = tuple(_decision(d) for d in data["decisions"])
            # Versions of earlier releases have none of these.
            data.setdefault("padded_axes", ())
            data.setdefault("mount", MOUNT)
            data.setdefault("contract", {})
            data.setdefault("serving", {})
            for name in ("input_names", "output_names", "formats", "padded_axes"):
                data[name] = tuple(data[name])
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RepositoryBroken(
                f"{folder} is not a version made by kpdeploy",
                why=f"{path.name}: {error}",
                next_step="export the model into this repository with `kpdeploy export MODEL --target triton`",
            ) from None

    def check_files(self, folder: Path) -> None:
        """Raise DigestMismatch unless every file is, byte for byte, the one that was proven."""
        for name, digest in self.files.items():
            path = folder / name
            found = sha256(path) if path.is_file() else "no such file"
            if found != digest:
                raise DigestMismatch(
                    f"{path} is not the file that was proven",
                    why=f"sha256 is {found}, the manifest says {digest}",
                    next_step="export the model again, or restore the file",
                )


def _decision(data: dict[str, Any]) -> Decision:
    kinds: dict[str, type[Applied] | type[Skipped]] = {"applied": Applied, "skipped": Skipped}
    return kinds[data.pop("kind")](**data)
