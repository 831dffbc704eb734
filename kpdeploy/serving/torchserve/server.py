"""A real TorchServe on this machine: started, proven ready, watched, and ended without a trace."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from kpdeploy.artifact import Comparison
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import KpdeployError, ModelLoadFailed, NotReady, PortInUse, RepositoryBroken, ServerDied
from kpdeploy.progress import Progress
from kpdeploy.serving.client import replay
from kpdeploy.serving.proof import prove_served
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.storage import check_pollable, fetch, local_path
from kpdeploy.serving.torchserve.archive import archive_name
from kpdeploy.serving.torchserve.client import TorchServeClient
from kpdeploy.serving.torchserve.config import Addresses, properties
from kpdeploy.serving.torchserve.environment import ServerEnvironment, ensure_environment
from kpdeploy.serving.torchserve.management import Management, load_failed, read_tokens
from kpdeploy.serving.triton.ports import any_free, free_after, refusal
from kpdeploy.serving.triton.scratch import Scratch, kept_log, scratch
from kpdeploy.serving.watcher import Watcher

KEY_FILE = "key_file.json"
STOP_TIMEOUT_S = 5
WATCH_INTERVAL_S = 1.0
FAILED = ("Load model failed", "Failed to load model")
"""What the log says of a worker that cannot load its model: TorchServe itself tries again and again."""
_REASON = re.compile(r"MODEL_LOG - ([A-Za-z_][\w.]*: .+)|WorkerInitializationException: (.+)")
"""The last line of a worker's traceback, or what the frontend says of a worker."""
UNMAINTAINED = (
    "TorchServe is no longer maintained: its repository was archived in August 2025, security fixes included. The same "
    "model for Triton: kpdeploy export MODEL --target triton; an archive of yours: kpdeploy migrate MODEL.mar"
)
SILENT = Progress()


@dataclass(frozen=True, kw_only=True)
class Served:
    """One deployment as the server runs it."""

    deployment: Deployment
    native: bool = True
    runtime: str = "TorchServe 0.12.0"
    padding: str = ""

    def __str__(self) -> str:
        manifest = self.deployment.manifest
        return f"{manifest.model} v{manifest.version}: {archive_name(manifest.model)} ({manifest.filename})"


@contextmanager
def serve(
    repo: str | Path,
    *,
    addresses: Addresses,
    token: bool = True,
    poll: bool = False,
    ready_timeout_s: float = 120,
    progress: Progress = SILENT,
) -> Iterator[Server]:
    """Serve all models of a repository until the block ends; inside it every golden request came back right.

    Args:
        repo: a folder, or an fsspec URL, which is fetched first.
        addresses: where to listen; ports of 0 become free ones.
        token: requests need a token (`Server.key_file` holds it). Without, whoever reaches a port uses and unloads the
            models.
        poll: serve new versions when they are published, and earlier ones when they are rolled back to.

    Raises:
        RepositoryBroken, DigestMismatch: the repository is not what was proven.
        UnknownName: `poll` of a URL.
        PortInUse, ServerUnavailable, LibraryMissing: the server cannot be started here.
        ModelLoadFailed, ServerDied, NotReady: it was, and does not serve.
    """
    if poll:
        check_pollable(repo)
    progress.say(UNMAINTAINED)
    if not token:
        progress.say("no token is asked for: every user and program of this machine can use and unload the models")
    if not (addresses.host.startswith("127.") or addresses.host in ("localhost", "::1")):
        progress.say(f"listening at {addresses.host}: anyone who reaches this machine can send requests")
    with scratch() as space:
        local = fetch(local_path(repo), space.folder / "native", progress)
        deployments = read_repository(local)
        claimed = claim(addresses)
        environment = ensure_environment(progress, [d.manifest for d in deployments])
        server = Server(local, claimed, space, environment, token=token, progress=progress)
        try:
            server.start(deployments, ready_timeout_s=ready_timeout_s, poll=poll)
            server.watch(poll=poll)
            yield server
        finally:
            server.stop()


@contextmanager
def running_archives(
    archives: Sequence[Path],
    *,
    handlers: Sequence[str] = (),
    ready_timeout_s: float = 120,
    progress: Progress = SILENT,
) -> Iterator[Server]:
    """Serve archives of anybody as they are, on free ports of loopback with tokens: their code runs, as TorchServe
    has it. `handlers` are the stock ones among theirs, whose packages are installed.

    Raises:
        PortInUse, ServerUnavailable, LibraryMissing, ModelLoadFailed, ServerDied, NotReady: as `serve`.
    """
    free = Addresses(inference=0, management=0, metrics=0, grpc_inference=0, grpc_management=0)
    with scratch() as space:
        environment = ensure_environment(progress, handlers=handlers)
        server = Server("", claim(free), space, environment, token=True, progress=progress)
        try:
            server.start_archives(archives, ready_timeout_s=ready_timeout_s)
            yield server
        finally:
            server.stop()


