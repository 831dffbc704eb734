"""Where repositories are kept, a file system or an object store: locks, folders made for a while, and one kind of error
for all that storage can refuse."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kpdeploy.errors import (
    DiskFull,
    KpdeployError,
    PackageMissing,
    RepositoryBroken,
    RepositoryBusy,
    RepositoryUnwritable,
    UnknownName,
)
from kpdeploy.progress import Progress

LOCK_WAIT_S = 30.0
"""How long a second writer waits for the first."""


def local_path(repo: str | os.PathLike[str]) -> str:
    """The repository as a plain path where it is one, else its URL."""
    return os.fspath(repo).removeprefix("file://")


def check_pollable(repo: str | os.PathLike[str]) -> None:
    """Raise UnknownName where new versions of a repository cannot be seen."""
    if "://" in local_path(repo):
        raise UnknownName(
            f"{repo} cannot be polled for new versions",
            why="only a folder can; a URL is fetched once",
            next_step="leave --poll out, or sync the repository to a folder and serve that",
        )


def check_writable(repo: Path) -> None:
    """Raise RepositoryUnwritable where the repository's folder cannot be written, or made."""
    place = repo.absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RepositoryUnwritable(
            f"the repository {repo} cannot be written",
            why=f"{there} is not writable for this user" if there.is_dir() else f"{there} is a file, not a folder",
            next_step="make the folder writable, or give another repository with --repo",
        )


def next_version(names: Iterable[str]) -> int:
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def made(repo: Path) -> Iterator[None]:
    """Make the repository's folder; where it was new, an error leaves none."""
    missing = [folder for folder in (repo, *repo.parents) if not folder.exists()]
    repo.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def locked(repo: Path) -> Iterator[None]:
    """One writer at a time. The lock is on the folder itself, so it leaves no file, and ends with its process."""
    descriptor = os.open(repo, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RepositoryBusy(
                        f"another export is writing to {repo}",
                        why=f"its lock was still held after {LOCK_WAIT_S:g} s",
                        next_step="wait until it is done, then export again",
                    ) from None
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(repo: Path, files: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(file.stat().st_size for file in files.iterdir())
            raise DiskFull(
                f"no space is left for this version in {repo}",
                why=f"{error}; the version needs {needed / 1e6:.1f} MB",
                next_step="free space there, or give another repository with --repo",
            ) from None
        raise RepositoryUnwritable(
            f"the repository {repo} cannot be written",
            why=str(error),
            next_step="make the folder writable, or give another repository with --repo",
        ) from None


def names_in(fs: Any, folder: str) -> list[str]:
    """What is in a folder, by name; nothing where it is missing."""
    fs.invalidate_cache()
    try:
        return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(folder, detail=True)]
    except FileNotFoundError:
        return []


@contextmanager
def remote_errors(repo: str) -> Iterator[None]:
    """Each file system of fsspec raises exceptions of its own library; they are all told as one."""
    try:
        yield
    except KpdeployError:
        raise
    except Exception as error:
        raise RepositoryUnwritable(
            f"the repository {repo} cannot be written",
            why=f"{type(error).__name__}: {error}",
            next_step="check the address and the credentials of the storage",
        ) from None


def open_storage(repo: str) -> tuple[Any, str]:
    """The file system of a repository, and its root there.

    Raises:
        PackageMissing: the package for this kind of URL is not installed.
        RepositoryBroken: no such kind of URL, or it is refused at once.
    """
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(repo)
    except ImportError as error:
        raise PackageMissing(
            f"{repo} cannot be opened", why=str(error), next_step="install the package that is named above"
        ) from None
    except Exception as error:
        raise RepositoryBroken(
            f"{repo} is not an address of a repository",
            why=str(error),
            next_step="give a folder, or a URL such as s3://bucket/models",
        ) from None
    return fs, root.rstrip("/")


@contextmanager
def downloaded(fs: Any, folder: str, names: Iterable[str]) -> Iterator[Path]:
    if "file" in fs.protocol:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="kpdeploy-") as copy:
        for name in names:
            # What is missing is told by whoever reads or checks the files.
            with suppress(FileNotFoundError):
                fs.get_file(f"{folder}/{name}", str(Path(copy) / name))
        yield Path(copy)


def fetch(repo: str, folder: Path, progress: Progress) -> str:
    """The repository as a local folder: a URL's files are copied to `folder`."""
    if "://" not in repo:
        return repo
    import fsspec

    try:
        with progress.step(f"fetching {repo}"):
            files, path = fsspec.core.url_to_fs(repo)
            files.get(path.rstrip("/") + "/", str(folder) + "/", recursive=True)
    except Exception as error:  # each file system of fsspec has exceptions of its own
        raise RepositoryBroken(
            f"the repository {repo} cannot be fetched",
            why=str(error),
            next_step="check the address and the credentials, or copy the repository to a folder",
        ) from None
    return str(folder)
