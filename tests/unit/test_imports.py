"""Who may know whom: the layering, read from the sources and confirmed by real imports."""

from __future__ import annotations

import ast
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kpdeploy

PACKAGE = Path(kpdeploy.__file__).parent
LAYERS = (
    {
        "signature",
        "inputs",
        "memory",
        "model",
        "baseline",
        "deployment",
        "compare",
        "artifact",
        "decision",
        "checkout",
        "progress",
        "errors",
        "scratch",
    },
    {"backends", "ops", "hardware", "runtimes"},
    {"load", "optimize", "export", "verify", "bench", "serving", "monitoring"},
    {"pipeline"},
    {"cli"},
)
STEPS = LAYERS[2]
WITHOUT_TORCH = ("serving", "bench", "monitoring")
TORCH = {"torch", "torchvision", "transformers", "timm", "onnxscript"}
# `bench` and `monitoring` talk to a server through the client that `verify` uses.
SHARED_DOORS = {("bench", "kpdeploy.serving.client"), ("monitoring", "kpdeploy.serving.client")}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package, with its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at its top or later, with the line. Types-only imports do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            for alias in node.names:
                # `from kpdeploy.load import files` imports a module, `from kpdeploy.load import Request` a name.
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else str(node.module)), node.lineno


def room(module: str) -> str:
    """The room of a module: the name right under kpdeploy."""
    return [*module.split("."), ""][1]


def layer(name: str) -> int:
    return next(height for height, rooms in enumerate(LAYERS) if name in rooms)


def forbidden(module: str, imported: str) -> str:
    """Why `module` may not import `imported`; empty when it may."""
    source, target = room(module), room(imported)
    # kpdeploy/__init__ and __main__ only forward; what they hold themselves (the version) anyone may know.
    if source in ("", "__main__") or target in ("", source) or (source, imported) in SHARED_DOORS:
        return ""
    if layer(target) > layer(source):
        return f"{source} is below {target}"
    if source in STEPS and target in STEPS:
        return "steps do not know each other"
    return ""


@pytest.mark.parametrize("module", MODULES)
def test_every_import_follows_the_layers(module: str) -> None:
    path = MODULES[module]
    wrong = [
        f"{path}:{line}: {module} imports {imported}: {why}"
        for imported, line in imports(path)
        if imported.split(".")[0] == "kpdeploy" and (why := forbidden(module, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("kpdeploy.signature", "kpdeploy.hardware"),
        ("kpdeploy.hardware", "kpdeploy.load"),
        ("kpdeploy.export.onnx", "kpdeploy.load.files"),
        ("kpdeploy.serving.client", "kpdeploy.bench"),
        ("kpdeploy.bench", "kpdeploy.serving.triton.server"),
        ("kpdeploy.load", "kpdeploy.pipeline"),
        ("kpdeploy.pipeline", "kpdeploy.cli.console"),
    ],
)
def test_an_arrow_against_the_layers_is_seen(module: str, imported: str) -> None:
    assert forbidden(module, imported)


def test_every_room_has_a_layer() -> None:
    rooms = {room(module) for module in MODULES} - {"", "__main__"}
    assert rooms <= set().union(*LAYERS)


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in WITHOUT_TORCH])
def test_a_serving_host_needs_no_torch(module: str) -> None:
    wrong = [f"{MODULES[module]}:{n}: {name}" for name, n in imports(MODULES[module]) if name.split(".")[0] in TORCH]
    assert not wrong, "\n".join(wrong)


def test_importing_serving_bench_and_monitoring_loads_no_torch() -> None:
    # What runs inside Triton or as a script of its own is not for import here.
    wanted = [
        m for m in MODULES if room(m) in WITHOUT_TORCH and not m.endswith((".overlay_model", ".triton.handler_model"))
    ]
    assert wanted
    program = (
        f"import importlib, json, sys\nfor m in {wanted!r}: importlib.import_module(m)\n"
        "print(json.dumps([*sys.modules]))"
    )
    loaded = json.loads(run_python("-c", program))
    assert set(wanted) <= set(loaded)
    assert not TORCH & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize(
    "name", ["onnx", "torchscript", "pt2", "openvino", "worker", "ragged", "buckets", "onnx_graphs"]
)
def test_a_runtime_stands_alone(name: str) -> None:
    used = {imported.split(".")[0] for imported, _ in imports(PACKAGE / "runtimes" / f"{name}.py")}
    own = {
        "onnx": "onnxruntime",
        "onnx_graphs": "onnxruntime",
        "torchscript": "torch",
        "pt2": "torch",
        "openvino": "openvino",
    }
    foreign = used - sys.stdlib_module_names - {"numpy", own.get(name)}
    assert not foreign


def test_help_is_instant() -> None:
    run_python("-m", "kpdeploy", "--help")  # compiles the sources
    taken = []
    for _ in range(5):
        before = cpu_seconds_of_children()
        run_python("-m", "kpdeploy", "--help")
        taken.append(cpu_seconds_of_children() - before)
    # Processor time: it is the whole time on a quiet machine, and a busy one does not stretch it.
    assert statistics.median(taken) <= 0.3, taken


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom kpdeploy.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\nprint(*sys.modules, sep=' ', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    heavy = {"torch", "numpy", "rich", "tritonclient", "fsspec", "psutil", "google", "onnx"}
    assert not heavy & {name.split(".")[0] for name in done.stderr.split()}


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
