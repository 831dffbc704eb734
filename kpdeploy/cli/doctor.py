"""`kpdeploy doctor`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kpdeploy.decision import Decision
    from kpdeploy.errors import WouldNotLoad
    from kpdeploy.hardware import Accelerator, Hardware
    from kpdeploy.serving.triton.compatibility import Compatibility
    from kpdeploy.serving.triton.containers import Container

EPILOG = """\b
Examples:
  kpdeploy doctor
  kpdeploy doctor --json
  kpdeploy doctor models/ --container tritonserver:25.09
  kpdeploy doctor models/

It only looks: nothing is installed, imported or changed. Without REPO the exit code is 0 whatever is missing; with it,
0 where every model would load, else 45.
"""

# Package, and what it is for.
NEEDED = {
    "torch": "loading and exporting models",
    "onnx": "format onnx",
    "onnxscript": "format onnx",
    "onnxruntime": "format onnx",
    "openvino": "format openvino",
    "nncf": "export --level 3",
    "transformers": "Hugging Face models",
    "safetensors": "Hugging Face models",
    "timm": "timm:NAME models",
    "tritonclient": "talking to a server",
    "matplotlib": "bench --plot",
}

# What the bundled tritonserver is linked to.
GLIBC = (2, 34)

EXPORTERS = {
    "onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "torchscript": ("torch",),
    "pt2": ("torch",),
    "openvino": ("torch", "openvino"),
    "cuda": ("torch",),
}


@click.command(epilog=EPILOG)
@click.argument("repo", required=False)
@click.option(
    "--container",
    metavar="TAG",
    help="Would the models of REPO load in this one of NVIDIA's containers? 25.09, tritonserver:25.09 or its image.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, repo: str | None, container: str | None, as_json: bool) -> None:
    """Show what is on this machine, what is missing, and how to get it.

    With REPO: what of a repository would load in a container of NVIDIA's, by what is known of its contents; without
    --container, in the runtimes that are installed here. Each reason is a version that is too old, a file that is not
    the proven one, or something that is not known.
    """
    if container is not None and repo is None:
        raise click.UsageError("--container needs REPO: the repository whose models would be served in it")
    if repo is not None:
        _check_repository(ctx, repo, container, as_json)
        return
    _show_machine(as_json)


def _check_repository(ctx: click.Context, repo: str, container: str | None, as_json: bool) -> None:
    from dataclasses import asdict

    from kpdeploy.cli import console
    from kpdeploy.errors import UnknownName
    from kpdeploy.serving.repository import local_files, read_repository
    from kpdeploy.serving.triton import compatibility
    from kpdeploy.serving.triton.containers import find_container
    from kpdeploy.serving.triton.launch import LAUNCH
    from kpdeploy.serving.triton.repository import read_model_config

    where = compatibility.here() if container is None else find_container(container)
    deployments = read_repository(repo)
    found = []
    for deployment in deployments:
        if deployment.manifest.target != "triton":
            raise UnknownName(
                f"{repo} is for {deployment.manifest.target}",
                why="what is known of containers is known of NVIDIA's, for Triton",
                next_step=f"see whether it loads: kpdeploy serve {repo}",
            )
        with local_files(deployment) as folder:
            config = read_model_config(deployment)
            found.append(compatibility.check(deployment.manifest, folder, where, config))
    error = _would_not_load(where, found)
    if as_json:
        models = [entry.to_json() for entry in found]
        console.print_json({"loads": error is None, "container": asdict(where), "models": models})
        if error:
            ctx.exit(error.exit_code)
        return
    console.table(("model", "checked", "loads", ""), _check_rows(found), title=f"in {where}")
    if error:
        raise error
    scripts = [f"{entry.folder}/{LAUNCH}" for entry in deployments if LAUNCH in entry.manifest.files]
    launch = f"TRITON_IMAGE={where.image} bash {scripts[0]}" if scripts and container else f"kpdeploy serve {repo}"
    console.next_command(launch)


def _check_rows(found: list[Compatibility]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for entry in found:
        name = f"{entry.manifest.model} v{entry.manifest.version}"
        for decision in entry.decisions:
            rows.append((name, decision.what, *_answer(decision)))
            name = ""
    return rows


def _answer(decision: Decision) -> tuple[object, str]:
    from rich.text import Text

    from kpdeploy.decision import Applied
    from kpdeploy.serving.triton.compatibility import NOT_KNOWN

    if isinstance(decision, Applied):
        return Text("yes", style="green"), decision.detail
    if decision.reason.startswith(NOT_KNOWN):
        return Text(NOT_KNOWN, style="yellow"), decision.reason.removeprefix(f"{NOT_KNOWN}: ")
    return Text("NO", style="bold red"), decision.reason


def _would_not_load(where: Container, found: list[Compatibility]) -> WouldNotLoad | None:
    from kpdeploy.errors import WouldNotLoad

    refused = [entry for entry in found if not entry.loads]
    if not refused:
        return None
    first, *more = [skipped for entry in refused for skipped in entry.against]
    names = ", ".join(entry.manifest.model for entry in refused)
    return WouldNotLoad(
        f"{len(refused)} of {len(found)} models would not load in {where}, or it is not known whether: {names}",
        why=f"{first.what}: {first.reason}" + (f" (and {len(more)} more)" if more else ""),
        next_step="try another --container, or export again in another --format or with --fuse never",
    )


def _show_machine(as_json: bool) -> None:
    from dataclasses import asdict

    from kpdeploy.backends import lowerings
    from kpdeploy.cli import console
    from kpdeploy.hardware import detect

    machine = detect()
    tools = _tools()
    formats = _formats(tools)
    if as_json:
        console.print_json(
            {
                "hardware": asdict(machine),
                "levels": [asdict(way) for way in lowerings(machine)],
                "packages": _packages(),
                "tools": tools,
                "formats": formats,
            },
        )
        return
    console.table(("hardware", ""), _hardware_rows(machine))
    console.out.print()
    ways = [(way.what, way.format, _answer_of(way.missing)) for way in lowerings(machine)]
    console.table(("export --level", "format", "here"), [("level 1 (as exact as the model)", "all", "yes"), *ways])
    console.out.print()
    rows = [(p["package"], p["version"] or "missing", p["for"], p["get"]) for p in _packages()]
    console.table(("package", "version", "for", "to get it"), rows)
    console.out.print()
    console.table(("tool", "state", "to get it"), [(t["tool"], t["state"], t["get"]) for t in tools.values()])
    console.out.print()
    columns = ("format", "export here", "serve here (target triton)")
    console.table(
        columns,
        [(f["format"], _can(f["export_needs"], []), _can(f["serve_needs"], f["serve_installs"])) for f in formats],
    )
    console.next_command("kpdeploy export minilm --target triton --repo models/")


def _answer_of(missing: str) -> str:
    return f"no: {missing}" if missing else "yes"


def _hardware_rows(machine: Hardware) -> list[tuple[str, str]]:
    gpus = [
        f"{g.name}, capability {g.capability} ({', '.join(g.units) or 'no bf16'}), {_gb(g.memory_bytes)}, "
        f"driver {g.driver}"
        for g in machine.gpus
    ]
    cores = f"{machine.physical_cores} physical, {machine.logical_cores} logical, {machine.usable_cores:g} usable"
    return [
        ("processor", machine.cpu),
        ("cores", cores),
        ("instructions", " ".join(machine.isa) or "none of those that matter"),
        ("memory", _gb(machine.memory_bytes)),
        *[("GPU", gpu) for gpu in gpus or ["none found" if not machine.others else "none of NVIDIA"]],
        *[("accelerator", _accelerator(device)) for device in machine.others],
        *[("wrong", str(problem)) for problem in machine.problems],
    ]


def _accelerator(device: Accelerator) -> str:
    memory = [_gb(device.memory_bytes)] if device.memory_bytes else []
    parts = [device.name, *memory, f"driver {device.driver or 'missing'}", device.runtime or "no runtime installed"]
    return ", ".join(parts)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _packages() -> list[dict[str, str]]:
    from kpdeploy.hardware import packages

    found = packages()
    return [
        {"package": name, "version": found.get(name, ""), "for": why, "get": "" if name in found else _get(name)}
        for name, why in NEEDED.items()
    ]


def _get(package: str) -> str:
    if package == "torch":
        return "pip install torch --index-url https://download.pytorch.org/whl/cpu"
    return f"pip install {package}"


def _tools() -> dict[str, dict[str, Any]]:
    """What is needed beside packages, by key: {tool, state, ok, get}."""
    import platform
    import shutil

    from kpdeploy.serving.torchserve.environment import java
    from kpdeploy.serving.triton import environment as server

    folder = server.environment_folder()
    existing = next(f for f in (server.cache_folder(), *server.cache_folder().parents) if f.exists())
    free = shutil.disk_usage(existing).free
    glibc = platform.libc_ver()[1]
    new_enough = glibc and tuple(map(int, glibc.split("."))) >= GLIBC
    supported = server.PYTHON in server.PYTHONS
    space = f"{_gb(free)} free in {existing}" if free > 500e6 or folder.exists() else ""
    return {
        "compiler": _tool("C++ compiler, for pt2", shutil.which("g++") or shutil.which("clang++"), "apt install g++"),
        "libpython": _tool("shared libpython", server.shared_libpython(), f"apt install libpython{server.PYTHON}"),
        "python": _tool("server's Python", supported and server.PYTHON, f"use Python {' or '.join(server.PYTHONS)}"),
        "glibc": _tool("glibc 2.34 or newer", new_enough and glibc, "use Debian 12, Ubuntu 22.04 or newer"),
        "disk": _tool("disk space", space, f"free 500 MB in {existing}, or set XDG_CACHE_HOME"),
        "java": _tool("Java, for TorchServe", java(), "apt install openjdk-17-jre-headless"),
        "tritonserver": _tool("tritonserver", folder.exists() and folder, "installed by the first kpdeploy serve"),
    }


def _tool(name: str, found: object, get: str) -> dict[str, Any]:
    return {"tool": name, "state": str(found) if found else "missing", "ok": bool(found), "get": "" if found else get}


def _formats(tools: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each format what is missing to export it and to serve it here."""
    from kpdeploy.hardware import packages
    from kpdeploy.runtimes import PACKAGES

    found = packages()
    serve_needs = [tools[key]["tool"] for key in ("libpython", "python", "glibc", "disk") if not tools[key]["ok"]]
    rows = []
    for name, needed in EXPORTERS.items():
        export_needs = [package for package in needed if package not in found]
        if name == "pt2" and not tools["compiler"]["ok"]:
            export_needs.append("a C++ compiler")
        # A runtime that is not here is installed by `kpdeploy serve`, in the version that proved the artifact.
        installs = [package for package in PACKAGES[name] if package not in found]
        rows.append(
            {"format": name, "export_needs": export_needs, "serve_needs": serve_needs, "serve_installs": installs}
        )
    return rows


def _can(needs: list[str], installs: list[str]) -> str:
    if needs:
        return f"needs {', '.join(needs)}"
    return f"yes, installing {', '.join(installs)}" if installs else "yes"
