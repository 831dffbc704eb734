"""The machine of a server that runs beside the probe: how much is asked of it, and what the server's processes hold."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from urllib.parse import urlsplit

import psutil

FAMILY_SECONDS = 60.0
SAMPLE_SECONDS = 0.5
THREADS_SECONDS = 5.0
STAT = Path("/proc/stat")


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


class Processes:
    """The process that listens at a port of this machine, and its children; none where they cannot be seen."""

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url if "://" in url else f"//{url}").port or 8001
        self._found = 0.0
        self._members: list[psutil.Process] = []
        self._before: dict[str, tuple[int, int]] = {}

    def members(self) -> list[psutil.Process]:
        old = time.monotonic() - self._found > FAMILY_SECONDS
        if old or not self._members or not all(process.is_running() for process in self._members):
            self._members, self._found = _family(self._port), time.monotonic()
        return self._members

    def memory_bytes(self) -> int:
        """Resident bytes of all."""
        with contextlib.suppress(psutil.Error):
            return sum(process.memory_info().rss for process in self.members())
        return 0

    def slowdown(self) -> float | None:
        """Time in which their threads ran or waited for a core, over the time they ran, since the last call."""
        times = _times(_threads(process.pid for process in self.members()))
        before, self._before = self._before, times
        ran, waited = _since(before, times)
        return (ran + waited) / ran if ran > 0 else None


class Waits:
    """What one request would have taken on free cores: without the time in which threads of the server's processes, or
    of this one, could run and had no core. The kernel counts that, thread by thread; only on this machine."""

    def __init__(self, url: str) -> None:
        self._processes = Processes(url) if is_local(url) else None
        self._threads: list[FileIO] = []
        self._before: dict[str, tuple[int, int]] = {}
        self._start = 0.0
        self._look()

    def begin(self) -> None:
        """A request is about to be sent."""
        self._before = _times(self._threads)
        self._start = time.monotonic()

    def own_seconds(self) -> float | None:
        """Its answer is there: what it took since `begin`; None where nobody can tell."""
        took = time.monotonic() - self._start
        ran, waited = (nanoseconds / 1e9 for nanoseconds in _since(self._before, _times(self._threads)))
        # Looking for threads takes a while, and must not delay a request.
        if time.monotonic() - self._looked > THREADS_SECONDS:
            self._look()
        if ran <= 0:
            return None
        # Where other requests are under way, their threads wait too: then the share of the time that all waited.
        return max(took - waited, took * ran / (ran + waited))

    def _look(self) -> None:
        self._looked = time.monotonic()
        pids = [process.pid for process in self._processes.members()] if self._processes is not None else []
        self._threads = _threads([*pids, os.getpid()]) if pids else []


def _threads(pids: Iterable[int]) -> list[FileIO]:
    """Where the kernel tells of each thread of these processes how long it ran and waited, opened."""
    found = []
    for pid in pids:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                found.append(FileIO(file))
    return found


def _times(threads: Iterable[FileIO]) -> dict[str, tuple[int, int]]:
    """Nanoseconds that each thread ran, and waited for a core; without those that ended."""
    found = {}
    for file in threads:
        with contextlib.suppress(OSError, ValueError):
            ran, waited, _ = os.pread(file.fileno(), 64, 0).split()
            found[str(file.name)] = int(ran), int(waited)
    return found


def _since(before: Mapping[str, tuple[int, int]], now: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    known = [(now[file], before[file]) for file in now.keys() & before.keys()]
    ran, waited = (sum(after[k] - earlier[k] for after, earlier in known) for k in (0, 1))
    return ran, waited


def _family(port: int) -> list[psutil.Process]:
    # Other users' sockets are visible to root only.
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                process = psutil.Process(connection.pid)
                return [process, *process.children(recursive=True)]
    return []
