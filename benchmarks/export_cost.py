"""What exporting a model costs: wall time and peak memory of `kpdeploy export MODEL` in a fresh process.

    python benchmarks/export_cost.py minilm --format onnx -o benchmarks/results/export_minilm_onnx.json

Memory is the resident size of the command and all its children together, sampled, beside the kernel's own high-water
mark of each process. The bound is 4 x the weights + torch itself, where torch itself is the high-water mark of a
process that imports what an export imports, and runs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil

from kpdeploy import __version__
from kpdeploy.artifact import Manifest
from kpdeploy.cli import console
from kpdeploy.hardware import environment

SAMPLE_SECONDS = 0.02
IMPORTS = {
    "onnx": "torch, torch.onnx, transformers, onnx, onnxscript, onnxruntime",
    "openvino": "torch, torch.onnx, transformers, onnx, onnxscript, openvino",
    "torchscript": "torch, transformers",
    "pt2": "torch, torch._inductor, transformers",
}
"""What an export to each format imports, its proof included."""

MODELS = "transformers.AutoModel"
"""transformers imports lazily: the class that loads a model brings the rest."""


@dataclass(kw_only=True)
class Usage:
    """One process: its command, and its largest resident size (VmHWM) in bytes as last seen."""

    command: str
    peak_bytes: int = 0


@dataclass(kw_only=True)
class Cost:
    seconds: float = 0.0
    tree_peak_bytes: int = 0
    tree_peak_at_seconds: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    processes: dict[int, Usage] = field(default_factory=dict)


def watch(command: Sequence[str]) -> Cost:
    """Run a command to its end, and sample the memory of its tree of processes.

    The steps that it names on stderr are kept with the largest size of the tree during each.
    """
    cost = Cost()
    with tempfile.TemporaryFile("w+") as said:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said) as process:
            root = psutil.Process(process.pid)
            while process.poll() is None:
                step = last_line(said)
                taken = sample(root, cost.processes)
                at = time.perf_counter() - start
                if not cost.steps or cost.steps[-1]["step"] != step:
                    cost.steps.append({"step": step, "from_seconds": round(at, 2), "tree_peak_bytes": 0})
                cost.steps[-1]["tree_peak_bytes"] = max(cost.steps[-1]["tree_peak_bytes"], taken)
                if taken > cost.tree_peak_bytes:
                    cost.tree_peak_bytes, cost.tree_peak_at_seconds = taken, round(at, 2)
                time.sleep(SAMPLE_SECONDS)
            cost.seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}:\n{said.read()[-2000:]}")
    return cost


def last_line(said: Any) -> str:
    # pread: the child shares this file's offset.
    size = os.fstat(said.fileno()).st_size
    tail = os.pread(said.fileno(), 500, max(0, size - 500)).decode(errors="replace").splitlines()
    return tail[-1].strip() if tail else "starting"


def sample(root: psutil.Process, seen: dict[int, Usage]) -> int:
    """Resident bytes of a process and its descendants now; their high-water marks go to `seen`."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
                command = " ".join(Path(word).name for word in process.cmdline()[:6])
                usage = seen.setdefault(process.pid, Usage(command=command))
                usage.peak_bytes = max(usage.peak_bytes, high_water(process.pid))
    return total


def high_water(pid: int) -> int:
    """VmHWM of a process in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def torch_itself(format: str) -> int:
    """VmHWM of a process that imports what an export imports."""
    code = (
        f"import {IMPORTS[format]}\n{MODELS}\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) << 10


def weights_bytes(model: str) -> int:
    """Parameters and buffers of the unmodified model, counted in a process of its own."""
    code = (
        "import sys; from kpdeploy.load import load_model; m = load_model(sys.argv[1]).module\n"
        "held = [t.untyped_storage() for t in (*m.parameters(), *m.buffers())]\n"
        "print(sum({s.data_ptr(): s.nbytes() for s in held}.values()))"
    )
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@click.command()
@click.argument("model", default="minilm")
@click.option("--format", type=click.Choice([*IMPORTS]), default="onnx", show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-o", "output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The JSON to write.")
def main(model: str, format: str, runs: int, output: Path) -> None:
    """Export MODEL in fresh processes, into an empty repository each time, and write what it cost."""
    before = os.getloadavg()
    weights, torch = weights_bytes(model), torch_itself(format)
    bound = 4 * weights + torch
    costs = []
    for number in range(runs):
        with tempfile.TemporaryDirectory(prefix="kpdeploy-cost-") as repo:
            console.err.print(f"export {number + 1} of {runs}")
            command = [sys.executable, "-m", "kpdeploy", "export", model, "--repo", repo, "--format", format]
            costs.append(watch(command))
            (folder,) = Path(repo).glob("*/1")
            manifest = Manifest.read(folder)
    slowest = max(costs, key=lambda cost: cost.seconds)
    largest = max(costs, key=lambda cost: cost.tree_peak_bytes)
    process = max(usage.peak_bytes for cost in costs for usage in cost.processes.values())
    report = {
        "what": f"kpdeploy export {model} --format {format}: fresh process, proof and package included",
        "kpdeploy": __version__,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "load_average": {"before": list(before), "after": list(os.getloadavg())},
        "files": dict(manifest.files),
        "weights_bytes": weights,
        "torch_itself_bytes": torch,
        "torch_itself": f"VmHWM after import {IMPORTS[format]}, {MODELS}",
        "bound_bytes": bound,
        "worst": {
            "seconds": round(slowest.seconds, 2),
            "tree_peak_bytes": largest.tree_peak_bytes,
            "tree_within_bound": largest.tree_peak_bytes <= bound,
            "largest_process_bytes": process,
            "largest_process_within_bound": process <= bound,
        },
        "runs": [asdict(cost) | {"processes": [asdict(u) for u in cost.processes.values()]} for cost in costs],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    steps = [(s["step"], f"{s['from_seconds']:.1f}", f"{s['tree_peak_bytes'] / 2**20:.0f}") for s in largest.steps]
    console.table(("step", "from s", "tree peak MiB"), steps, title=f"{model} to {format}")
    console.table(
        ("", "MiB"),
        [
            ("weights", f"{weights / 2**20:.0f}"),
            ("torch itself", f"{torch / 2**20:.0f}"),
            ("bound: 4 x weights + torch itself", f"{bound / 2**20:.0f}"),
            ("largest process (VmHWM)", f"{process / 2**20:.0f}"),
            ("all processes together (sampled)", f"{largest.tree_peak_bytes / 2**20:.0f}"),
        ],
    )
    console.out.print(f"slowest of {runs}: {slowest.seconds:.1f} s; load average before {before[0]:.2f}")
    console.err.print(f"written: {output}")


if __name__ == "__main__":
    main()
