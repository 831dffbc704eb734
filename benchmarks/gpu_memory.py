"""What a model in CUDA graphs takes of a GPU: planned from a few of its graphs, and measured with all of them.

    python benchmarks/gpu_memory.py --json benchmarks/results/gpu_memory_h100.json

BERT-base in float16 without padding, up to 32 x 384, in a process of its own, as `kpdeploy export` plans it; and what
`--memory-budget` makes of an eighth of that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_models import MODELS, fused_of, model_of

from kpdeploy import __version__
from kpdeploy.artifact import Artifact, Comparison, Latency, Verdict
from kpdeploy.errors import MemoryExceeded
from kpdeploy.export import cuda
from kpdeploy.hardware import environment
from kpdeploy.load.flat import Flat
from kpdeploy.memory import MemoryPlan
from kpdeploy.ops import register
from kpdeploy.ops.libraries import TORCH, find
from kpdeploy.optimize.lowered import lowered
from kpdeploy.pipeline import graph_memory
from kpdeploy.pipeline.candidates import Candidate
from kpdeploy.pipeline.ladders import ladders
from kpdeploy.pipeline.memory import check_fits, plan_memory
from kpdeploy.signature import Signature

THINNED = 3
"""Times that half of the buckets go: 47 of 177 are left."""


def artifact_of(folder: Path) -> tuple[Artifact, Signature]:
    register()
    capture = fused_of(model_of("bert", MODELS["bert"][0]().eval()), folder)
    made = lowered(capture.program, bits="float16", dropped=True, device="cuda", samples=[], budget=1.0)
    files = folder / "files"
    files.mkdir()
    form = cuda.Form(precision="float16", dropped=True, padded=("batch", "seq"))
    cuda.export(capture, files, form, module=Flat(made.module, None), constant=made.constant)
    described = json.loads((files / cuda.GRAPHS).read_text())
    described["buckets"] = list(ladders(described["buckets"], described["padded"]))[THINNED]
    graph_memory.write(described, files)
    shutil.copyfile(str(find(TORCH)), files / TORCH)
    names = tuple(spec.name for spec in capture.signature.inputs)
    outputs = tuple(spec.name for spec in capture.signature.outputs)
    settings = {"op_libraries": (TORCH,)}
    artifact = Artifact(
        format="cuda",
        folder=files,
        filename=cuda.FILENAME,
        input_names=names,
        output_names=outputs,
        settings=settings,
    )
    return artifact, capture.signature


def refused(artifact: Artifact, signature: Signature, budget_bytes: int) -> str:
    """What is said where nothing fits."""
    right = Comparison(output="", error=0.0, tolerance=1.0, cosine=1.0, top1=1.0)
    candidate = Candidate(
        format="cuda",
        settings=artifact.settings,
        artifact=artifact,
        verdict=Verdict(comparisons=(right,), points=1, max_batch_size=32),
        latencies=(Latency(point={}, p50_ms=1.0, p99_ms=1.0, calls=1),),
    )
    try:
        check_fits([candidate], signature, budget_bytes, 1)
    except MemoryExceeded as error:
        return f"{error.what}\n{error.why}\n{error.next_step}"
    return ""


def row_of(plan: MemoryPlan) -> dict[str, Any]:
    ((device, measured),) = plan.measured_on.items()
    planned = plan.instance_bytes(device)
    return {
        "point": dict(plan.point),
        "planned": {part.what: part.at(plan.rows) for part in plan.parts if part.device == device},
        "planned_bytes": planned,
        "measured_bytes": measured,
        "planned_over_measured": planned / measured,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        artifact, signature = artifact_of(Path(folder))
        plan = plan_memory(artifact, signature, rows=32)
        report = {
            "what": "memory of a process with a model in CUDA graphs, planned and measured",
            "kpdeploy": __version__,
            "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": environment(),
            "rows": [{"model": "bert", "precision": "float16", **row_of(plan)}],
            "refused": refused(artifact, signature, plan.largest_bytes // 8),
        }
    for line in plan.rows_of_table():
        print(*line)
    print(report["refused"])
    options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
