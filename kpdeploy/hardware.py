"""What is on this machine: processor, memory, GPUs, and the packages that matter. Asking never fails."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""The instruction sets that decide how fast a model runs, as /proc/cpuinfo spells them."""

PACKAGES = (
    "torch", "onnx", "onnxruntime", "onnxscript", "openvino", "transformers", "safetensors", "timm", "numpy",
    "tritonclient", "matplotlib",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU. `capability` is its compute capability, such as "9.0"."""

    name: str
    capability: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """This machine. `usable_cores` is what this process may use: affinity and container limits included."""

    cpu: str
    physical_cores: int
    logical_cores: int
    usable_cores: float
    isa: tuple[str, ...]
    memory_bytes: int
    gpus: tuple[Gpu, ...]


def detect() -> Hardware:
    """What is on this machine; what cannot be told is empty or 0."""
    info = _read("/proc/cpuinfo")
    flags = set((_field(info, "flags") or _field(info, "Features")).split())
    logical = os.cpu_count() or 0
    return Hardware(
        cpu=_field(info, "model name") or platform.processor() or platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=usable_cores(),
        isa=tuple(name for name in ISA if name in flags),
        memory_bytes=memory_bytes(),
        gpus=_gpus_of_nvml() or _gpus_of_nvidia_smi(),
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


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _field(info: str, name: str) -> str:
    """The first value of a field of /proc/cpuinfo."""
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _gpus_of_nvml() -> tuple[Gpu, ...]:
    """The GPUs that the driver's management library tells of; none where it is not installed."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        driver = ctypes.create_string_buffer(96)
        nvml.nvmlSystemGetDriverVersion(driver, len(driver))
        found = (_gpu_of_nvml(nvml, index, driver.value.decode(errors="replace")) for index in range(count.value))
        return tuple(gpu for gpu in found if gpu is not None)
    finally:
        nvml.nvmlShutdown()


def _gpu_of_nvml(nvml: ctypes.CDLL, index: int, driver: str) -> Gpu | None:
    device = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return None
    name = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(device, name, len(name))
    memory = _NvmlMemory()
    nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{major.value}.{minor.value}",
        memory_bytes=memory.total,
        driver=driver,
    )


def _gpus_of_nvidia_smi() -> tuple[Gpu, ...]:
    return parse_nvidia_smi(_nvidia_smi("name,compute_cap,memory.total,driver_version"))


def _nvidia_smi(fields: str) -> str:
    """What the driver's program says of each GPU, a line of comma-separated values each; nothing where it is absent."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    return ""


def parse_nvidia_smi(csv: str) -> tuple[Gpu, ...]:
    """GPUs from lines of "name, capability, MiB, driver"; lines that are something else are left out."""
    gpus = []
    for line in csv.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[2].isdigit():
            name, capability, memory, driver = parts
            gpus.append(Gpu(name=name, capability=capability, memory_bytes=int(memory) << 20, driver=driver))
    return tuple(gpus)


def packages() -> dict[str, str]:
    """The versions of the installed packages that matter, read without importing them."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
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
        "gpu_clocks_mhz": [int(line) for line in _nvidia_smi("clocks.sm").split() if line.isdigit()],
    }


def _os() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()
