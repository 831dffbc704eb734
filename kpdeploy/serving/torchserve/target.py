"""The target torchserve, as kpdeploy.serving.target.Package has it."""

from __future__ import annotations

from kpdeploy.serving.torchserve.repository import check_publishable, publish, rollback
from kpdeploy.signature import Signature

__all__ = ["check_publishable", "publish", "rollback", "served_names", "why_unbatched"]


def served_names(format: str, signature: Signature) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The signature's own: the handler maps them to the artifact's."""
    return tuple(spec.name for spec in signature.inputs), tuple(spec.name for spec in signature.outputs)


def why_unbatched(format: str) -> str:
    return ""
