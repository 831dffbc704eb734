"""The virtual environment of TorchServe, made once in the user's cache folder.

The runtimes (torch, onnxruntime) come from the user's environment, so that what proved an artifact serves it; torch is
needed whatever the format, for TorchServe's own worker imports it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kpdeploy.artifact import Manifest
from kpdeploy.errors import LibraryMissing
from kpdeploy.progress import Progress
from kpdeploy.serving.torchserve.repository import TORCHSERVE
from kpdeploy.serving.triton.environment import (
    SHARED_CORES,
    cache_folder,
    installed,
    make_environment,
    runtime_pins,
    user_packages,
)

TORCHSERVE_PACKAGES = (*TORCHSERVE, "torch-model-archiver==0.12.0")
OTHERS = ("psutil", "packaging", "pillow")
"""What the server imports; taken from the user's environment where that has it."""
_EXPLAINED = ("captum", "tqdm", "matplotlib")
HANDLER_PACKAGES = {
    "text_classifier": _EXPLAINED,
    **dict.fromkeys(("image_classifier", "object_detector", "image_segmenter"), ("torchvision", *_EXPLAINED)),
}
"""What stock handlers import beside torch: captum, with all that it asks for, whatever they are asked."""

JAVA = 11
"""The oldest release that TorchServe 0.12 runs on."""


@dataclass(frozen=True, kw_only=True)
class ServerEnvironment:
    """Where the server's files are, and the variables it is started with."""

    prefix: Path

    @property
    def python(self) -> Path:
        return self.prefix / "bin" / "python"

    @property
    def torchserve(self) -> tuple[str, ...]:
        """Its command. The scripts in bin name the folder that the environment was made in, and do not run."""
        return (str(self.python), "-m", "ts.model_server")

    @property
    def archiver(self) -> tuple[str, ...]:
        return (str(self.python), "-m", "model_archiver.model_packaging")

    def variables(self, temporary: Path) -> dict[str, str]:
        """Its own temporary folder: TorchServe unpacks archives there, and knows a running server by a file in it."""
        left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TS_CONFIG_FILE", "LOG_LOCATION", "METRICS_LOCATION")
        return {
            **SHARED_CORES,
            **{name: value for name, value in os.environ.items() if name not in left_out},
            "PATH": f"{self.prefix / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "TMPDIR": str(temporary),
            "TEMP": str(temporary),
        }


def environment_folder(pins: tuple[str, ...] = ()) -> Path:
    """Where the server's environment is or will be, for this Python and its packages' folders."""
    key = [platform.python_version(), sys.prefix, *TORCHSERVE_PACKAGES, *pins, *user_packages()]
    return cache_folder() / f"torchserve-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"


def handler_packages(handlers: Iterable[str]) -> list[list[str]]:
    """What TorchServe's stock handlers import that is not here, as pip's arguments: torchvision of this torch's
    release, and captum, which explains answers."""
    wanted = [name for name in handlers if name in HANDLER_PACKAGES]
    found = dict.fromkeys(package for name in wanted for package in HANDLER_PACKAGES[name])
    missing = [name for name in found if installed(name) is None]
    # torchvision 0.28 is that of torch 2.13.
    minor = int((installed("torch") or "2.13").split(".")[1])
    named = {"torchvision": f"torchvision==0.{minor + 15}.*"}
    # With their dependencies pip would install torch once more.
    alone = ("torchvision", "captum")
    return [[*(["--no-deps"] if name in alone else []), named.get(name, name)] for name in missing]


def ensure_environment(
    progress: Progress, manifests: Iterable[Manifest] = (), *, handlers: Iterable[str] = ()
) -> ServerEnvironment:
    """The server's environment, made now if this is the first time; `handlers` are stock ones that shall run in it.

    Raises:
        ServerUnavailable: it could not be installed.
        LibraryMissing: there is no Java that runs it.
    """
    check_java()
    missing = [name for name in ("numpy", "torch", *OTHERS) if installed(name) is None]
    pins = tuple(dict.fromkeys((*runtime_pins(manifests), *missing)))
    extra = handler_packages(handlers)
    folder = environment_folder((*pins, *(arguments[-1] for arguments in extra)))
    wanted = [["--no-deps", *TORCHSERVE_PACKAGES], *([pin] for pin in pins), *extra]
    make_environment(folder, wanted, progress, title="installing TorchServe 0.12.0, once (about 50 MB)")
    return ServerEnvironment(prefix=folder)


def java() -> str:
    """The Java that TorchServe will start; empty where there is none."""
    home = os.environ.get("JAVA_HOME")
    return shutil.which(str(Path(home) / "bin" / "java") if home else "java") or ""


def java_release(java: str) -> int:
    """The release of a Java, such as 17; 0 where it does not run."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    _, _, version = done.stderr.partition('version "')
    number = version.partition(".")[0].partition('"')[0].partition("-")[0]
    return int(number) if number.isdigit() else 0


def check_java() -> None:
    """Raise LibraryMissing where TorchServe's frontend would not start."""
    found = java()
    release = java_release(found) if found else 0
    if release < JAVA:
        raise LibraryMissing(
            "TorchServe needs Java, which is not on this machine" if not found else f"{found} does not run TorchServe",
            why=f"it is Java {release or 'of an unknown release'}, {JAVA} is the least" if found else "",
            next_step="install it (on Debian: apt install openjdk-17-jre-headless), or set JAVA_HOME",
        )
