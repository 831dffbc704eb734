"""The target triton, as kpdeploy.serving.target.Package has it."""

from __future__ import annotations

from kpdeploy.serving.triton.config import served_names
from kpdeploy.serving.triton.repository import check_publishable, publish

__all__ = ["check_publishable", "publish", "served_names", "why_unbatched"]


def why_unbatched(format: str) -> str:
    # A beta backend that documents batches as not done gets none, though the artifact itself passed them.
    return "NVIDIA's torch_aoti (beta) does not batch requests yet" if format == "pt2" else ""
