"""An export killed at any moment: the repository stays whole, and a real server that polls it never stumbles."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import tiny_version
from tiny_version import manifest, write_files

from kpdeploy.errors import ModelNotServed
from kpdeploy.progress import Progress
from kpdeploy.serving.client import connect, verify
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.triton.environment import ensure_environment
from kpdeploy.serving.triton.overlay import link_backends
from kpdeploy.serving.triton.ports import Ports, claim
from kpdeploy.serving.triton.repository import publish

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tiny_version"])
KILLS = 50
SERVED_KILLS = 3
POLL_S = 1


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return tmp_path / "work" / "models"


@pytest.fixture
def publish_one(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    # The bundled server has only the python backend.
    monkeypatch.setitem(tiny_version.config.LOADERS, "python", tiny_version.config.Loader(backend="python"))
    files = write_files(tmp_path / "files", filename="model.py")
    return lambda model: publish(str(repo), manifest(model, format="python", filename="model.py"), files).version


def start_publishing(repo: Path, tmp_path: Path, *models: str) -> BaseProcess:
    """A process that publishes without end, once it has published its first."""
    published = FORKS.Event()
    arguments = (str(repo), str(tmp_path / "loop"), models, published)
    process = FORKS.Process(target=tiny_version.publish_forever, args=arguments)
    process.start()
    assert published.wait(60), "it published nothing"
    return process


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"


def assert_whole(repo: Path, models: set[str]) -> None:
    """Every folder of the repository is a model of which the committed version is, byte for byte, what was proven."""
    deployments = read_repository(str(repo))
    assert {path.name for path in repo.iterdir()} == {d.model for d in deployments} >= models
    for deployment in deployments:
        deployment.manifest.check_files(Path(deployment.folder))


def leftovers(repo: Path) -> list[Path]:
    """Whatever is neither a model, a committed version, nor the warm-up of one."""
    found = [path for path in repo.parent.iterdir() if path != repo]
    for model in repo.iterdir():
        versions = {path.name for path in model.iterdir() if path.name.isdecimal()}
        found += [path for path in model.iterdir() if path.name not in {"config.pbtxt", "warmup", *versions}]
        found += list(model.glob("*/config.pbtxt"))
        found += [p for p in (model / "warmup").iterdir() if p.name[1:].partition("-")[0] not in versions]
        found += [model / v for v in versions if not (model / v / "manifest.json").exists()]
    return found


def test_an_export_killed_at_random_moments_leaves_a_whole_repository(
    repo: Path, tmp_path: Path, publish_one: Callable[[str], int]
) -> None:
    publish_one("first")
    chance = random.Random(0)
    torn = 0
    for _ in range(KILLS):
        # Each run publishes versions of a model that is there, and one that is new.
        shutil.rmtree(repo / "new", ignore_errors=True)
        process = start_publishing(repo, tmp_path, "first", "new")
        time.sleep(chance.uniform(0, 0.15))
        kill(process)
        assert_whole(repo, {"first"})
        torn += bool(leftovers(repo))
    assert torn, "no kill hit an export in its middle: the test shows nothing"
    publish_one("first")
    publish_one("new")
    assert leftovers(repo) == []
    assert_whole(repo, {"first"})


@dataclass(frozen=True, kw_only=True)
class PollingServer:
    url: str
    log: Path

    def wait_until_right(self, repo: Path) -> None:
        """Until the server answers the golden requests of every committed version."""
        end = time.monotonic() + 60
        while True:
            try:
                verify(str(repo), url=self.url)
                return
            except ModelNotServed:
                assert time.monotonic() < end, self.log.read_text()[-4000:]
                time.sleep(0.2)


@pytest.fixture
def server(repo: Path, tmp_path: Path, publish_one: Callable[[str], int]) -> Iterator[PollingServer]:
    """A real tritonserver that polls the repository itself, with the defaults by which a bad model is an error."""
    publish_one("first")
    environment = ensure_environment(Progress())
    ports = claim(Ports(http=0, grpc=0, metrics=0))
    link_backends(tmp_path / "backends", environment.python_backend, backends_dir=None)
    log = tmp_path / "server.log"
    prefix = f"kpdeploy-test-{ports.grpc}-"
    command = [
        str(environment.binary),
        f"--model-repository={repo}",
        f"--backend-directory={tmp_path / 'backends'}",
        "--model-control-mode=poll",
        f"--repository-poll-secs={POLL_S}",
        f"--http-address={ports.host}",
        f"--grpc-address={ports.host}",
        f"--metrics-address={ports.host}",
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=3",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment.variables())
    try:
        wait_until_live(process, ports.grpc, log)
        yield PollingServer(url=f"localhost:{ports.grpc}", log=log)
    finally:
        process.terminate()
        process.wait(30)
        for segment in Path("/dev/shm").glob(f"{prefix}*"):
            segment.unlink()


def wait_until_live(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        try:
            with connect(f"localhost:{port}") as client:
                if client.live():
                    return
        except Exception:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-4000:])


def test_a_polling_server_only_ever_sees_whole_versions(
    repo: Path, tmp_path: Path, server: PollingServer, publish_one: Callable[[str], int]
) -> None:
    server.wait_until_right(repo)
    chance = random.Random(1)
    for _ in range(SERVED_KILLS):
        process = start_publishing(repo, tmp_path, "first", "new")
        time.sleep(chance.uniform(0, 1.5 * POLL_S))
        kill(process)
        server.wait_until_right(repo)
    publish_one("first")
    server.wait_until_right(repo)
    failures = [line for line in server.log.read_text().splitlines() if "failed" in line.lower()]
    assert failures == []
