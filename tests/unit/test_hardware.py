"""What the machine is, told without ever failing."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from kpdeploy import hardware


def test_this_machine_is_described() -> None:
    machine = hardware.detect()
    assert machine.cpu
    assert 0 < machine.usable_cores <= machine.logical_cores
    assert 0 < machine.memory_bytes <= psutil.virtual_memory().total
    assert set(machine.isa) <= set(hardware.ISA)


def test_the_environment_is_plain_json_with_versions() -> None:
    found = json.loads(json.dumps(hardware.environment()))
    assert found["packages"]["numpy"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.keys() >= {"cpu", "cores", "memory_bytes", "gpus", "os", "glibc"}


def test_versions_are_read_without_importing_the_packages() -> None:
    code = "import sys, kpdeploy.hardware as h; h.environment(); print({'torch', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_readable_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_read", lambda path: "")
    monkeypatch.setenv("PATH", "")
    machine = hardware.detect()
    assert machine.isa == ()
    assert machine.usable_cores > 0


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", 0.0), ("150000 100000\n", 1.5), ("-1 100000", 0.0), ("", 0.0), ("100000", 0.0)]
)
def test_a_cgroup_quota_is_read_as_cores(text: str, cores: float) -> None:
    assert hardware.quota_cores(text) == cores


def test_a_container_limit_lowers_what_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"cpu.max": "50000 100000", "memory.max": "1048576"}
    monkeypatch.setattr(hardware, "_read", lambda path: limits.get(path.rpartition("/")[2], ""))
    assert hardware.usable_cores() == 0.5
    assert hardware.memory_bytes() == 1048576


def test_nvidia_smi_lines_become_gpus_and_others_are_left_out() -> None:
    csv = "NVIDIA H100 80GB HBM3, 9.0, 81559, 550.54.15\nNo devices were found\nTesla T4, 7.5, [N/A], 550.54.15\n"
    (gpu,) = hardware.parse_nvidia_smi(csv)
    assert gpu == hardware.Gpu(
        name="NVIDIA H100 80GB HBM3", capability="9.0", memory_bytes=81559 << 20, driver="550.54.15"
    )
