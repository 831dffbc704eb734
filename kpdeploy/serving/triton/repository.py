"""A Triton model repository: publishing a version into it so that no server ever sees half of one, and reading it.

    REPO/<model>/config.pbtxt        names the one version that is served: replacing this file publishes
    REPO/<model>/<version>/…         the artifact, manifest.json, golden.npz, baseline.json, launch.sh
    REPO/<model>/warmup/v<version>-… raw inputs for the server's warm-up

A version folder that still holds a config.pbtxt of its own was never committed: the last step of publishing moves that
file up. What a killed run leaves is therefore known, and the next run removes it. Earlier versions stay, for rollback.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kpdeploy.artifact import MANIFEST, Manifest, sha256
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import (
    DiskFull,
    KpdeployError,
    PackageMissing,
    RepositoryBroken,
    RepositoryBusy,
    RepositoryUnwritable,
    UnknownName,
)
from kpdeploy.serving.triton.compatibility import newest
from kpdeploy.serving.triton.config import CONFIG, WARMUP, model_config, read_config, warmup_files, write_config
from kpdeploy.serving.triton.launch import LAUNCH, launch_script

LOCK_WAIT_S = 30.0
"""How long a second writer waits for the first."""

_STAGING = ".kpdeploy-staging"


@dataclass(frozen=True, kw_only=True)
class _Version:
    """What is published: `files` is a local folder, whose files are copied; launch.sh is written, by its text."""

    manifest: Manifest
    baseline: Baseline
    files: Path
    image: str

    def numbered(self, version: int) -> _Version:
        """The same as this version of the model, with launch.sh among the manifest's digests."""
        manifest = replace(self.manifest, version=version)
        digest = hashlib.sha256(launch_script(manifest, self.image).encode()).hexdigest()
        return replace(self, manifest=replace(manifest, files={**manifest.files, LAUNCH: digest}))

    @property
    def launch(self) -> str:
        return launch_script(self.manifest, self.image)


def publish(repo: str, manifest: Manifest, files: Path) -> Deployment:
    """Publish the files of one version as the model's next version.

    `files` is a local folder with the artifact, golden.npz and baseline.json; it is copied. `manifest` comes without
    version and digests; both are filled in. `repo` is a path, or a URL that fsspec knows; it is made where it is
    missing. On an error the repository is as it was.

    Raises:
        RepositoryBroken: `REPO/<model>` is there and was not made by kpdeploy, or `files` is not whole.
        RepositoryBusy: another export is still writing there after LOCK_WAIT_S.
        RepositoryUnwritable, DiskFull: the storage refuses.
        FormatUnavailable: Triton cannot serve the model's tensors.
    """
    written = (MANIFEST, LAUNCH)
    digests = {file.name: sha256(file) for file in sorted(files.iterdir()) if file.name not in written}
    manifest = replace(manifest, files=digests)
    baseline = Baseline.read(files)
    version = _Version(manifest=manifest, baseline=baseline, files=files, image=newest(manifest, files).image)
    repo = local_path(repo)
    if "://" in repo:
        return _publish_remote(repo, version)
    return _publish_local(Path(repo), version)


def check_publishable(repo: str, *, model: str | None = None) -> None:
    """Tell before any work what publish would say after it, as far as it can be told.

    Raises:
        RepositoryUnwritable: the repository cannot be written, or made.
        RepositoryBroken: `REPO/<model>` is there and was not made by kpdeploy.
    """
    repo = local_path(repo)
    if "://" in repo:
        return
    place = Path(repo).absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RepositoryUnwritable(
            f"the repository {repo} cannot be written",
            why=f"{there} is not writable for this user" if there.is_dir() else f"{there} is a file, not a folder",
            next_step="make the folder writable, or give another repository with --repo",
        )
    if model is not None and (place / model).exists() and _committed(*_open(repo), model) is None:
        raise _foreign(str(Path(repo) / model))


def local_path(repo: str | os.PathLike[str]) -> str:
    """The repository as a plain path where it is one, else its URL."""
    return os.fspath(repo).removeprefix("file://")


# On a file system


def _publish_local(repo: Path, content: _Version) -> Deployment:
    with _storage_errors(repo, content.files), _made(repo), _locked(repo):
        model = repo / content.manifest.model
        if model.exists() and _committed(*_open(str(repo)), model.name) is None:
            raise _foreign(str(model))
        _sweep(repo, model)
        content = content.numbered(_next_version(p.name for p in model.glob("*")))
        try:
            if model.exists():
                _add_version(repo, model, content)
            else:
                _add_model(repo, model, content)
        except BaseException:
            _sweep(repo, model)
            raise
    return Deployment(repository=str(repo), manifest=content.manifest)


def _add_model(repo: Path, model: Path, content: _Version) -> None:
    """A new model appears whole, by one rename: a server takes any folder of the repository for a model."""
    staging = _staging(repo, model)
    version = staging / str(content.manifest.version)
    version.mkdir(parents=True)
    _fill(version, content)
    os.replace(version / CONFIG, staging / CONFIG)
    _write_warmup(staging / WARMUP, content)
    _sync_tree(staging)
    os.rename(staging, model)
    _sync(repo)


