"""Serving: packages for a server, the server itself, and the client that checks it. No torch here."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {"serve": "kpdeploy.serving.server", "verify": "kpdeploy.serving.client"}
__all__ = [*_PUBLIC]  # noqa: PLE0604  (names resolved below)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kpdeploy.serving' has no attribute {name!r}")
