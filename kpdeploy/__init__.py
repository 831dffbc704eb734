"""kpdeploy: a PyTorch model, fast, correct and watched in production.

The public names are imported when they are first used, so that `import kpdeploy` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpdeploy.bench import bench as bench
    from kpdeploy.errors import KpdeployError as KpdeployError
    from kpdeploy.load import load_model as load_model
    from kpdeploy.pipeline import auto_optimize as auto_optimize
    from kpdeploy.pipeline import export as export
    from kpdeploy.pipeline import migrate as migrate
    from kpdeploy.serving import serve as serve
    from kpdeploy.serving import verify as verify
    from kpdeploy.signature import Axis as Axis
    from kpdeploy.signature import Signature as Signature
    from kpdeploy.signature import TensorSpec as TensorSpec
    from kpdeploy.signature import Values as Values

__version__ = "0.1.0"

_PUBLIC = {
    "export": "kpdeploy.pipeline",
    "auto_optimize": "kpdeploy.pipeline",
    "migrate": "kpdeploy.pipeline",
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
__all__ = [*_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kpdeploy' has no attribute {name!r}")


class _Package(ModuleType):
    """`export`, `bench` and `verify` are functions to users and folders to import statements: the functions win.

    Importing a submodule binds it in its package, and would put it in the function's place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