def _add_version(repo: Path, model: Path, content: _Version) -> None:
    """A version folder is invisible until config.pbtxt, replaced last, names it."""
    staging = _staging(repo, model)
    staging.mkdir()
    _fill(staging, content)
    _sync_tree(staging)
    _write_warmup(model / WARMUP, content)
    version = model / str(content.manifest.version)
    os.rename(staging, version)
    _sync(model)
    os.replace(version / CONFIG, model / CONFIG)
    _sync(model)
    _sync(version)


def _fill(folder: Path, content: _Version) -> None:
    """Everything of a version, and beside it its config.pbtxt, which says that it is not committed."""
    (folder / LAUNCH).write_text(content.launch)
    (folder / LAUNCH).chmod(0o755)
    for name, digest in content.manifest.files.items():
        if name != LAUNCH:
            shutil.copyfile(content.files / name, folder / name)
        # A copy that differs here was changed while it was copied, or written by a broken disk.
        if sha256(folder / name) != digest:
            raise OSError(errno.EIO, "the copy differs from its original", str(folder / name))
    content.manifest.write(folder)
    (folder / CONFIG).write_text(write_config(model_config(content.manifest, content.baseline)))


def _write_warmup(folder: Path, content: _Version) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in warmup_files(content.manifest, content.baseline).items():
        (folder / name).write_bytes(data)
        _sync(folder / name)
    _sync(folder)


def _staging(repo: Path, model: Path) -> Path:
    usable = (place for place in _staging_places(repo, model) if os.access(place.parent, os.W_OK | os.X_OK))
    return next(usable, repo / _STAGING)


def _staging_places(repo: Path, model: Path) -> list[Path]:
    """Where a version may be written aside, best first; all on the repository's own mount.

    Triton takes every folder of a repository for a model, names with a dot included, and a default server does not
    start when one fails to load. Beside the repository nothing is seen, and inside a model only numbers are. The
    repository itself is left for one that is a mount point and holds no model, of which no server can run anyway.
    """
    real = repo.resolve()
    beside = [] if _is_mount_point(real) else [real.parent / f".{real.name}{_STAGING}"]
    models = sorted((p for p in repo.iterdir() if (p / CONFIG).is_file()), key=lambda p: (p.name != model.name, p.name))
    return [*beside, *(p / _STAGING for p in models), repo / _STAGING]


def _is_mount_point(folder: Path) -> bool:
    """Bind mounts of the same file system included, which os.path.ismount does not see: no rename crosses them."""
    mounts = Path("/proc/self/mountinfo")
    known = mounts.read_text().splitlines() if mounts.exists() else []
    places = {line.split()[4].replace("\\040", " ") for line in known}
    return str(folder) in places or os.path.ismount(folder)


def _sweep(repo: Path, model: Path) -> None:
    """Remove what killed runs left: staging folders, versions never committed, and warm-up files without a version."""
    for place in _staging_places(repo, model):
        if place.exists():
            shutil.rmtree(place)
    for version in model.glob("*"):
        if not version.name.isdecimal() or not (version / CONFIG).exists():
            continue
        # Moved first: a folder that is half removed would be known no more.
        os.rename(version, model / _STAGING)
        shutil.rmtree(model / _STAGING)
    for file in (model / WARMUP).glob("v*-*"):
        number = re.match(r"v(\d+)-", file.name)
        if number and not (model / number[1]).exists():
            file.unlink()


def _next_version(names: Iterable[str]) -> int:
    return 1 + max((int(name) for name in names if name.isdecimal()), default=0)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


@contextmanager
def _made(repo: Path) -> Iterator[None]:
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
def _locked(repo: Path) -> Iterator[None]:
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
def _storage_errors(repo: Path, files: Path) -> Iterator[None]:
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


def _foreign(model: str) -> RepositoryBroken:
    return RepositoryBroken(
        f"{model} is there, and was not made by kpdeploy",
        why=f"its {CONFIG} does not name one version with a {MANIFEST}",
        next_step="move the folder away, or export under another name with --name",
    )


# In an object store


def _publish_remote(repo: str, content: _Version) -> Deployment:
    """Objects appear whole and one by one: the version's first, config.pbtxt last.

    An object store has neither renames nor locks. A killed upload leaves a version that nothing names, and the next
    one takes the number after it. Two exports of one model at once are not kept apart: the digests tell.
    """
    fs, root = _open(repo)
    model = f"{root}/{content.manifest.model}"
    with _remote_errors(repo):
        if fs.exists(f"{model}/{CONFIG}") and _committed(fs, root, content.manifest.model) is None:
            raise _foreign(f"{repo.rstrip('/')}/{content.manifest.model}")
        content = content.numbered(_next_version(_names(fs, model)))
        manifest, baseline = content.manifest, content.baseline
        version = f"{model}/{manifest.version}"
        config = write_config(model_config(manifest, baseline)).encode()
        try:
            fs.pipe_file(f"{version}/{LAUNCH}", content.launch.encode())
            for name in (name for name in manifest.files if name != LAUNCH):
                fs.put_file(str(content.files / name), f"{version}/{name}")
            with tempfile.TemporaryDirectory() as folder:
                manifest.write(Path(folder))
                fs.put_file(str(Path(folder) / MANIFEST), f"{version}/{MANIFEST}")
            for name, data in warmup_files(manifest, baseline).items():
                fs.pipe_file(f"{model}/{WARMUP}/{name}", data)
            fs.pipe_file(f"{model}/{CONFIG}", config)
        except BaseException:
            with suppress(Exception):
                fs.rm(version, recursive=True)
            raise
    return Deployment(repository=repo, manifest=manifest)


