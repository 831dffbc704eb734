"""The machine of a server that runs beside the probe: how much is asked of it, and what the server's processes hold."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil

FAMILY_SECONDS = 60.0
SAMPLE_SECONDS = 0.5
STAT = Path("/proc/stat")
_known: dict[int, tuple[float, list[psutil.Process]]] = {}


def is_local(url: str) -> bool:
    """Whether the server's address is this machine's loopback."""
    host = urlsplit(url if "://" in url else f"//{url}").hostname or "localhost"
    return host.startswith("127.") or host in ("localhost", "::1")


class Demand:
    """How many tasks for each core ran or wanted to, on average since the last time: 0 is idle, 1 is full, 3 says that
    whoever wants a core gets a third of one. (A busy share ends at 1, where it begins to matter.)

    Sampled as the kernel's load average is, by `sample` twice a second or so; but over the probe's own windows, and
    without those that wait for a disk.
    """

    def __init__(self) -> None:
        self._samples: list[float] = []

    def sample(self) -> None:
        try:
            with STAT.open() as lines:
                running = next(int(line.split()[1]) for line in lines if line.startswith("procs_running"))
        except (OSError, StopIteration):
            return
        # This thread, which reads it, runs too.
        self._samples.append((running - 1) / (os.cpu_count() or 1))

    def ratio(self) -> float | None:
        """The mean of the samples since the last call; None where the kernel does not tell."""
        samples, self._samples = self._samples, []
        return sum(samples) / len(samples) if samples else None


def memory_bytes(url: str) -> int:
    """Resident bytes of the process that listens at the port and of its children; 0 where it cannot be seen."""
    port = urlsplit(url if "://" in url else f"//{url}").port or 8001
    found, processes = _known.get(port, (0.0, []))
    if time.monotonic() - found > FAMILY_SECONDS or not all(process.is_running() for process in processes):
        processes = _family(port)
        _known[port] = (time.monotonic(), processes)
    with contextlib.suppress(psutil.Error):
        return sum(process.memory_info().rss for process in processes)
    return 0


def _family(port: int) -> list[psutil.Process]:
    # Other users' sockets are visible to root only.
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                process = psutil.Process(connection.pid)
                return [process, *process.children(recursive=True)]
    return []
