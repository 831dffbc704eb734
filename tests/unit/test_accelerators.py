"""Accelerators of every kind and every way in which one is there and cannot be used, on machines made of files."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest

from kpdeploy.hardware import Gpu, detect, nvidia
from kpdeploy.hardware.nvidia import nvidia_gpus
from kpdeploy.hardware.others import other_accelerators


def device(root: Path, address: str, vendor: str, number: str, kind: str, driver: str = "", **files: str) -> Path:
    """A PCI device in a fake sysfs."""
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, text in {"vendor": vendor, "device": number, "class": kind, **files}.items():
        (folder / name).write_text(f"{text}\n")
    if driver:
        (root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(root / "drivers" / driver)
    return folder


def written(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@dataclass
class Nvml:
    """libnvidia-ml as far as it is asked: `init` and `handle` are the codes it answers with."""

    init: int = 0
    handle: int = 0
    count: int = 1
    cuda: int = 12040
    down: bool = False

    def nvmlInit_v2(self) -> int:
        return self.init

    def nvmlShutdown(self) -> int:
        self.down = True
        return 0

    def nvmlDeviceGetCount_v2(self, count: object) -> int:
        count._obj.value = self.count  # type: ignore[attr-defined]
        return 0

    def nvmlSystemGetDriverVersion(self, text: ctypes.Array[ctypes.c_char], size: int) -> int:
        text.value = b"550.54.15"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, version: object) -> int:
        version._obj.value = self.cuda  # type: ignore[attr-defined]
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: object, handle: object) -> int:
        return self.handle

    def nvmlDeviceGetName(self, handle: object, text: ctypes.Array[ctypes.c_char], size: int) -> int:
        text.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: object, memory: object) -> int:
        memory._obj.total = 80 << 30  # type: ignore[attr-defined]
        memory._obj.used = 3 << 30  # type: ignore[attr-defined]
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: object, major: object, minor: object) -> int:
        major._obj.value, minor._obj.value = 9, 0  # type: ignore[attr-defined]
        return 0


TORCH = "hip: Optional[str] = None\ncuda: Optional[str] = {}\n"


@pytest.fixture(autouse=True)
def no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def with_nvml(monkeypatch: pytest.MonkeyPatch, library: Nvml | None) -> None:
    monkeypatch.setattr(nvidia, "_library", lambda: library)


def with_torch(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
    written(folder / "torch/__init__.py")
    written(folder / "torch/version.py", version)

    class Spec:
        origin = str(folder / "torch/__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec if name == "torch" else None)


def test_what_is_taken_of_a_gpu_is_the_drivers_figure_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with_nvml(monkeypatch, Nvml())
    assert nvidia.taken_bytes() == 3 << 30
    with_nvml(monkeypatch, None)
    assert nvidia.taken_bytes() is None


def test_an_h100_with_a_torch_of_its_cuda_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml(count=2)
    with_nvml(monkeypatch, library)
    with_torch(monkeypatch, tmp_path, TORCH.format("'12.8'"))
    gpus, problems = nvidia_gpus(tmp_path)
    gpu = Gpu(name="NVIDIA H100 80GB HBM3", capability="9.0", memory_bytes=80 << 30, driver="550.54.15")
    assert gpus == [gpu, gpu]
    assert gpu.units == ("bf16", "fp8")
    assert problems == []
    assert library.down


@pytest.mark.parametrize(("capability", "units"), [("7.5", ()), ("8.0", ("bf16",)), ("8.9", ("bf16", "fp8")), ("", ())])
def test_units_follow_from_the_capability(capability: str, units: tuple[str, ...]) -> None:
    assert Gpu(name="", capability=capability, memory_bytes=0, driver="").units == units


@pytest.mark.parametrize(
    ("code", "says", "next_step"),
    [
        (4, "may not open /dev/nvidia*", "--gpus all"),
        (9, "kernel module is not loaded", "modprobe nvidia"),
        (15, "fallen off the bus", "Xid"),
        (18, "of different versions (the module is 550.54.15)", "restart the machine"),
        (999, "NVML's code 999", "nvidia-smi"),
    ],
)
def test_a_driver_that_refuses_is_told_with_the_next_step(
    code: int, says: str, next_step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device(tmp_path, "0000:01:00.0", "0x10de", "0x2330", "0x030200", driver="nvidia")
    written(
        tmp_path / "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
    )
    with_nvml(monkeypatch, Nvml(init=code))
    gpus, (problem,) = nvidia_gpus(tmp_path)
    assert gpus == []
    assert says in problem.what
    assert next_step in problem.next_step


def test_one_gpu_that_is_lost_leaves_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nvml(monkeypatch, Nvml(handle=15, count=1))
    gpus, (problem,) = nvidia_gpus(tmp_path)
    assert gpus == []
    assert problem.what == "GPU 0 cannot be used: the GPU has fallen off the bus"


@pytest.mark.parametrize(
    ("driver", "library", "module", "says", "next_step"),
    [
        ("", None, "", "libnvidia-ml.so.1 is not here", "install NVIDIA's driver"),
        ("nvidia", None, "Kernel Module  580.1 ", "libnvidia-ml.so.1 is not here", "(the machine has driver 580.1)"),
        ("nouveau", None, "", "held by nouveau", "install NVIDIA's driver"),
        ("vfio-pci", None, "", "for a virtual machine", "unbind"),
        ("nvidia", Nvml(count=0), "", "the driver tells of none", "--gpus all"),
    ],
)
def test_a_gpu_on_the_bus_that_nothing_tells_of(
    driver: str,
    library: Nvml | None,
    module: str,
    says: str,
    next_step: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device(tmp_path, "0000:01:00.0", "0x10de", "0x2330", "0x030200", driver=driver)
    device(tmp_path, "0000:01:00.1", "0x10de", "0x22ba", "0x040300")  # its sound
    written(tmp_path / "proc/driver/nvidia/version", module)
    with_nvml(monkeypatch, library)
    gpus, (problem,) = nvidia_gpus(tmp_path)
    assert gpus == []
    assert problem.what.startswith("1 NVIDIA GPU is on the bus")
    assert says in problem.what
    assert next_step in problem.next_step


@pytest.mark.parametrize(
    ("version", "says", "next_step"),
    [
        (TORCH.format("None"), "built without CUDA", "whl/cu124"),
        (TORCH.format("'13.0'"), "torch needs CUDA 13.0, the driver runs CUDA 12.4 at most", "newer driver"),
        ("hip: Optional[str] = '6.2'\ncuda: Optional[str] = None\n", "built for AMD's ROCm", "pip install torch"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_is_told(
    version: str, says: str, next_step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nvml(monkeypatch, Nvml())
    with_torch(monkeypatch, tmp_path, version)
    gpus, (problem,) = nvidia_gpus(tmp_path)
    assert len(gpus) == 1
    assert says in problem.what
    assert next_step in problem.next_step


def test_a_machine_without_accelerators_has_none_and_nothing_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nvml(monkeypatch, None)
    machine = detect(tmp_path)
    assert (machine.gpus, machine.others, machine.problems) == ((), (), ())


def amd_machine(root: Path, *, driver: str = "amdgpu") -> None:
    files = {"mem_info_vram_total": str(192 << 30), "product_name": "AMD Instinct MI300X"}
    device(root, "0000:05:00.0", "0x1002", "0x74a1", "0x120000", driver=driver, **files)
    written(root / "sys/class/kfd/kfd/topology/nodes/0/properties", "cpu_cores_count 64\ngfx_target_version 0\n")
    written(root / "sys/class/kfd/kfd/topology/nodes/1/properties", "simd_count 1216\ngfx_target_version 90402\n")
    written(root / "sys/module/amdgpu/version", "6.8.5\n")
    written(root / "opt/rocm-6.2.0/.info/version", "6.2.0-66\n")


def test_an_amd_gpu_has_its_architecture_memory_driver_and_runtime(tmp_path: Path) -> None:
    amd_machine(tmp_path)
    written(tmp_path / "dev/kfd")
    (gpu,), problems = other_accelerators(tmp_path)
    assert (gpu.vendor, gpu.name, gpu.memory_bytes) == ("AMD", "AMD Instinct MI300X (gfx942)", 192 << 30)
    assert (gpu.driver, gpu.runtime) == ("amdgpu 6.8.5", "ROCm 6.2.0-66")
    assert problems == []


def test_an_amd_gpu_without_driver_or_that_the_user_may_not_open(tmp_path: Path) -> None:
    amd_machine(tmp_path, driver="")
    _, problems = other_accelerators(tmp_path)
    assert "no driver holds the AMD GPU 0x74a1 at 0000:05:00.0" in problems[0].what
    assert "dev/kfd" in problems[1].what
    assert "group render" in problems[1].next_step


def test_intel_gpus_inside_and_beside_the_processor(tmp_path: Path) -> None:
    device(tmp_path, "0000:00:02.0", "0x8086", "0x7d55", "0x030000", driver="i915")
    card = device(tmp_path, "0000:03:00.0", "0x8086", "0x56a0", "0x030000", driver="xe")
    device(tmp_path, "0000:00:1f.0", "0x8086", "0x7a86", "0x060100")  # a bridge
    written(card / "tile0/physical_vram_size_bytes", "0x00000003fa000000\n")
    written(tmp_path / "usr/lib/x86_64-linux-gnu/libze_intel_gpu.so.1")
    (inside, beside), problems = other_accelerators(tmp_path)
    assert (inside.name, inside.driver, inside.memory_bytes) == ("Intel integrated GPU 0x7d55", "i915", 0)
    assert (beside.name, beside.memory_bytes) == ("Intel discrete GPU 0x56a0", 0x3FA000000)
    assert beside.runtime == "Level Zero"
    assert problems == []


def test_tpu_chips_with_and_without_what_programs_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for index in range(4):
        device(tmp_path, f"0000:00:0{index + 4}.0", "0x1ae0", "0x0063", "0x120000", driver="vfio-pci")
    found, problems = other_accelerators(tmp_path)
    assert [chip.name for chip in found] == ["TPU v5e"] * 4
    assert "4 TPU chips are on the bus" in problems[0].what
    assert problems[1].next_step == "pip install libtpu"
    written(tmp_path / "dev/vfio/0")
    written(tmp_path / "usr/lib/libtpu.so")
    found, problems = other_accelerators(tmp_path)
    assert found[0].runtime == "libtpu.so"
    assert problems == []


def test_a_network_card_of_google_is_no_tpu(tmp_path: Path) -> None:
    device(tmp_path, "0000:00:03.0", "0x1ae0", "0x0042", "0x020000", driver="gvnic")
    assert other_accelerators(tmp_path) == ([], [])
