"""The virtual environment of the bundled tritonserver, made once in the user's cache folder.

Its python stub needs numpy < 2, a pin that must not reach the user's own environment. The runtimes (torch, onnxruntime,
openvino) are not installed again: they come from the user's environment, so that what proved an artifact serves it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kpdeploy.artifact import Manifest
from kpdeploy.errors import LibraryMissing, ServerUnavailable
from kpdeploy.progress import Progress
from kpdeploy.runtimes import PACKAGES

PYTRITON = "nvidia-pytriton==0.7.0"
NUMPY = "numpy>=1.26,<2"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHONS = ("3.11", "3.12")
"""Where both exist: a stub in the wheel, and a wheel of numpy < 2."""

SHARED_CORES = {"OMP_WAIT_POLICY": "passive"}
"""torch's threads wait for the next operator asleep: in a loop they would keep the server and other models from the
cores, which costs a served TorchScript model half of its speed and more."""


@dataclass(frozen=True, kw_only=True)
class ServerEnvironment:
    """Where the server's files are, and the variables it is started with."""

    prefix: Path

    @property
    def site_packages(self) -> Path:
        return self.prefix / "lib" / f"python{PYTHON}" / "site-packages"

    @property
    def triton(self) -> Path:
        return self.site_packages / "pytriton" / "tritonserver"

    @property
    def binary(self) -> Path:
        return self.triton / "bin" / "tritonserver"

    @property
    def python_backend(self) -> tuple[Path, ...]:
        """The three files that a `python` backend folder holds."""
        backend = self.triton / "backends" / "python"
        return (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", self.stub)

    @property
    def stub(self) -> Path:
        return self.triton / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"

    def variables(self) -> dict[str, str]:
        # The stub finds its site-packages through the python3 that is first on PATH, and needs a shared libpython.
        libraries = [sysconfig.get_config_var("LIBDIR"), str(self.site_packages / "nvidia_pytriton.libs")]
        if inherited := os.environ.get("LD_LIBRARY_PATH"):
            libraries.append(inherited)
        inherited_env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        return {
            **SHARED_CORES,
            **inherited_env,
            "PATH": f"{self.prefix / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "LD_LIBRARY_PATH": ":".join(libraries),
        }


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kpdeploy"


def runtime_pins(manifests: Iterable[Manifest]) -> tuple[str, ...]:
    """Requirements, by exact version, for the runtime packages, and those of handlers, that the user's
    environment does not have."""
    pins = set()
    for manifest in manifests:
        for package in PACKAGES.get(manifest.format) or manifest.settings.get("packages", ()):
            if installed(package) is None:
                version = manifest.environment.get("packages", {}).get(package, "")
                # A local version such as 2.9.0+cpu is not on PyPI.
                pins.add(f"{package}=={version.partition('+')[0]}" if version else package)
    return tuple(sorted(pins))


def installed(package: str) -> str | None:
    """The version of a package in this environment, without importing it; that of its form for GPUs, where that is."""
    for name in (package, f"{package}-gpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def environment_folder(pins: tuple[str, ...] = ()) -> Path:
    """Where the server's environment is or will be, for this Python and its packages' folders."""
    key = [platform.python_version(), sys.prefix, PYTRITON, NUMPY, *pins, *user_packages()]
    return cache_folder() / f"triton-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"


def user_packages() -> list[str]:
    """The folders on this interpreter's path that hold installed packages."""
    return [entry for entry in sys.path if entry and any(Path(entry).glob("*.dist-info"))]


def ensure_environment(progress: Progress, *, pins: tuple[str, ...] = ()) -> ServerEnvironment:
    """The server's environment, made now if this is the first time.

    Raises:
        ServerUnavailable: it cannot be made here, or could not be installed.
        LibraryMissing: the server needs a shared library that is not on this machine.
    """
    if PYTHON not in PYTHONS:
        raise ServerUnavailable(
            f"the bundled Triton has no server for Python {PYTHON}",
            why=f"nvidia-pytriton with numpy < 2 runs on Python {' and '.join(PYTHONS)}",
            next_step=f"run kpdeploy serve in an environment of Python {PYTHONS[0]}",
        )
    folder = environment_folder(pins)
    wanted = [["--no-deps", PYTRITON], ["--no-deps", NUMPY], *([pin] for pin in pins)]
    make_environment(folder, wanted, progress, title="installing tritonserver, once (about 130 MB)")
    environment = ServerEnvironment(prefix=folder)
    check_libraries(environment)
    return environment


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes; the system gives it back when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_environment(folder: Path, wanted: list[list[str]], progress: Progress, *, title: str) -> None:
    """Make a virtual environment in `folder`, unless it is there: `wanted` (pip's arguments) before the packages of
    the user's environment.

    Raises:
        ServerUnavailable: it cannot be made here, or could not be installed.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _make(folder, wanted, progress, title)
    except OSError as error:
        raise ServerUnavailable(
            f"the server's environment cannot be made in {folder.parent}",
            why=str(error),
            next_step="set XDG_CACHE_HOME to a folder with 500 MB of free space",
        ) from None


def _make(folder: Path, wanted: list[list[str]], progress: Progress, title: str) -> None:
    """Install aside, then rename: a folder of this name is always whole. Call with the lock held."""
    for leftover in folder.parent.glob(f"{folder.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        with progress.step(title, total=len(wanted) + 1) as advance:
            venv.create(aside, with_pip=False, symlinks=True)
            advance()
            for arguments in wanted:
                _install(aside, arguments)
                advance()
        packages = ServerEnvironment(prefix=aside).site_packages
        # Path entries of a .pth come after the folder they are in: what was installed here is found first.
        (packages / "kpdeploy-user.pth").write_text("".join(f"{entry}\n" for entry in user_packages()))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _install(prefix: Path, arguments: list[str]) -> None:
    command = [*_installer(prefix), "--only-binary", ":all:", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_without_pip_target())
    if done.returncode:
        raise ServerUnavailable(
            f"the server's environment could not be installed ({arguments[-1]})",
            why=pip_reason(done.stderr + done.stdout) or f"exit status {done.returncode}",
            next_step="check the network and pip's settings, then run the command again",
        )


def pip_reason(output: str) -> str:
    """Why pip failed. Offline it says only "no matching distribution" at its end; the reason is in a warning."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    broken = [line.partition("connection broken by ")[2] for line in lines if "connection broken by " in line]
    errors = [line for line in lines if "error" in line.lower()]
    return next(iter((broken or errors or lines)[-1:]), "")


def _installer(prefix: Path) -> list[str]:
    """How to install into `prefix` from here: this environment's pip, uv, or the pip that Python bundles."""
    python = str(prefix / "bin" / "python")
    if importlib.util.find_spec("pip"):
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
        return [sys.executable, "-m", "pip", "--python", python, "install", *quiet]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", python]
    done = subprocess.run([python, "-m", "ensurepip"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerUnavailable(
            "there is no pip to install the server's environment with",
            why=f"{sys.executable} has neither pip nor ensurepip",
            next_step="install pip (on Debian: apt install python3-pip python3-venv)",
        )
    return [python, "-m", "pip", "install", "--quiet", "--no-input"]


def _without_pip_target() -> dict[str, str]:
    """The environment without settings that would send packages elsewhere."""
    elsewhere = ("PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in elsewhere}


def shared_libpython() -> str:
    """The file of the shared libpython that the stub will find; empty if there is none."""
    places = [sysconfig.get_config_var("LIBDIR") or "", f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}"]
    files = (Path(place) / f"libpython{PYTHON}.so.1.0" for place in (*places, "/usr/lib64", "/usr/lib", "/lib64"))
    return next((str(file) for file in files if file.is_file()), "")


def check_libraries(environment: ServerEnvironment) -> None:
    """Raise LibraryMissing unless the server and its stub find every shared library they need."""
    missing: list[str] = []
    for binary in (environment.binary, environment.stub):
        done = subprocess.run(
            ["ldd", str(binary)], capture_output=True, text=True, check=False, env=environment.variables()
        )
        missing += missing_libraries(done.stdout + done.stderr)
    if missing:
        raise LibraryMissing(
            "the bundled tritonserver cannot run on this machine",
            why=f"not found: {', '.join(dict.fromkeys(missing))}",
            next_step=_remedy(missing),
        )


def missing_libraries(ldd: str) -> list[str]:
    """The sonames, and the versions of glibc, that ldd's output says are not found."""
    missing = []
    for line in ldd.splitlines():
        if "=> not found" in line:
            missing.append(line.split()[0])
        elif "not found (required by" in line:
            missing.append(line.partition("version `")[2].partition("'")[0])
    return missing


def _remedy(missing: list[str]) -> str:
    if any(name.startswith("GLIBC") for name in missing):
        return f"use a system with glibc 2.34 or newer (Debian 12, Ubuntu 22.04); this one has {platform.libc_ver()[1]}"
    if any(name.startswith("libpython") for name in missing):
        return f"install Python's shared library (on Debian: apt install libpython{PYTHON})"
    return "install the packages that hold these libraries"
