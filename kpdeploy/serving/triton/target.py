"""The target triton, as kpdeploy.serving.target.Package has it."""

from __future__ import annotations

from pathlib import Path

from kpdeploy.deployment import Deployment
from kpdeploy.serving.repository import find_version
from kpdeploy.serving.triton.config import served_names
from kpdeploy.serving.triton.repository import activate, check_publishable, publish

__all__ = ["check_publishable", "publish", "rollback", "served_names", "why_unbatched"]


def rollback(repo: str, model: str, version: int) -> Deployment:
    deployment = find_version(repo, model, version)
    deployment.manifest.check_files(Path(deployment.folder))
    activate(deployment)
    return deployment


def why_unbatched(format: str) -> str:
    # A beta backend that documents batches as not done gets none, though the artifact itself passed them.
    return "NVIDIA's torch_aoti (beta) does not batch requests yet" if format == "pt2" else ""