def _names(fs: Any, folder: str) -> list[str]:
    """What is in a folder, by name; nothing where it is missing."""
    fs.invalidate_cache()
    try:
        return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(folder, detail=True)]
    except FileNotFoundError:
        return []


@contextmanager
def _remote_errors(repo: str) -> Iterator[None]:
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


def _open(repo: str) -> tuple[Any, str]:
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


# Reading


def read_repository(repo: str) -> list[Deployment]:
    """The committed version of every model that kpdeploy made in a repository, by name.

    Raises:
        RepositoryBroken: the repository is missing, holds no such model, or one that cannot be read.
    """
    repo = local_path(repo)
    fs, root = _open(repo)
    found = [_committed(fs, root, name) for name in sorted(_names_to_read(fs, repo, root))]
    deployments = [Deployment(repository=repo, manifest=manifest) for manifest in found if manifest is not None]
    if not deployments:
        raise RepositoryBroken(
            f"{repo} holds no model made by kpdeploy" if fs.exists(root) else f"there is no repository {repo}",
            next_step=f"export a model into it: kpdeploy export MODEL --target triton --repo {repo}",
        )
    return deployments


def _names_to_read(fs: Any, repo: str, root: str) -> list[str]:
    try:
        return _names(fs, root)
    except Exception as error:
        raise RepositoryBroken(
            f"the repository {repo} cannot be read",
            why=f"{type(error).__name__}: {error}",
            next_step="check the address, and that you may read it",
        ) from None


def find_deployment(repo: str, model: str | None) -> Deployment:
    """The committed version of one model; of the only one where `model` is None.

    Raises:
        RepositoryBroken: as read_repository.
        UnknownName: no such model, or several to choose from.
    """
    deployments = {deployment.model: deployment for deployment in read_repository(repo)}
    names = ", ".join(deployments)
    if model is None:
        if len(deployments) > 1:
            raise UnknownName(f"{repo} holds several models: {names}", next_step="name one with --model")
        return next(iter(deployments.values()))
    if model not in deployments:
        import difflib

        near = difflib.get_close_matches(model, deployments, n=1)
        raise UnknownName(
            f"{repo} holds no model {model!r}",
            why=f"its models are: {names}",
            next_step=f"did you mean {near[0]!r}?" if near else "name one of them",
        )
    return deployments[model]


@contextmanager
def local_files(deployment: Deployment) -> Iterator[Path]:
    """A local folder with the version's files: its own, or a copy that ends with the context."""
    fs, root = _open(deployment.repository)
    folder = f"{root}/{deployment.model}/{deployment.version}"
    with _downloaded(fs, folder, (MANIFEST, *deployment.manifest.files)) as copy:
        yield copy


def read_model_config(deployment: Deployment) -> Any:
    """The ModelConfig in the model's config.pbtxt.

    Raises:
        RepositoryBroken: it cannot be read.
    """
    fs, root = _open(deployment.repository)
    place = f"{root}/{deployment.model}/{CONFIG}"
    return read_config(fs.cat_file(place).decode(errors="replace"), where=place)


@contextmanager
def _downloaded(fs: Any, folder: str, names: Iterable[str]) -> Iterator[Path]:
    if "file" in fs.protocol:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="kpdeploy-") as copy:
        for name in names:
            # What is missing is told by whoever reads or checks the files.
            with suppress(FileNotFoundError):
                fs.get_file(f"{folder}/{name}", str(Path(copy) / name))
        yield Path(copy)


def _committed(fs: Any, root: str, name: str) -> Manifest | None:
    """The manifest of the version that the model's config.pbtxt names; None for a model that is not kpdeploy's."""
    model = f"{root}/{name}"
    try:
        text = fs.cat_file(f"{model}/{CONFIG}").decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    config = read_config(text, where=f"{model}/{CONFIG}")
    versions = config.version_policy.specific.versions
    ours = [number for number in _names(fs, model) if fs.exists(f"{model}/{number}/{MANIFEST}")]
    if not ours or len(versions) != 1:
        return None
    if str(versions[0]) not in ours:
        raise RepositoryBroken(
            f"{model}/{CONFIG} names version {versions[0]}, which is not whole",
            why=f"whole are: {', '.join(sorted(ours, key=int))}",
            next_step=f"remove {model} and export the model again, or name another version in {CONFIG}",
        )
    with _downloaded(fs, f"{model}/{versions[0]}", (MANIFEST,)) as copy:
        return Manifest.read(copy)
