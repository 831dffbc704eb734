"""A Triton model repository: publishing a version into it so that no server ever sees half of one, and reading it.

    REPO/<model>/config.pbtxt        names the one version that is served: replacing this file publishes
    REPO/<model>/<version>/…         the artifact, manifest.json, golden.npz, baseline.json, launch.sh
    REPO/<model>/warmup/v<version>-… raw inputs for the server's warm-up

A version folder that still holds a config.pbtxt of its own was never committed: the last step of publishing moves that
file up. What a killed run leaves is therefore known, and the next run removes it. Earlier versions stay, for rollback;
a later one that is there without being named waits to be activated.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kpdeploy.artifact import MANIFEST, Manifest, sha256
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import RepositoryBroken
from kpdeploy.serving.storage import (
    check_writable,
    downloaded,
    local_path,
    locked,
    made,
    names_in,
    next_version,
    open_storage,
    remote_errors,
    storage_errors,
    sync,
    sync_tree,
)
from kpdeploy.serving.triton.compatibility import newest
from kpdeploy.serving.triton.config import (
    CONFIG,
    WARMUP,
    holds_model_py,
    model_config,
    read_config,
    warmup_files,
    write_config,
)
from kpdeploy.serving.triton.launch import LAUNCH, launch_script
from kpdeploy.serving.triton.overlay import write_model

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


def publish(repo: str, manifest: Manifest, files: Path, *, activate: bool = True) -> Deployment:
    """Publish the files of one version as the model's next version. Without `activate` the version before it stays the
    one that is served, until `activate` is called; the first version of a model is always served.

    `files` is a local folder with the artifact, golden.npz and baseline.json; it is copied. `manifest` comes without
    version and digests; both are filled in. `repo` is a path, or a URL that fsspec knows; it is made where it is
    missing. On an error the repository is as it was.

    Raises:
        RepositoryBroken: `REPO/<model>` is there and was not made by kpdeploy, or `files` is not whole.
        RepositoryBusy: another export is still writing there after storage.LOCK_WAIT_S.
        RepositoryUnwritable, DiskFull: the storage refuses.
        FormatUnavailable: Triton cannot serve the model's tensors.
    """
    if holds_model_py(manifest):
        write_model(manifest, files)
    written = (MANIFEST, LAUNCH)
    digests = {file.name: sha256(file) for file in sorted(files.iterdir()) if file.name not in written}
    manifest = replace(manifest, files=digests)
    baseline = Baseline.read(files)
    version = _Version(manifest=manifest, baseline=baseline, files=files, image=newest(manifest, files).image)
    repo = local_path(repo)
    if "://" in repo:
        return _publish_remote(repo, version, activate=activate)
    return _publish_local(Path(repo), version, activate=activate)


def check_publishable(repo: str, *, model: str | None = None) -> None:
    """Tell before any work what publish would say after it, as far as it can be told.

    Raises:
        RepositoryUnwritable: the repository cannot be written, or made.
        RepositoryBroken: `REPO/<model>` is there and was not made by kpdeploy.
    """
    repo = local_path(repo)
    if "://" in repo:
        return
    check_writable(Path(repo))
    if model is not None and (Path(repo) / model).exists() and committed(*open_storage(repo), model) is None:
        raise foreign(str(Path(repo) / model))


# On a file system


def _publish_local(repo: Path, content: _Version, *, activate: bool) -> Deployment:
    with storage_errors(repo, content.files), made(repo), locked(repo):
        model = repo / content.manifest.model
        if model.exists() and committed(*open_storage(str(repo)), model.name) is None:
            raise foreign(str(model))
        _sweep(repo, model)
        content = content.numbered(next_version(p.name for p in model.glob("*")))
        try:
            if model.exists():
                _add_version(repo, model, content, activate=activate)
            else:
                _add_model(repo, model, content)
        except BaseException:
            _sweep(repo, model)
            raise
    return Deployment(repository=str(repo), manifest=content.manifest)


def activate(deployment: Deployment) -> None:
    """Let config.pbtxt name a version that is there already: promotion and rollback, by replacing one file.

    Raises:
        RepositoryBroken: the version is not whole. RepositoryBusy, RepositoryUnwritable: as publish.
    """
    repo, folder = Path(deployment.repository), Path(deployment.folder)
    baseline = Baseline.read(folder)
    version = _Version(manifest=deployment.manifest, baseline=baseline, files=folder, image="")
    with storage_errors(repo, folder), locked(repo):
        model = repo / deployment.model
        _write_warmup(model / WARMUP, version)
        aside = model / f".{CONFIG}"
        aside.write_text(write_config(model_config(deployment.manifest, baseline)))
        sync(aside)
        os.replace(aside, model / CONFIG)
        sync(model)


def withdraw(repo: Path, model: str) -> None:
    """Remove a model with all of its versions; nothing where there is none. A server sees it whole, or not at all."""
    place = repo / model
    if not place.exists():
        return
    with storage_errors(repo, place), locked(repo):
        staging = _staging(repo, place)
        if staging.parent == place:
            staging = repo / _STAGING
        os.rename(place, staging)
        shutil.rmtree(staging)


def _add_model(repo: Path, model: Path, content: _Version) -> None:
    """A new model appears whole, by one rename: a server takes any folder of the repository for a model."""
    staging = _staging(repo, model)
    version = staging / str(content.manifest.version)
    version.mkdir(parents=True)
    _fill(version, content)
    os.replace(version / CONFIG, staging / CONFIG)
    _write_warmup(staging / WARMUP, content)
    sync_tree(staging)
    os.rename(staging, model)
    sync(repo)


def _add_version(repo: Path, model: Path, content: _Version, *, activate: bool) -> None:
    """A version folder is invisible until config.pbtxt, replaced last, names it."""
    staging = _staging(repo, model)
    staging.mkdir()
    _fill(staging, content)
    if not activate:
        (staging / CONFIG).unlink()
    sync_tree(staging)
    if activate:
        _write_warmup(model / WARMUP, content)
    version = model / str(content.manifest.version)
    os.rename(staging, version)
    sync(model)
    if not activate:
        return
    os.replace(version / CONFIG, model / CONFIG)
    sync(model)
    sync(version)


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
        sync(folder / name)
    sync(folder)


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


def foreign(model: str) -> RepositoryBroken:
    return RepositoryBroken(
        f"{model} is there, and was not made by kpdeploy",
        why=f"its {CONFIG} does not name one version with a {MANIFEST}",
        next_step="move the folder away, or export under another name with --name",
    )


# In an object store


def _publish_remote(repo: str, content: _Version, *, activate: bool) -> Deployment:
    """Objects appear whole and one by one: the version's first, config.pbtxt last.

    An object store has neither renames nor locks. A killed upload leaves a version that nothing names, and the next
    one takes the number after it. Two exports of one model at once are not kept apart: the digests tell.
    """
    fs, root = open_storage(repo)
    model = f"{root}/{content.manifest.model}"
    with remote_errors(repo):
        first = not fs.exists(f"{model}/{CONFIG}")
        if not first and committed(fs, root, content.manifest.model) is None:
            raise foreign(f"{repo.rstrip('/')}/{content.manifest.model}")
        content = content.numbered(next_version(names_in(fs, model)))
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
            if activate or first:
                for name, data in warmup_files(manifest, baseline).items():
                    fs.pipe_file(f"{model}/{WARMUP}/{name}", data)
                fs.pipe_file(f"{model}/{CONFIG}", config)
        except BaseException:
            with suppress(Exception):
                fs.rm(version, recursive=True)
            raise
    return Deployment(repository=repo, manifest=manifest)


# Reading


def read_model_config(deployment: Deployment) -> Any:
    """The ModelConfig in the model's config.pbtxt.

    Raises:
        RepositoryBroken: it cannot be read.
    """
    fs, root = open_storage(deployment.repository)
    place = f"{root}/{deployment.model}/{CONFIG}"
    return read_config(fs.cat_file(place).decode(errors="replace"), where=place)


def committed(fs: Any, root: str, name: str) -> Manifest | None:
    """The manifest of the version that the model's config.pbtxt names; None for a model that is not kpdeploy's."""
    model = f"{root}/{name}"
    try:
        text = fs.cat_file(f"{model}/{CONFIG}").decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    config = read_config(text, where=f"{model}/{CONFIG}")
    versions = config.version_policy.specific.versions
    ours = [number for number in names_in(fs, model) if fs.exists(f"{model}/{number}/{MANIFEST}")]
    if not ours or len(versions) != 1:
        return None
    if str(versions[0]) not in ours:
        raise RepositoryBroken(
            f"{model}/{CONFIG} names version {versions[0]}, which is not whole",
            why=f"whole are: {', '.join(sorted(ours, key=int))}",
            next_step=f"remove {model} and export the model again, or name another version in {CONFIG}",
        )
    with downloaded(fs, f"{model}/{versions[0]}", (MANIFEST,)) as copy:
        return Manifest.read(copy)
