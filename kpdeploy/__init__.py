"""kpdeploy: a PyTorch model, fast, correct and watched in production.

The public names are imported when they are first used, so that `import kpdeploy` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "export": "kpdeploy.pipeline",
    "load_model": "kpdeploy.load",
    "serve": "kpdeploy.serving",
    "verify": "kpdeploy.serving",
    "bench": "kpdeploy.bench",
    "Axis": "kpdeploy.signature",
    "Signature": "kpdeploy.signature",
    "TensorSpec": "kpdeploy.signature",
    "Values": "kpdeploy.signature",
    "KpdeployError": "kpdeploy.errors",
}
__all__ = [*_PUBLIC]  # noqa: PLE0604  (names resolved below)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kpdeploy' has no attribute {name!r}")
