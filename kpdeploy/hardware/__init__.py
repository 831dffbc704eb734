"""What is on this machine: processor, memory, accelerators, and the packages that matter. Asking never fails: what is
there and cannot be used is a Problem with its next step."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from kpdeploy.hardware.accelerator import Accelerator, Problem
from kpdeploy.hardware.nvidia import Gpu, nvidia_gpus, nvidia_smi, parse_nvidia_smi
from kpdeploy.hardware.others import other_accelerators
from kpdeploy.hardware.pci import ROOT
from kpdeploy.hardware.pci import read as _read

__all__ = [
    "Accelerator",
    "Gpu",
    "Hardware",
    "Problem",
    "conditions",
    "detect",
    "environment",
    "memory_bytes",
    "packages",
    "parse_nvidia_smi",
    "quota_cores",
    "usable_cores",
]

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""The instruction sets that decide how fast a model runs, as /proc/cpuinfo spells them."""

PACKAGES = (
    "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino", "nncf", "transformers", "safetensors",
    "timm", "numpy", "tritonclient", "matplotlib",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """This machine. `usable_cores` is what this process may use: affinity and container limits included. `others` are
    accelerators that are no NVIDIA GPUs; `problems` say why one that is there cannot be used."""

    cpu: str
    physical_cores: int
    logical_cores: int
    usable_cores: float
    isa: tuple[str, ...]
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    others: tuple[Accelerator, ...] = ()
    problems: tuple[Problem, ...] = ()


def detect(root: Path = ROOT) -> Hardware:
    """What is on this machine; what cannot be told is empty or 0. Accelerators are looked for below `root`."""
    info = _read("/proc/cpuinfo")
    flags = set((_field(info, "flags") or _field(info, "Features")).split())
    logical = os.cpu_count() or 0
    gpus, problems = nvidia_gpus(root)
    others, more = other_accelerators(root)
    return Hardware(
        cpu=_field(info, "model name") or platform.processor() or platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=usable_cores(),
        isa=tuple(name for name in ISA if name in flags),
        memory_bytes=memory_bytes(),
        gpus=tuple(gpus),
        others=tuple(others),
        problems=(*problems, *more),
    )


def usable_cores() -> float:
    """Cores this process may use: its affinity, or less where a cgroup limits its share."""
    cores = float(len(os.sched_getaffinity(0)))
    limits = [quota_cores(_read(path)) for path in _cgroup_files("cpu.max")]
    # cgroup v1 keeps the two numbers apart.
    old = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    if old:
        limits.append(quota_cores(f"{old} {_read('/sys/fs/cgroup/cpu/cpu.cfs_period_us')}"))
    return min([cores, *(limit for limit in limits if limit)])


def quota_cores(text: str) -> float:
    """The cores that a cgroup's "quota period" allows; 0 where there is no limit."""
    quota, _, period = text.strip().partition(" ")
    if quota.isdigit() and period.strip().isdigit() and int(period):
        return int(quota) / int(period)
    return 0.0


def memory_bytes() -> int:
    """The memory this process may use: the machine's, or less where a cgroup limits it."""
    files = [*_cgroup_files("memory.max"), "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
    limits = [int(text) for text in (_read(path).strip() for path in files) if text.isdigit()]
    return min([int(psutil.virtual_memory().total), *limits])


def _cgroup_files(name: str) -> list[str]:
    """The file of this process's cgroup (version 2) and of those above it."""
    root = Path("/sys/fs/cgroup")
    own = root / _read("/proc/self/cgroup").partition("0::/")[2].partition("\n")[0]
    return [str(folder / name) for folder in (own, *own.parents) if folder.is_relative_to(root)]


def _field(info: str, name: str) -> str:
    """The first value of a field of /proc/cpuinfo."""
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def packages() -> dict[str, str]:
    """The versions of the installed packages that matter, read without importing them."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if "onnxruntime-gpu" in found:  # the same module, by another name
        found.setdefault("onnxruntime", found["onnxruntime-gpu"])
    return found


def environment() -> dict[str, Any]:
    """Where something was made or measured, for manifests: JSON values only."""
    machine = detect()
    return {
        "cpu": machine.cpu,
        "isa": list(machine.isa),
        "cores": machine.usable_cores,
        "memory_bytes": machine.memory_bytes,
        "gpus": [asdict(gpu) for gpu in machine.gpus],
        "accelerators": [asdict(device) for device in machine.others],
        "os": _os(),
        "kernel": platform.release().partition("-")[0],
        "glibc": platform.libc_ver()[1],
        "python": platform.python_version(),
        "packages": packages(),
    }


def conditions() -> dict[str, Any]:
    """What changes from minute to minute and decides how fast something runs, where it can be read; JSON values."""
    clocks = psutil.cpu_freq()
    return {
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "clock_mhz": round(clocks.current) if clocks else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "steal_seconds": psutil.cpu_times().steal,
        "gpu_clocks_mhz": [int(line) for line in nvidia_smi("clocks.sm").split() if line.isdigit()],
    }


def _os() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
