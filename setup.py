"""Everything is declared in pyproject.toml; this file builds the kernels (csrc/) with CMake and ninja.

They are left out, and the package works without them, where KPDEPLOY_SKIP_KERNELS=1 or there is no C++ compiler.
kpdeploy/lib/ then holds no library, and `kpdeploy.ops` says so. Kernels for NVIDIA GPUs join them where nvcc is, unless
KPDEPLOY_CUDA=0. See csrc/BUILD.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def missing() -> str:
    """Why the kernels cannot be built here; empty where they can."""
    if os.environ.get("KPDEPLOY_SKIP_KERNELS") == "1":
        return "KPDEPLOY_SKIP_KERNELS=1"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler (c++, g++ or clang++) on PATH"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"no Python.h in {sysconfig.get_path('include')} (apt install python3-dev)"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"no {tool} on PATH"
    return ""


def torch_folder() -> Path | None:
    """The installed torch. pip's build isolation hides it from imports, not from the file system."""
    given = os.environ.get("KPDEPLOY_TORCH")
    places = [Path(given)] if given else [Path(p) / "torch" for p in (sysconfig.get_path("platlib"), *sys.path) if p]
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").is_file()), None)


def nvcc() -> Path | str:
    """CUDA's compiler, or why there is none."""
    if os.environ.get("KPDEPLOY_CUDA") == "0":
        return "KPDEPLOY_CUDA=0"
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else "no nvcc on PATH or in /usr/local/cuda/bin"


def put(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        # Unlinked first: a running process may have the older one loaded.
        (folder / file.name).unlink(missing_ok=True)
        shutil.copy2(file, folder / file.name)


class BuildKernels(build_ext):
    """`kpdeploy._core` stands for all three libraries: they are built together, into kpdeploy/ and kpdeploy/lib/."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build, made = Path(self.build_temp).resolve() / "kernels", Path(self.build_temp).resolve() / "made"
        torch = torch_folder()
        if torch is None:
            print("kpdeploy: no installed torch (2.10 or later) found; its adapter is left out", file=sys.stderr)
        cuda = nvcc()
        if isinstance(cuda, str):
            print(f"kpdeploy: built without CUDA kernels: {cuda}", file=sys.stderr)
        configure = {
            "KPDEPLOY_TORCH": torch or "",
            "KPDEPLOY_NVCC": "" if isinstance(cuda, str) else cuda,
            "KPDEPLOY_PYBIND11": pybind11.get_include(),
            "KPDEPLOY_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "KPDEPLOY_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "KPDEPLOY_OUTPUT": made,
        }
        definitions = [f"-D{name}={value}" for name, value in configure.items()]
        subprocess.run(["cmake", "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", *definitions], check=True)
        subprocess.run(["ninja", "-C", build], check=True)
        put(made.glob("_core*"), target.parent)
        put(made.glob("lib*"), target.parent / "lib")

    def copy_extensions_to_source(self) -> None:
        """`build_ext --inplace` and editable installs."""
        built = Path(self.build_lib).resolve() / "kpdeploy"
        put(built.glob("_core*"), ROOT / "kpdeploy")
        put((built / "lib").glob("lib*"), ROOT / "kpdeploy" / "lib")

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        folders = {Path(output).parent / "lib" for output in outputs}
        return [*outputs, *(str(file) for folder in sorted(folders) for file in folder.glob("*.so"))]


reason = missing()
if reason:
    print(f"kpdeploy: built without kernels: {reason}", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("kpdeploy._core", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
