"""The temporary folder and the shared memory of one server, removed with it; what a killed server left is swept by the
next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PREFIX = "kpdeploy-serve-"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """`folder` holds repository/, backends/ and the log; its name is also the prefix of the shared memory.

    `lock` is a descriptor that the server inherits: the folder is in use as long as any process holds it.
    """

    folder: Path
    lock: int

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def remove_shared_memory(self) -> None:
        _remove_shared_memory(self.folder.name)


@contextmanager
def scratch() -> Iterator[Scratch]:
    """A fresh Scratch, removed at the end. After an error the log is kept beside where the folder was."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    space = Scratch(folder=folder, lock=lock)
    try:
        yield space
    except Exception:
        if space.log.exists():
            shutil.move(space.log, kept_log(space))
        raise
    finally:
        _remove_shared_memory(folder.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def kept_log(space: Scratch) -> Path:
    """Where the log is after an error."""
    return space.folder.with_suffix(".log")


def sweep() -> None:
    """Remove what servers left whose every process is gone: their lock is free."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/lock"):
        try:
            with path.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        _remove_shared_memory(path.parent.name)
        shutil.rmtree(path.parent, ignore_errors=True)


def _remove_shared_memory(prefix: str) -> None:
    for segment in SHARED_MEMORY.glob(f"{prefix}*"):
        segment.unlink(missing_ok=True)
