"""`serve`: the server that a repository is for, whichever that is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from kpdeploy.errors import RepositoryBroken, UnknownName
from kpdeploy.progress import Progress
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.torchserve import server as torchserve
from kpdeploy.serving.torchserve.config import Addresses
from kpdeploy.serving.triton import server as triton

SILENT = Progress()


def target_of(repo: str | Path) -> str:
    """The target that a repository is for.

    Raises:
        RepositoryBroken: it cannot be read, or is for several.
    """
    targets = {deployment.manifest.target for deployment in read_repository(str(repo))}
    if len(targets) > 1:
        raise RepositoryBroken(
            f"{repo} holds models for several servers: {', '.join(sorted(targets))}",
            next_step="export each target into a repository of its own",
        )
    return targets.pop()


def serve(
    repo: str | Path,
    *,
    http_port: int | None = None,
    grpc_port: int | None = None,
    metrics_port: int | None = None,
    management_port: int | None = None,
    host: str = "127.0.0.1",
    backends_dir: Path | None = None,
    poll: bool = False,
    token: bool = True,
    ready_timeout_s: float = 120,
    progress: Progress = SILENT,
) -> AbstractContextManager[triton.Server | torchserve.Server]:
    """Serve all models of a repository until the block ends; inside it every golden request came back right.

    Args:
        repo: a folder, or an fsspec URL, which is fetched first.
        http_port, grpc_port, metrics_port: 0 chooses a free one; None is the server's own: 8000, 8001 and 8002 of
            Triton; 8080, 7070 and 8082 of TorchServe, whose management_port is 8081.
        host: the address to listen at. Other than loopback is open to the network.
        backends_dir: a folder of native backends of Triton.
        poll: serve new versions when they are published.
        token: TorchServe asks for a token; Triton knows none.
        ready_timeout_s: seconds to load and to answer right.

    Raises:
        RepositoryBroken, DigestMismatch: the repository is not what was proven.
        UnknownName: no such host, or an option of the other server.
        PortInUse, ServerUnavailable, LibraryMissing: the server cannot be started here.
        ModelLoadFailed, ServerDied, NotReady: it was, and does not serve.
    """
    asked = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
    if target_of(repo) == "torchserve":
        if backends_dir is not None:
            raise UnknownName("TorchServe has no backends", next_step="leave --backends-dir out")
        names = {"http": "inference", "grpc": "grpc_inference", "metrics": "metrics"}
        ports = {names[name]: port for name, port in asked.items() if port is not None}
        ports |= {"management": management_port} if management_port is not None else {}
        # Nobody talks gRPC to its management.
        addresses = Addresses(host=host, grpc_management=0, **ports)
        return torchserve.serve(
            repo, addresses=addresses, token=token, poll=poll, ready_timeout_s=ready_timeout_s, progress=progress
        )
    if not token or management_port is not None:
        raise UnknownName(
            "Triton has neither tokens nor a management port", next_step="leave --no-auth and --management-port out"
        )
    chosen = {f"{name}_port": port for name, port in asked.items() if port is not None}
    return triton.serve(
        repo,
        host=host,
        backends_dir=backends_dir,
        poll=poll,
        revive=True,
        ready_timeout_s=ready_timeout_s,
        progress=progress,
        **chosen,
    )
