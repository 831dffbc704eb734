"""A temporary folder that ends with its work; what a killed run left is swept by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "kpdeploy-work-"


@contextmanager
def work_folder() -> Iterator[Path]:
    """A fresh folder, removed at the end whatever happens. It is locked as long as this process lives."""
    sweep()
    folder, lock = _claimed()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep() -> None:
    """Remove the folders of runs that are gone: their lock is free. (A process id could be another's by now.)"""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        if _locked(lock):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _claimed() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        # Another run's sweep can come between making the folder and locking it.
        if _locked(lock) and folder.exists():
            return folder, lock
        os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
