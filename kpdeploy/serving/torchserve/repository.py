"""A repository for TorchServe: publishing a version into it so that no server ever sees half of one.

    REPO/<model>.mar          the archive that is served: replacing this file publishes
    REPO/<model>/<version>/…  the same archive, manifest.json, golden.npz, baseline.json
    REPO/config.properties    for `torchserve` without kpdeploy, as are run.sh and requirements.txt

A version folder that holds UNCOMMITTED was never published: what a killed run leaves is known, and the next run
removes it. Earlier versions stay, for rollback.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kpdeploy.artifact import BASELINE, GOLDEN, MANIFEST, Manifest, sha256
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import RepositoryBroken, UnknownName
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
from kpdeploy.serving.torchserve.archive import archive_name, requirements, version_of, write_archive
from kpdeploy.serving.torchserve.config import Addresses, properties

PROPERTIES = "config.properties"
RUN = "run.sh"
REQUIREMENTS = "requirements.txt"
UNCOMMITTED = "uncommitted"
_STAGING = ".kpdeploy-staging"

TORCHSERVE = ("torchserve==0.12.0", "pyyaml")
"""The wheel of torchserve does not ask for PyYAML, and does not start without."""

_RUN = """\
#!/usr/bin/env bash
# Serve these archives with TorchServe, without kpdeploy:  bash run.sh [more options of torchserve]
# It needs Java 17 (Debian: openjdk-17-jre-headless) and:  pip install -r requirements.txt
# The tokens that requests need are in key_file.json of the folder that this is started in.
set -euo pipefail
# torch's threads wait asleep, and leave the cores to the frontend.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
exec torchserve --start --foreground --ncs --model-store "$repo" --ts-config "$repo/config.properties" "$@"
"""


def publish(repo: str, manifest: Manifest, files: Path, *, activate: bool = True) -> Deployment:
    """Publish one version as the model's next; the arguments are those of the Triton target. `activate` must be True:
    TorchServe serves whatever its store holds.

    Raises:
        RepositoryBroken: the model is there and was not made by kpdeploy, or `files` is not whole.
        RepositoryBusy, RepositoryUnwritable, DiskFull: the storage refuses.
    """
    assert activate, "Target.staged says that it cannot be otherwise"
    Baseline.read(files)
    repo = local_path(repo)
    if "://" in repo:
        return _publish_remote(repo, manifest, files)
    return _publish_local(Path(repo), manifest, files)


def check_publishable(repo: str, *, model: str | None = None) -> None:
    """Tell before any work what publish would say after it, as far as it can be told."""
    repo = local_path(repo)
    if "://" in repo:
        return
    check_writable(Path(repo))
    if model is not None:
        _check_ours(Path(repo), model)


def rollback(repo: str, model: str, version: int) -> Deployment:
    """Serve an earlier version again: its archive becomes the model's. A server that polls follows.

    Raises:
        UnknownName: the repository holds no such version.
        DigestMismatch: the version is not what was published.
    """
    folder = Path(local_path(repo))
    with locked(folder):
        place = folder / model / str(version)
        if not (place / MANIFEST).is_file() or (place / UNCOMMITTED).exists():
            whole = [p.parent.name for p in (folder / model).glob(f"*/{MANIFEST}")]
            raise UnknownName(
                f"{repo} holds no version {version} of {model}", next_step=f"name one of {', '.join(sorted(whole))}"
            )
        manifest = Manifest.read(place)
        manifest.check_files(place)
        _commit(folder, manifest)
    return Deployment(repository=str(folder), manifest=manifest)


def _check_ours(repo: Path, model: str) -> None:
    there = [place for place in (repo / model, repo / archive_name(model)) if place.exists()]
    # A folder without a committed archive is what a killed first publish leaves.
    leftover = there == [repo / model] and all((v / UNCOMMITTED).exists() for v in there[0].iterdir())
    if there and not leftover and committed(*open_storage(str(repo)), model) is None:
        raise RepositoryBroken(
            f"{there[0]} is there, and was not made by kpdeploy for TorchServe",
            why=f"{archive_name(model)} does not name a version with a {MANIFEST}",
            next_step="move it away, or export under another name with --name",
        )


# On a file system


def _publish_local(repo: Path, manifest: Manifest, files: Path) -> Deployment:
    with storage_errors(repo, files), made(repo), locked(repo):
        _check_ours(repo, manifest.model)
        _sweep(repo, manifest.model)
        model = repo / manifest.model
        manifest = replace(manifest, version=next_version(p.name for p in model.glob("*")))
        try:
            staging = repo / _STAGING
            staging.mkdir()
            manifest = _fill(staging, manifest, files)
            (staging / UNCOMMITTED).touch()
            sync_tree(staging)
            model.mkdir(exist_ok=True)
            os.rename(staging, model / str(manifest.version))
            sync(model)
            _commit(repo, manifest)
            (model / str(manifest.version) / UNCOMMITTED).unlink()
        except BaseException:
            _sweep(repo, manifest.model)
            raise
    return Deployment(repository=str(repo), manifest=manifest)


def _fill(folder: Path, manifest: Manifest, files: Path) -> Manifest:
    """Everything of a version; the manifest with the digests of its files."""
    archive = archive_name(manifest.model)
    write_archive(manifest, files, folder / archive)
    for name in (GOLDEN, BASELINE):
        shutil.copyfile(files / name, folder / name)
    filled = replace(manifest, files={name: sha256(folder / name) for name in sorted((archive, GOLDEN, BASELINE))})
    filled.write(folder)
    return filled


def _commit(repo: Path, manifest: Manifest) -> None:
    """Put the version's archive into the model's place, then tell plain `torchserve` of it."""
    name = archive_name(manifest.model)
    aside = repo / f".{name}.part"
    aside.unlink(missing_ok=True)
    try:
        os.link(repo / manifest.model / str(manifest.version) / name, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(repo / manifest.model / str(manifest.version) / name, aside)
        sync(aside)
    os.replace(aside, repo / name)
    sync(repo)
    for name, text in _beside(_committed_manifests(str(repo))).items():
        aside = repo / f".{name}.part"
        aside.write_text(text)
        aside.chmod(0o755 if name == RUN else 0o644)
        os.replace(aside, repo / name)


def _committed_manifests(repo: str) -> list[Manifest]:
    fs, root = open_storage(repo)
    found = (committed(fs, root, name) for name in sorted(names_in(fs, root)))
    return [manifest for manifest in found if manifest is not None]


def _beside(manifests: Sequence[Manifest]) -> dict[str, str]:
    """What `torchserve` needs to serve all models of the repository without kpdeploy."""
    pins = {line: None for m in manifests for line in requirements(m).splitlines()}
    return {
        PROPERTIES: properties([archive_name(m.model) for m in manifests], Addresses()),
        RUN: _RUN,
        REQUIREMENTS: "".join(f"{line}\n" for line in (*TORCHSERVE, *pins)),
    }


def _sweep(repo: Path, model: str) -> None:
    """Remove what killed runs left. The version that is served is never removed, whatever its folder holds."""
    shutil.rmtree(repo / _STAGING, ignore_errors=True)
    archive = repo / archive_name(model)
    served = version_of(archive, where=str(archive)) if archive.exists() else None
    for mark in (repo / model).glob(f"*/{UNCOMMITTED}"):
        if mark.parent.name == str(served):
            mark.unlink()
            continue
        os.rename(mark.parent, repo / _STAGING)
        shutil.rmtree(repo / _STAGING)
    with suppress(OSError):
        (repo / model).rmdir()


# In an object store


def _publish_remote(repo: str, manifest: Manifest, files: Path) -> Deployment:
    """Objects appear whole and one by one: the version's first, the served archive last."""
    fs, root = open_storage(repo)
    model = f"{root}/{manifest.model}"
    name = archive_name(manifest.model)
    with remote_errors(repo), tempfile.TemporaryDirectory(prefix="kpdeploy-") as aside:
        if fs.exists(f"{root}/{name}") and committed(fs, root, manifest.model) is None:
            raise RepositoryBroken(
                f"{repo.rstrip('/')}/{name} was not made by kpdeploy",
                next_step="move it away, or export under another name with --name",
            )
        manifest = replace(manifest, version=next_version(names_in(fs, model)))
        manifest = _fill(Path(aside), manifest, files)
        version = f"{model}/{manifest.version}"
        try:
            for file in (*manifest.files, MANIFEST):
                fs.put_file(str(Path(aside) / file), f"{version}/{file}")
            fs.put_file(str(Path(aside) / name), f"{root}/{name}")
            for file, text in _beside(_committed_manifests(repo)).items():
                fs.pipe_file(f"{root}/{file}", text.encode())
        except BaseException:
            with suppress(Exception):
                fs.rm(version, recursive=True)
            raise
    return Deployment(repository=repo, manifest=manifest)


# Reading


def committed(fs: Any, root: str, name: str) -> Manifest | None:
    """The manifest of the version that the model's archive holds; None for a model that is not kpdeploy's."""
    place = f"{root}/{archive_name(name)}"
    if not fs.exists(place):
        return None
    with fs.open(place, "rb") as file:
        version = version_of(file, where=place)
    if version is None or not fs.exists(f"{root}/{name}/{version}/{MANIFEST}"):
        return None
    with downloaded(fs, f"{root}/{name}/{version}", (MANIFEST,)) as copy:
        return Manifest.read(copy)
