"""NVIDIA GPUs, through the driver's management library; and why there are none where the bus holds one."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpdeploy.hardware.accelerator import Problem
from kpdeploy.hardware.pci import DISPLAYS, devices, read

VENDOR = "0x10de"

BF16_SINCE, FP8_SINCE = (8, 0), (8, 9)
"""The compute capabilities whose tensor cores multiply bf16 (Ampere) and fp8 (Ada, Hopper)."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU. `capability` is its compute capability, such as "9.0"."""

    name: str
    capability: str
    memory_bytes: int
    driver: str

    @property
    def units(self) -> tuple[str, ...]:
        """The short formats that its tensor cores multiply."""
        major, _, minor = self.capability.partition(".")
        version = (int(major), int(minor or 0)) if major.isdigit() else (0, 0)
        return tuple(name for name, since in (("bf16", BF16_SINCE), ("fp8", FP8_SINCE)) if version >= since)


def nvidia_gpus(root: Path) -> tuple[list[Gpu], list[Problem]]:
    """The GPUs that can be used, and what keeps others from it."""
    library = _library()
    if library is not None:
        gpus, problems = _asked(library, root)
    else:
        gpus = list(parse_nvidia_smi(nvidia_smi("name,compute_cap,memory.total,driver_version")))
        problems = _of_torch((0, 0)) if gpus else []
    on_bus = [device for device in devices(root, VENDOR) if device.kind.startswith(DISPLAYS)]
    if on_bus and not gpus and not problems:
        problems = [_unreached(library, root, len(on_bus), on_bus[0].driver)]
    return gpus, problems


def _library() -> Any:
    """NVML, or None where it is not installed."""
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None


def _asked(nvml: Any, root: Path) -> tuple[list[Gpu], list[Problem]]:
    if code := nvml.nvmlInit_v2():
        return [], [_refusal(code, root)]
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        driver = ctypes.create_string_buffer(96)
        nvml.nvmlSystemGetDriverVersion(driver, len(driver))
        gpus, problems = [], []
        for index in range(count.value):
            found = _gpu(nvml, index, driver.value.decode(errors="replace"))
            if isinstance(found, Gpu):
                gpus.append(found)
            else:
                problems.append(_refusal(found, root, f"GPU {index} cannot be used"))
        return gpus, [*problems, *(_of_torch(_cuda_of(nvml)) if gpus else [])]
    finally:
        nvml.nvmlShutdown()


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _gpu(nvml: Any, index: int, driver: str) -> Gpu | int:
    """A GPU, or NVML's code of what is wrong with it."""
    device = ctypes.c_void_p()
    if code := nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)):
        return int(code)
    name = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(device, name, len(name))
    memory = _Memory()
    nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{major.value}.{minor.value}",
        memory_bytes=memory.total,
        driver=driver,
    )


def taken_bytes() -> int | None:
    """What all processes hold of the memory of all NVIDIA GPUs now; None where the driver does not tell."""
    nvml = _library()
    if nvml is None or nvml.nvmlInit_v2():
        return None
    try:
        count, device, memory = ctypes.c_uint(), ctypes.c_void_p(), _Memory()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        taken = 0
        for index in range(count.value):
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)):
                return None
            nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
            taken += memory.used
        return taken
    finally:
        nvml.nvmlShutdown()


RESTART = "restart the machine, or stop what uses the GPU and load the modules anew (rmmod nvidia_uvm nvidia; modprobe)"
REFUSALS = {
    4: (
        "this user may not open /dev/nvidia*",
        "add the user to the group of these files; start a container with --gpus all",
    ),
    9: ("the driver's kernel module is not loaded", "modprobe nvidia; if it fails, dmesg says why"),
    12: (
        "a library of the driver is missing",
        "install the driver's libraries of the kernel module's version; --gpus all in Docker",
    ),
    15: ("the GPU has fallen off the bus", "look for Xid in dmesg, and restart the machine"),
    16: ("the GPU needs a reset", "stop what uses it, and restart the machine or reset the GPU"),
    18: ("the driver's kernel module and its libraries are of different versions", RESTART),
}
"""NVML's codes (nvmlReturn_t) that a user can do something about: what is wrong, and the next step."""


def _refusal(code: int, root: Path, what: str = "the NVIDIA GPUs cannot be used") -> Problem:
    why, next_step = REFUSALS.get(code, (f"the driver answers with NVML's code {code}", "nvidia-smi may say more"))
    if code == 18 and (loaded := _module_version(root)):
        why += f" (the module is {loaded})"
    return Problem(what=f"{what}: {why}", next_step=next_step)


def _module_version(root: Path) -> str:
    """The version of the kernel module that is loaded."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", read(root / "proc/driver/nvidia/version"))
    return found[1] if found else ""


def _unreached(library: Any, root: Path, count: int, driver: str) -> Problem:
    """GPUs on the bus of which the driver tells nothing."""
    what = f"{count} NVIDIA GPU{'s are' if count > 1 else ' is'} on the bus"
    if driver == "vfio-pci":
        return Problem(what=f"{what}, held by vfio-pci for a virtual machine", next_step="use it there, or unbind it")
    if driver == "nouveau":
        return Problem(
            what=f"{what}, held by nouveau, which runs no CUDA", next_step="install NVIDIA's driver, which replaces it"
        )
    if library is None:
        loaded = _module_version(root)
        return Problem(
            what=f"{what}, and the driver's library libnvidia-ml.so.1 is not here",
            next_step=f"start the container with --gpus all (the machine has driver {loaded})"
            if loaded
            else "install NVIDIA's driver",
        )
    return Problem(what=f"{what}, and the driver tells of none", next_step="start the container with --gpus all")


def _cuda_of(library: Any) -> tuple[int, int]:
    """The newest CUDA that the driver runs, such as (12, 4); (0, 0) where it cannot be told."""
    version = ctypes.c_int()
    with contextlib.suppress(AttributeError):  # an old library
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _of_torch(driver: tuple[int, int]) -> list[Problem]:
    """Whether the torch that is installed can use the GPUs: read from its files, for importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return []
    text = read(Path(found.origin).with_name("version.py"))
    if re.search(r"^hip\b[^=]*= *'", text, re.MULTILINE):
        return [Problem(what="this torch is built for AMD's ROCm", next_step="pip install torch from another index")]
    built = re.search(r"^cuda\b[^=]*= *'(\d+)\.(\d+)'", text, re.MULTILINE)
    if built is None:
        index = f"cu{driver[0]}{driver[1]}" if any(driver) else "cu126"
        return [
            Problem(
                what="this torch is built without CUDA, and leaves the GPUs idle",
                next_step=f"pip install torch --index-url https://download.pytorch.org/whl/{index} "
                "(or the next lower that is there)",
            )
        ]
    # Within a major release any driver of it will do (NVIDIA's "minor version compatibility").
    if any(driver) and int(built[1]) > driver[0]:
        return [
            Problem(
                what=f"torch needs CUDA {built[1]}.{built[2]}, the driver runs CUDA {driver[0]}.{driver[1]} at most",
                next_step=f"install a newer driver, or torch for CUDA {driver[0]}",
            )
        ]
    return []


def nvidia_smi(fields: str) -> str:
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
