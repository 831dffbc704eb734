"""The Deployment value: one version of one model in a repository."""

from __future__ import annotations

from dataclasses import dataclass

from kpdeploy.artifact import Manifest


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A published version: where it is, and its manifest. `repository` is a path or an fsspec URL."""

    repository: str
    manifest: Manifest

    @property
    def model(self) -> str:
        return self.manifest.model

    @property
    def version(self) -> int:
        return self.manifest.version

    @property
    def folder(self) -> str:
        """The version's folder."""
        return f"{self.repository.rstrip('/')}/{self.model}/{self.version}"
