"""Targets: the servers that a model is packaged for. One is a folder here with a `target.py`, and a row."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from kpdeploy.artifact import Manifest
from kpdeploy.deployment import Deployment
from kpdeploy.signature import Signature

Names = tuple[str, ...]


class Package(Protocol):
    """What the `target.py` of a target has."""

    def served_names(self, format: str, signature: Signature) -> tuple[Names, Names]:
        """The names by which the server knows the inputs and outputs, in the order of the signature."""

    def why_unbatched(self, format: str) -> str:
        """Why the server gives this format no batches; empty where it does."""

    def check_publishable(self, repo: str, *, model: str | None = None) -> None:
        """Tell before any work what publish would say after it, as far as it can be told."""

    def publish(self, repo: str, manifest: Manifest, files: Path, *, activate: bool = True) -> Deployment:
        """Publish the files of one version as the model's next version, and let it be served (`activate`)."""

    def rollback(self, repo: str, model: str, version: int) -> Deployment:
        """Put a version in service that is in the repository already, once its digests are right."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server by the name of its folder, and the formats that it serves, in the order in which they are tried.
    `staged`: whether a version can lie there that is not served yet."""

    name: str
    formats: tuple[str, ...]
    staged: bool

    @property
    def package(self) -> Package:
        return cast(Package, importlib.import_module(f"kpdeploy.serving.{self.name}.target"))


TARGETS = {
    target.name: target
    for target in (
        Target(name="triton", formats=("onnx", "openvino", "torchscript", "pt2", "cuda"), staged=True),
        Target(name="torchserve", formats=("onnx", "torchscript", "pt2"), staged=False),
    )
}
