"""A real tritonserver on this machine: started, proven ready, watched, and ended without a trace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kpdeploy.artifact import Comparison
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import KpdeployError, NotReady, RepositoryBroken, ServerDied
from kpdeploy.hardware.allocators import find_allocator
from kpdeploy.progress import Progress
from kpdeploy.runtimes import PACKAGES
from kpdeploy.serving.client import connect, replay
from kpdeploy.serving.proof import prove_served
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.storage import check_pollable, fetch, local_path
from kpdeploy.serving.triton import control
from kpdeploy.serving.triton.environment import ServerEnvironment, ensure_environment, installed, runtime_pins
from kpdeploy.serving.triton.overlay import Served, link_backends, write_overlay
from kpdeploy.serving.triton.ports import Ports, claim
from kpdeploy.serving.triton.process import TritonProcess
from kpdeploy.serving.triton.scratch import Scratch, kept_log, scratch
from kpdeploy.serving.watcher import Watcher

WATCH_INTERVAL_S = 1.0
RETIRE_AFTER_S = 10.0
"""How long the processes of a model that was loaded again may still work on what they had."""
SILENT = Progress()


@contextmanager
def serve(
    repo: str | Path,
    *,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    host: str = "127.0.0.1",
    backends_dir: Path | None = None,
    poll: bool = False,
    revive: bool = True,
    ready_timeout_s: float = 120,
    progress: Progress = SILENT,
) -> Iterator[Server]:
    """Serve all models of a repository until the block ends; inside it every golden request came back right.

    Args:
        repo: a folder, or an fsspec URL, which is fetched first.
        http_port, grpc_port, metrics_port: 0 chooses a free one.
        host: the address to listen at. Triton has no passwords: other than loopback is open to the network.
        backends_dir: a folder of native backends (`onnxruntime/libtriton_onnxruntime.so`, …). Models whose backend
            it holds run natively; all others through an overlay on the python backend.
        poll: serve new versions when they are published.
        revive: load a model again when the process that runs it died, which Triton itself never does.
        ready_timeout_s: seconds to load and to answer right.

    Raises:
        RepositoryBroken, DigestMismatch: the repository is not what was proven.
        UnknownName: no such host; or `poll` of a URL.
        PortInUse, ServerUnavailable, LibraryMissing: the server cannot be started here.
        ModelLoadFailed, ServerDied, NotReady: it was, and does not serve.
    """
    if poll:
        check_pollable(repo)
    with scratch() as space:
        local = fetch(local_path(repo), space.folder / "native", progress)
        deployments = read_repository(local)
        ports = claim(Ports(host=host, http=http_port, grpc=grpc_port, metrics=metrics_port))
        environment = ensure_environment(progress, pins=runtime_pins(d.manifest for d in deployments))
        if ports.open_to_network:
            progress.say(f"listening at {host}: anyone who reaches this machine can use and unload the models")
        server = Server(local, ports, space, environment, backends_dir=backends_dir, progress=progress)
        try:
            server.start(deployments, ready_timeout_s=ready_timeout_s)
            server.watch(poll=poll, revive=revive)
            yield server
        finally:
            server.stop()


class Server:
    """A running tritonserver. `served` says what it runs, `ports` where it listens, `log` what it wrote."""

    def __init__(
        self,
        repo: str,
        ports: Ports,
        space: Scratch,
        environment: ServerEnvironment,
        *,
        backends_dir: Path | None,
        progress: Progress,
    ) -> None:
        self.ports = ports
        self.served: dict[str, Served] = {}
        self._repo = repo
        self._space = space
        self._environment = environment
        self._backends_dir = backends_dir
        self._progress = progress
        self._process: TritonProcess | None = None
        self._timeout_s = 0.0
        self._retired: dict[int, float] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._watcher = Watcher(lambda: self.process.exit_status() is None, interval_s=WATCH_INTERVAL_S)

    @property
    def http(self) -> str:
        return f"{self.ports.client_host}:{self.ports.http}"

    @property
    def grpc(self) -> str:
        return f"{self.ports.client_host}:{self.ports.grpc}"

    @property
    def metrics(self) -> str:
        return f"http://{self.ports.client_host}:{self.ports.metrics}/metrics"

    @property
    def log(self) -> Path:
        return self._space.log

    @property
    def process(self) -> TritonProcess:
        assert self._process is not None
        return self._process

    def start(self, deployments: Sequence[Deployment], *, ready_timeout_s: float) -> None:
        """Write the overlay, start the process, and wait until every golden request came back right."""
        deadline = time.monotonic() + ready_timeout_s
        self._timeout_s = ready_timeout_s
        self._seen = published(self._repo)
        with self._progress.step("checking the digests of the artifacts", total=len(deployments)) as advance:
            for deployment in deployments:
                self._write(deployment)
                advance()
        backends = self._space.folder / "backends"
        link_backends(backends, self._environment.python_backend, backends_dir=self._backends_dir)
        with self._progress.step("starting tritonserver and loading the models"):
            preload = _allocator(deployments, self._progress)
            self._process = TritonProcess(self._environment, self.ports, self._space, preload=preload)
            self._await_loaded(deadline)
        with self._progress.step("sending the golden requests", total=len(deployments)) as advance:
            for deployment in deployments:
                self._prove(deployment)
                advance()

    def watch(self, *, poll: bool, revive: bool = True) -> None:
        """From now on load models again whose process died (`revive`) and new versions (`poll`)."""

        def look() -> None:
            if revive:
                self._revive()
            if poll:
                self._refresh()

        self._watcher.start(look)

    def wait(self) -> None:
        """Block for as long as the server serves; returns never, or by raising ServerDied or ModelLoadFailed."""
        raise self._watcher.wait() or self._died()

    def stop(self) -> None:
        """End the process, its group and its shared memory."""
        try:
            self._watcher.close()
        finally:
            if self._process is not None:
                self._process.stop()

    def _write(self, deployment: Deployment) -> None:
        packages = {package for names in PACKAGES.values() for package in names}
        versions = {package: installed(package) or "" for package in packages}
        proven = deployment.manifest.environment.get("packages", {})
        folder = self._space.folder / "repository"
        served = write_overlay(deployment, folder, backends_dir=self._backends_dir, versions=versions)
        self.served[deployment.model] = served
        for package in () if served.native else PACKAGES[deployment.manifest.format]:
            here = versions[package]
            if here and proven.get(package, here) != here:
                self._progress.say(f"{deployment.model} was proven with {package} {proven[package]}; here is {here}")

    def _await_loaded(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self.process.exit_status() is not None:
                raise self._died()
            models = [m for m in control.index(self.http) or [] if m["name"] in self.served]
            for model in models:
                if model.get("state") == "UNAVAILABLE" and model.get("reason") not in (None, "", "unloaded"):
                    raise control.load_failed(model["name"], model["reason"])
            if {m["name"] for m in models if m.get("state") == "READY"} == set(self.served):
                return
            time.sleep(0.1)
        raise NotReady(
            "the server did not load all models in time",
            why=self.process.log_tail(3),
            next_step=f"give it more time with --ready-timeout, or read {kept_log(self._space)}",
        )

    def _prove(self, deployment: Deployment) -> None:
        def ask(deployment: Deployment, baseline: Baseline) -> list[Comparison]:
            with connect(f"grpc://{self.grpc}") as client:
                return replay(client, deployment, baseline)

        prove_served(deployment, ask, log=kept_log(self._space))

    def _died(self) -> ServerDied:
        return ServerDied(
            f"tritonserver ended by itself (exit status {self.process.exit_status()})",
            why=self.process.log_tail(),
            next_step=f"read its log, {kept_log(self._space)}",
        )

    def _revive(self) -> None:
        """Load a model again when one of its python processes is gone: Triton itself says READY and fails requests."""
        stubs = self.process.stubs()
        self._end_retired(stubs)
        living = Counter(name for pid, name in stubs.items() if pid not in self._retired)
        for model, served in self.served.items():
            if living[model] >= served.instances:
                continue
            if self._watcher.closing or self.process.exit_status() is not None:
                return
            self._progress.say(f"{model}: the process that runs it died; loading it again")
            started = time.monotonic()
            control.load(self.http, model, timeout_s=self._timeout_s)
            end = time.monotonic() + RETIRE_AFTER_S
            self._retired |= {pid: end for pid, name in stubs.items() if name == model}
            self._prove(served.deployment)
            self._progress.say(f"{model}: serves again, after {time.monotonic() - started:.1f} s")

    def _end_retired(self, stubs: Collection[int]) -> None:
        """Kill what Triton leaves: it never unloads the living processes of a model of which one has died."""
        for pid, end in list(self._retired.items()):
            if pid not in stubs:
                del self._retired[pid]
            elif time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _refresh(self) -> None:
        """Serve what was published since; what cannot be served is told, and the version before it stays."""
        seen = published(self._repo)
        if seen == self._seen:
            return
        changed = {model for model, stamp in seen.items() if self._seen.get(model) != stamp}
        gone = self.served.keys() - seen.keys()
        self._seen = seen
        try:
            for deployment in read_repository(self._repo):
                if deployment.model in changed:
                    self._renew(deployment)
        except RepositoryBroken as error:
            self._progress.say(f"no new version is served: {error.what}")
        for model in gone:
            self._remove(model)

    def _renew(self, deployment: Deployment) -> None:
        before = self.served.get(deployment.model)
        try:
            self._write(deployment)
            control.load(self.http, deployment.model, timeout_s=self._timeout_s)
            self._prove(deployment)
            self._progress.say(f"new: {self.served[deployment.model]}")
        except KpdeployError as error:
            self._progress.say(f"{deployment.model} v{deployment.version} is not served: {error.what}: {error.why}")
            if before is None:
                self.served.pop(deployment.model, None)
            else:
                self.served[deployment.model] = before

    def _remove(self, model: str) -> None:
        del self.served[model]
        with contextlib.suppress(OSError):
            control.unload(self.http, model)
        target = self._space.folder / "repository" / model
        if target.is_symlink():
            target.unlink()
        shutil.rmtree(target, ignore_errors=True)
        self._progress.say(f"{model}: removed from the repository, and no longer served")


def _allocator(deployments: Sequence[Deployment], progress: Progress) -> str:
    """The path of the allocator that a model was measured to run best with, or ""."""
    for deployment in deployments:
        if name := deployment.manifest.serving.get("allocator"):
            if path := find_allocator(name):
                return path
            progress.say(f"{deployment.model} was measured with {name}, which is not on this machine: it does without")
    return ""


def published(repo: str) -> dict[str, tuple[int, int]]:
    """What each model's config.pbtxt is, by model: replacing that file publishes a version."""
    stamps = {}
    for config in Path(repo).glob("*/config.pbtxt"):
        with contextlib.suppress(FileNotFoundError):
            stat = config.stat()
            stamps[config.parent.name] = (stat.st_ino, stat.st_mtime_ns)
    return stamps
