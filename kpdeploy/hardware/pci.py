"""What sysfs tells of the devices on the PCI bus, whether or not a driver knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Where sysfs, procfs and devices are; a test has a folder of its own."""

DISPLAYS = "0x03"
"""PCI's class of display controllers, of which a GPU is one: VGA 0300, 3D 0302, others 0380."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device on the bus: its numbers as sysfs spells them ("0x10de"), and the driver that holds it, or ""."""

    vendor: str
    device: str
    kind: str
    driver: str
    folder: Path


def devices(root: Path, vendor: str) -> list[Device]:
    """The devices of a vendor, in the order of their addresses."""
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        if read(folder / "vendor").strip() == vendor:
            link = folder / "driver"
            found.append(
                Device(
                    vendor=vendor,
                    device=read(folder / "device").strip(),
                    kind=read(folder / "class").strip(),
                    driver=link.resolve().name if link.exists() else "",
                    folder=folder,
                )
            )
    return found


def read(path: str | Path) -> str:
    """A file's text, or "" where it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def number(path: Path) -> int:
    """The whole number in a file of sysfs, decimal or 0x…, or 0."""
    try:
        return int(read(path).strip(), 0)
    except ValueError:
        return 0
