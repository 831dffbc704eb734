"""`kpdeploy serve`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kpdeploy.serving.torchserve.server import Served as ServedArchive
    from kpdeploy.serving.torchserve.server import Server as TorchServe
    from kpdeploy.serving.triton.overlay import Served
    from kpdeploy.serving.triton.server import Server

PORT = click.IntRange(0, 65535)

EPILOG = """\b
Examples:
  kpdeploy serve models/
  kpdeploy serve models/ --http-port 0 --grpc-port 0 --metrics-port 0 --json
  kpdeploy serve model_store/ --http-port 8080      # of --target torchserve
  kpdeploy serve models/ --poll        # and, elsewhere, kpdeploy export … --repo models/

A repository of --target torchserve is served by TorchServe 0.12 (Java 11 or newer is needed), which asks for tokens:
its key file is readable for you only, and verify and bench take it by --token-file.

For Triton the server is the tritonserver of the nvidia-pytriton package, installed once into a folder of its own under
~/.cache/kpdeploy. It has no native backends, so its python backend runs the very artifact files of the repository,
in the runtimes of this environment; the repository itself stays what NVIDIA's container loads.
"""


@click.command(epilog=EPILOG)
@click.argument("repo", metavar="REPO")
@click.option("--http-port", type=PORT, help="HTTP port; 0 chooses a free one.  [default: 8000; TorchServe: 8080]")
@click.option("--grpc-port", type=PORT, help="gRPC port; 0 chooses a free one.  [default: 8001; TorchServe: 7070]")
@click.option(
    "--metrics-port", type=PORT, help="Metrics port; 0 chooses a free one.  [default: 8002; TorchServe: 8082]"
)
@click.option("--management-port", type=PORT, help="TorchServe's management port.  [default: 8081]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: the network.")
@click.option(
    "--backends-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of native Triton backends to use where it holds them.",
)
@click.option("--poll", is_flag=True, help="Serve new versions as they are published.")
@click.option("--no-auth", is_flag=True, help="TorchServe asks for no token: whoever reaches its ports uses it.")
@click.option("--ready-timeout", default=120.0, show_default=True, help="Seconds to load and to answer right.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when ready.")
def command(
    repo: str,
    http_port: int | None,
    grpc_port: int | None,
    metrics_port: int | None,
    management_port: int | None,
    host: str,
    backends_dir: Path | None,
    poll: bool,
    no_auth: bool,
    ready_timeout: float,
    as_json: bool,
) -> None:
    """Serve all models of REPO on this machine, with a real Triton or TorchServe as it was exported, until Ctrl-C.

    REPO is a model repository that `kpdeploy export` made: a folder, or an fsspec URL. Ready means that the golden
    requests of every model came back right.
    """
    import signal
    import sys

    # SIGTERM and a closed terminal end the server as Ctrl-C does; asked for, so a success.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))

    from kpdeploy.serving.server import serve

    with serve(
        repo,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        management_port=management_port,
        host=host,
        backends_dir=backends_dir,
        poll=poll,
        token=not no_auth,
        ready_timeout_s=ready_timeout,
        progress=_progress(as_json),
    ) as server:
        _show(server, repo, as_json=as_json)
        server.wait()


def _progress(as_json: bool) -> Any:
    """Bars for people. For machines only what must be told, such as a model loaded again, on stderr."""
    from kpdeploy.cli import console
    from kpdeploy.progress import Progress

    class Told(Progress):
        def say(self, text: str) -> None:
            console.err.print(text)

    return Told() if as_json else console.progress(json_output=False)


def _show(server: Server | TorchServe, repo: str, *, as_json: bool) -> None:
    import sys

    from kpdeploy.cli import console

    addresses = {"http": server.http, "grpc": server.grpc, "metrics": server.metrics}
    key_file = getattr(server, "key_file", None)
    if key_file is not None:
        addresses["key_file"] = str(key_file)
    if as_json:
        models = [_model(served) for served in server.served.values()]
        console.print_json({**addresses, "pid": server.process.pid, "log": server.log, "models": models})
        # Whoever reads a pipe waits for this line.
        sys.stdout.flush()
        return
    rows = []
    for served in server.served.values():
        m = served.deployment.manifest
        rows.append((m.model, m.version, m.format, served.runtime, m.max_batch_size))
    console.table(("model", "version", "format", "runtime", "max batch"), rows)
    console.table(("", ""), [(name, address) for name, address in addresses.items() if address])
    for served in server.served.values():
        console.err.print(f"[dim]{served}[/]")
        if served.padding:
            console.err.print(f"[dim]{served.padding}[/]")
    console.err.print(f"[dim]log: {server.log}[/]\n[dim]ready; Ctrl-C ends the server[/]")
    token = f" --token-file {key_file}" if key_file is not None else ""
    console.next_command(f"kpdeploy verify {repo} --url {server.grpc or server.http}{token}")


def _model(served: Served | ServedArchive) -> dict[str, Any]:
    manifest = served.deployment.manifest
    return {
        "model": manifest.model,
        "version": manifest.version,
        "format": manifest.format,
        "runtime": served.runtime,
        "native": served.native,
        "max_batch_size": manifest.max_batch_size,
        "padded_axes": [] if served.native and manifest.target == "triton" else manifest.padded_axes,
        "run_by": str(served),
    }