def claim(addresses: Addresses) -> Addresses:
    """The same ports, all free just now, those that were 0 chosen.

    Raises:
        PortInUse: a port is taken, or given twice.
    """
    claimed: dict[str, int] = {}
    for field in fields(addresses)[1:]:
        host = addresses.host if "inference" in field.name else "127.0.0.1"
        port = getattr(addresses, field.name) or any_free(host)
        while not getattr(addresses, field.name) and port in claimed.values():
            port = any_free(host)
        reason = "it is also another port of this server" if port in claimed.values() else refusal(host, port)
        if reason:
            raise PortInUse(
                f"port {port} ({field.name.replace('_', ' ')}) cannot be used",
                why=reason,
                next_step=f"free it, or give another one, such as {free_after(host, port)}, or 0",
            )
        claimed[field.name] = port
    return Addresses(host=addresses.host, **claimed)


class Server:
    """A running TorchServe. `served` says what it runs, `http`, `management` and `metrics` where it listens."""

    grpc = ""

    def __init__(
        self,
        repo: str,
        addresses: Addresses,
        space: Scratch,
        environment: ServerEnvironment,
        *,
        token: bool,
        progress: Progress,
    ) -> None:
        self.addresses = addresses
        self.served: dict[str, Served] = {}
        self._refused: set[tuple[str, int]] = set()
        self._broken = ""
        self._repo = repo
        self._space = space
        self._environment = environment
        self._token = token
        self._progress = progress
        self._process: subprocess.Popen[bytes] | None = None
        self._timeout_s = 0.0
        self._watcher = Watcher(lambda: self.process.poll() is None, interval_s=WATCH_INTERVAL_S)

    @property
    def http(self) -> str:
        host = {"0.0.0.0": "127.0.0.1"}.get(self.addresses.host, self.addresses.host)
        return f"{host}:{self.addresses.inference}"

    @property
    def metrics(self) -> str:
        return f"http://127.0.0.1:{self.addresses.metrics}/metrics"

    @property
    def management(self) -> Management:
        return Management(address=f"127.0.0.1:{self.addresses.management}", key_file=self.key_file)

    @property
    def log(self) -> Path:
        return self._space.log

    @property
    def key_file(self) -> Path | None:
        """Where the tokens are: readable for this user only, and gone with the server."""
        return self._space.folder / KEY_FILE if self._token else None

    @property
    def token(self) -> str:
        """What a request needs; empty where it needs none."""
        return read_tokens(self.key_file)["inference"] if self.key_file is not None else ""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self, deployments: Sequence[Deployment], *, ready_timeout_s: float, poll: bool = False) -> None:
        """Start the process, and wait until every worker is ready and every golden request came back right."""
        deadline = time.monotonic() + ready_timeout_s
        self._timeout_s = ready_timeout_s
        store = self._space.folder / "model_store"
        store.mkdir()
        with self._progress.step("checking the digests of the archives", total=len(deployments)) as advance:
            for deployment in deployments:
                self._place(deployment)
                advance()
        names = [_stored(d) for d in deployments]
        config = self._space.folder / "config.properties"
        lines = properties(names, self.addresses, token=self._token, store=str(store), model_api=poll)
        config.write_text(lines)
        with self._progress.step("starting TorchServe and loading the models"):
            self._start_process(config)
            self._await_loaded(deployments, deadline)
        with self._progress.step("sending the golden requests", total=len(deployments)) as advance:
            for deployment in deployments:
                self._prove(deployment)
                advance()

    def start_archives(self, archives: Sequence[Path], *, ready_timeout_s: float) -> None:
        """Start the process with archives that have neither manifest nor golden requests."""
        store = self._space.folder / "model_store"
        store.mkdir()
        for archive in archives:
            (store / archive.name).symlink_to(archive.absolute())
        config = self._space.folder / "config.properties"
        config.write_text(properties([a.name for a in archives], self.addresses, token=self._token, store=str(store)))
        self._start_process(config)
        self._await(lambda: self._all_ready(len(archives)), "archives", time.monotonic() + ready_timeout_s)

    def _all_ready(self, count: int) -> bool:
        found = [entry for model in self.management.models() for entry in self.management.versions(model)]
        states = [worker["status"] for entry in found for worker in entry["workers"]]
        return len(found) == count <= len(states) and all(state == "READY" for state in states)

    def watch(self, *, poll: bool) -> None:
        """From now on notice the server's end and, with `poll`, serve new versions."""
        self._watcher.start(self._refresh if poll else lambda: None)

    def wait(self) -> None:
        """Block for as long as the server serves; returns never, or by raising ServerDied."""
        raise self._watcher.wait() or self._died()

    def stop(self) -> None:
        """End the whole process group: asked to end, the launcher alone would leave Java and its workers."""
        self._watcher.close()
        if self._process is None:
            return
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
        end = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < end and _alive(group):
            self._process.poll()
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()

    def _start_process(self, config: Path) -> None:
        temporary = self._space.folder / "tmp"
        temporary.mkdir()
        command = [*self._environment.torchserve, "--start", "--foreground", "--ncs", "--ts-config", str(config)]
        with self._space.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-IS", str(Path(__file__).with_name("launcher.py")), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its key file and its logs go to the current folder.
                cwd=self._space.folder,
                env=self._environment.variables(temporary),
                start_new_session=True,
                pass_fds=(self._space.lock,),
            )

    def _place(self, deployment: Deployment) -> None:
        """Put a version's archive into the server's model store, once it is known to be the proven one."""
        folder = Path(deployment.folder).absolute()
        deployment.manifest.check_files(folder)
        link = self._space.folder / "model_store" / _stored(deployment)
        link.unlink(missing_ok=True)
        link.symlink_to(folder / archive_name(deployment.model))
        self.served[deployment.model] = Served(deployment=deployment)

    def _await_loaded(self, deployments: Sequence[Deployment], deadline: float) -> None:
        def ready() -> bool:
            return all(self.management.ready(d.model, d.version) for d in deployments)

        self._await(ready, ", ".join(d.model for d in deployments), deadline)

    def _await(self, ready: Callable[[], bool], what: str, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self._died()
            # What cannot load would otherwise be tried until the time is over.
            if reason := self._load_failure():
                raise load_failed(what, reason)
            # Nothing answers yet, or there is no key file.
            with contextlib.suppress(OSError, KpdeployError, ValueError, KeyError):
                if ready():
                    return
            time.sleep(0.2)
        raise NotReady(
            "the server did not load all models in time",
            why=self._log_tail(3),
            next_step=f"give it more time with --ready-timeout, or read {kept_log(self._space)}",
        )

    def _load_failure(self) -> str:
        """The reason in the log, once a worker has failed to load its model."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        failure = next((line for line in text.splitlines() if any(said in line for said in FAILED)), "")
        if not failure:
            return ""
        _, found, traceback = text.rpartition("MODEL_LOG - Traceback")
        reason = _REASON.search(traceback if found else text[text.find("Backend worker error") :])
        return (reason[1] or reason[2]) if reason else failure

    def _prove(self, deployment: Deployment) -> None:
        def ask(deployment: Deployment, baseline: Baseline) -> list[Comparison]:
            with TorchServeClient(self.http, token=self.token, timeout_s=30) as client:
                return replay(client, deployment, baseline)

        prove_served(deployment, ask, log=kept_log(self._space))

    def _log_tail(self, lines: int = 12) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-lines:])

    def _died(self) -> ServerDied:
        return ServerDied(
            f"TorchServe ended by itself (exit status {self.process.poll()})",
            why=self._log_tail(),
            next_step=f"read its log, {kept_log(self._space)}",
        )

    def _refresh(self) -> None:
        """Serve what is committed now; what cannot be served is told once, and the version before it stays."""
        try:
            deployments = read_repository(self._repo)
        except RepositoryBroken as error:
            if error.what != self._broken:
                self._progress.say(f"no new version is served: {error.what}")
            self._broken = error.what
            return
        self._broken = ""
        for model in self.served.keys() - {deployment.model for deployment in deployments}:
            self._remove(model)
        for deployment in deployments:
            before = self.served.get(deployment.model)
            current = before.deployment.version if before is not None else 0
            if deployment.version != current and (deployment.model, deployment.version) not in self._refused:
                self._renew(deployment, before)

    def _remove(self, model: str) -> None:
        version = self.served.pop(model).deployment.version
        with contextlib.suppress(OSError):
            self.management.unregister(model, version)
        self._progress.say(f"{model}: removed from the repository, and no longer served")

    def _renew(self, deployment: Deployment, before: Served | None) -> None:
        """Load a version beside the one that is served, prove it, give it the requests, and drop the other."""
        loaded = False
        self._refused = {entry for entry in self._refused if entry[0] != deployment.model}
        try:
            self._place(deployment)
            self.management.register(_stored(deployment), timeout_s=self._timeout_s)
            loaded = True
            self._prove(deployment)
            self.management.set_default(deployment.model, deployment.version)
            if before is not None:
                self.management.unregister(deployment.model, before.deployment.version)
            self._progress.say(f"new: {self.served[deployment.model]}")
        except (KpdeployError, urllib.error.URLError) as error:
            told = f"{error.what}: {error.why}" if isinstance(error, KpdeployError) else str(error)
            self._progress.say(f"{deployment.model} v{deployment.version} is not served: {told}")
            self._refused.add((deployment.model, deployment.version))
            if before is None:
                self.served.pop(deployment.model, None)
            else:
                self.served[deployment.model] = before
            if loaded or isinstance(error, ModelLoadFailed):
                with contextlib.suppress(OSError):
                    self.management.unregister(deployment.model, deployment.version)


def _stored(deployment: Deployment) -> str:
    """An archive's name in the server's own model store, where versions lie side by side."""
    return f"{deployment.model}-v{deployment.version}.mar"


def _alive(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False
