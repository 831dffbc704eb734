"""Reading a model repository, whichever target it is for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kpdeploy.artifact import BASELINE, GOLDEN, MANIFEST, Manifest
from kpdeploy.deployment import Deployment
from kpdeploy.errors import RepositoryBroken, UnknownName, did_you_mean
from kpdeploy.serving.storage import downloaded, local_path, names_in, open_storage
from kpdeploy.serving.torchserve.archive import archive_name, unpack_artifact
from kpdeploy.serving.torchserve.repository import committed as committed_archive
from kpdeploy.serving.triton.repository import committed as committed_config


def committed(fs: Any, root: str, name: str) -> Manifest | None:
    """The manifest of a model's committed version: each target has one file that names it."""
    return committed_config(fs, root, name) or committed_archive(fs, root, name)


def read_repository(repo: str) -> list[Deployment]:
    """The committed version of every model that kpdeploy made in a repository, by name.

    Raises:
        RepositoryBroken: the repository is missing, holds no such model, or one that cannot be read.
    """
    repo = local_path(repo)
    fs, root = open_storage(repo)
    found = [committed(fs, root, name) for name in sorted(_names_to_read(fs, repo, root))]
    deployments = [Deployment(repository=repo, manifest=manifest) for manifest in found if manifest is not None]
    if not deployments:
        raise RepositoryBroken(
            f"{repo} holds no model made by kpdeploy" if fs.exists(root) else f"there is no repository {repo}",
            next_step=f"export a model into it: kpdeploy export MODEL --target triton --repo {repo}",
        )
    return deployments


def _names_to_read(fs: Any, repo: str, root: str) -> list[str]:
    try:
        return names_in(fs, root)
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
        raise UnknownName(
            f"{repo} holds no model {model!r}",
            why=f"its models are: {names}",
            next_step=did_you_mean(model, deployments, otherwise="name one of them"),
        )
    return deployments[model]


def find_version(repo: str, model: str | None, version: int | None) -> Deployment:
    """A version of a model, committed or earlier; the committed one where `version` is None.

    Raises:
        RepositoryBroken, UnknownName: as find_deployment; or there is no such version.
    """
    current = find_deployment(repo, model)
    if version in (None, current.version):
        return current
    fs, root = open_storage(current.repository)
    folder = f"{root}/{current.model}"
    there = sorted(int(n) for n in names_in(fs, folder) if n.isdecimal() and fs.exists(f"{folder}/{n}/{MANIFEST}"))
    if version not in there:
        raise UnknownName(
            f"{repo} holds no version {version} of {current.model}",
            why=f"its versions are: {', '.join(map(str, there))}",
            next_step="name one of them",
        )
    with downloaded(fs, f"{folder}/{version}", (MANIFEST,)) as copy:
        return Deployment(repository=current.repository, manifest=Manifest.read(copy))


@contextmanager
def artifact_files(deployment: Deployment) -> Iterator[Path]:
    """A local folder with a version's artifact, as its runtime loads it, and its baseline.

    Raises:
        DigestMismatch: a file is not what was proven.
    """
    with local_files(deployment) as folder:
        deployment.manifest.check_files(folder)
        if deployment.manifest.target != "torchserve":
            yield folder
            return
        with TemporaryDirectory(prefix="kpdeploy-") as unpacked:
            place = Path(unpacked)
            unpack_artifact(folder / archive_name(deployment.model), place)
            for name in (GOLDEN, BASELINE):
                shutil.copyfile(folder / name, place / name)
            yield place


@contextmanager
def local_files(deployment: Deployment) -> Iterator[Path]:
    """A local folder with the version's files: its own, or a copy that ends with the context."""
    fs, root = open_storage(deployment.repository)
    folder = f"{root}/{deployment.model}/{deployment.version}"
    with downloaded(fs, folder, (MANIFEST, *deployment.manifest.files)) as copy:
        yield copy
