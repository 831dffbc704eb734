"""AMD and Intel GPUs and Google's TPUs, as sysfs and the files of their runtimes tell."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from kpdeploy.hardware.accelerator import Accelerator, Problem
from kpdeploy.hardware.pci import DISPLAYS, Device, devices, number, read

AMD, INTEL, GOOGLE = "0x1002", "0x8086", "0x1ae0"

TPUS = {
    "0x0027": "TPU v2 or v3",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU7x",
}
"""Google's device numbers: jax/_src/hardware_utils.py."""

Found = tuple[list[Accelerator], list[Problem]]

LIBRARIES = ("usr/lib", "usr/lib64", "usr/lib/*-linux-gnu", "usr/local/lib", "opt/rocm*/lib")


def other_accelerators(root: Path) -> Found:
    """What is there beside NVIDIA's, and what is wrong with it."""
    found: list[Accelerator] = []
    problems: list[Problem] = []
    for kind in (_amd, _intel, _tpu):
        devices, told = kind(root)
        found += devices
        problems += told
    return found, problems


def _amd(root: Path) -> Found:
    """ROCm's kernel driver lists its GPUs in a topology, with the architecture; memory is the graphics driver's."""
    nodes = [_properties(node) for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"))]
    targets = [int(node["gfx_target_version"]) for node in nodes if int(node.get("gfx_target_version", "0"))]
    version = read(root / "sys/module/amdgpu/version").strip()
    release = next((read(file).strip() for file in sorted(root.glob("opt/rocm*/.info/version"))), "")
    runtime = f"ROCm {release}" if release else _library(root, "libamdhip64.so*")
    found, problems = [], []
    on_bus = [device for device in devices(root, AMD) if device.kind.startswith((DISPLAYS, "0x12"))]
    for index, device in enumerate(on_bus):
        target = f" ({_gfx(targets[index])})" if index < len(targets) else ""
        found.append(
            Accelerator(
                vendor="AMD",
                name=(read(device.folder / "product_name").strip() or f"AMD GPU {device.device}") + target,
                memory_bytes=number(device.folder / "mem_info_vram_total"),
                driver=f"{device.driver} {version}".strip(),
                runtime=runtime,
            )
        )
    problems += list(_driverless("AMD GPU", on_bus, "install the amdgpu driver: it comes with Linux and with ROCm"))
    kfd = root / "dev/kfd"
    if targets and not _writable(kfd):
        problems.append(_closed("AMD GPUs", kfd, "render"))
    return found, problems


def _properties(path: Path) -> dict[str, str]:
    pairs = (line.split() for line in read(path).splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _gfx(version: int) -> str:
    """90402 is gfx942: major, minor and stepping in two decimal digits each, the last two written in hex."""
    major, minor, stepping = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{stepping:x}"


def _intel(root: Path) -> Found:
    runtime = _library(root, "libze_intel_gpu.so*") and "Level Zero"
    found = []
    gpus = [device for device in devices(root, INTEL) if device.kind.startswith(DISPLAYS)]
    for device in gpus:
        # The one inside a processor is always device 02 on bus 00.
        kind = "integrated" if device.folder.name.startswith("0000:00:02.") else "discrete"
        cards = sorted(device.folder.glob("drm/card*"))
        memory = next((number(card / "lmem_total_bytes") for card in cards), 0)
        memory = memory or sum(number(file) for file in device.folder.glob("tile*/physical_vram_size_bytes"))
        name = f"Intel {kind} GPU {device.device}"
        found.append(Accelerator(vendor="Intel", name=name, memory_bytes=memory, driver=device.driver, runtime=runtime))
    return found, list(_driverless("Intel GPU", gpus, "it needs a kernel with the driver i915 or xe"))


def _tpu(root: Path) -> Found:
    """A TPU's chips are PCI devices of Google's; programs open them as /dev/accel* or /dev/vfio/*."""
    chips = [device for device in devices(root, GOOGLE) if device.device in TPUS]
    runtime = "libtpu" if importlib.util.find_spec("libtpu") else _library(root, "libtpu.so*")
    found = [
        Accelerator(vendor="Google", name=TPUS[chip.device], driver=chip.driver, runtime=runtime) for chip in chips
    ]
    problems = []
    nodes = [*(root / "dev").glob("accel*"), *(root / "dev/vfio").glob("[0-9]*")]
    if chips and not nodes:
        problems.append(
            Problem(
                what=f"{len(chips)} TPU chips are on the bus, and neither /dev/accel* nor /dev/vfio/* is there",
                next_step="in a container, pass them through: --privileged, or --device for each",
            )
        )
    elif chips and not any(map(_writable, nodes)):
        problems.append(_closed("TPU chips", nodes[0], "that of the file"))
    if chips and not runtime:
        problems.append(Problem(what="the TPU's runtime is not installed", next_step="pip install libtpu"))
    return found, problems


def _driverless(what: str, found: Iterable[Device], next_step: str) -> Iterator[Problem]:
    for device in found:
        if not device.driver:
            yield Problem(
                what=f"no driver holds the {what} {device.device} at {device.folder.name}", next_step=next_step
            )


def _closed(what: str, path: Path, group: str) -> Problem:
    return Problem(
        what=f"this user may not open {path}, through which programs reach the {what}",
        next_step=f"add the user to the group {group} (or give the container the device), and log in again",
    )


def _writable(path: Path) -> bool:
    # Asked and not opened: opening a VFIO group takes it from whoever else would.
    return os.access(path, os.R_OK | os.W_OK)


def _library(root: Path, pattern: str) -> str:
    """The name of a library that matches, or ""."""
    return next((file.name for place in LIBRARIES for file in sorted(root.glob(f"{place}/{pattern}"))), "")
