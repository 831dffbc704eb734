"""What an artifact in CUDA graphs takes of a GPU: planned from a few of its graphs before all are captured, measured
when they are; and how many graphs fit into a budget.

A process on a GPU holds the weights, the context of CUDA with the kernels of its libraries, workspaces, one pool of
activations that all graphs share (as large as the largest bucket needs), each graph's own outputs, and each graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from kpdeploy.artifact import Artifact
from kpdeploy.hardware.nvidia import taken_bytes
from kpdeploy.inputs import Array, lead_axis, sample
from kpdeploy.memory import MemoryPlan, Part
from kpdeploy.pipeline.ladders import ladders, places_of, some_of
from kpdeploy.runtimes.buckets import shape_in
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.scratch import work_folder
from kpdeploy.signature import Point, Signature

INPUTS, POOL, GRAPH = "inputs", "activations and outputs", "CUDA graphs"
"""Of the parts that kpdeploy.runtimes.cuda tells, those that its buckets make larger."""


def described(artifact: Artifact) -> dict[str, Any] | None:
    """graphs.json of an artifact whose runtime tells what its graphs take; None of all others."""
    from kpdeploy.export.cuda import GRAPHS

    if artifact.format != "cuda":
        return None
    found: dict[str, Any] = json.loads((artifact.folder / GRAPHS).read_text())
    return found if found["device"] == "cuda" else None


@dataclass(frozen=True, kw_only=True)
class GraphCosts:
    """What a process takes of a GPU (`device`, its name): `fixed` whatever its graphs are; the rest by the place of the
    largest bucket, by the graph, and by the bytes of all outputs. `host_bytes` is its size on the host."""

    device: str
    fixed: tuple[Part, ...]
    bytes_per_place: float
    bytes_per_graph: float
    host_bytes: int = 0
    graphs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, graphs: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], host_bytes: int) -> Self:
        """From what a process told that holds the buckets of `graphs`, at least one."""
        told = {part["what"]: part["bytes"] for part in parts}
        device, buckets = parts[0]["device"], graphs["buckets"]
        grown = told[INPUTS] + told[POOL] - _output_bytes(graphs, buckets)
        return cls(
            device=device,
            fixed=tuple(Part(**part) for part in parts if part["what"] not in (INPUTS, POOL, GRAPH)),
            bytes_per_place=max(0.0, grown / max(map(places_of, buckets))),
            bytes_per_graph=told[GRAPH] / len(buckets),
            host_bytes=host_bytes,
            graphs=graphs,
        )

    def plan(self, buckets: Sequence[Point], point: Point, *, rows: int, instances: int = 1) -> MemoryPlan:
        """The plan of a process with these buckets, of which the largest has `rows` rows."""
        grown = self.bytes_per_place * max(map(places_of, buckets))
        many = f"{len(buckets)} CUDA graph{'s' * (len(buckets) > 1)}"
        return MemoryPlan(
            point=point,
            rows=rows,
            instances=instances,
            parts=(
                Part(what="the process and its libraries", bytes=self.host_bytes),
                *self.fixed,
                Part(what="activations", bytes_per_row=grown / rows, device=self.device),
                Part(what="outputs", bytes=_output_bytes(self.graphs, buckets), device=self.device),
                Part(what=many, bytes=round(self.bytes_per_graph * len(buckets)), device=self.device),
            ),
        )


def _output_bytes(graphs: Mapping[str, Any], buckets: Sequence[Point]) -> int:
    """Each graph keeps its own."""
    kinds = list(zip(graphs["outputs"], graphs["output_dtypes"], strict=True))
    return sum(math.prod(shape_in(b, shape)) * _itemsize(dtype) for b in buckets for shape, dtype in kinds)


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What of an artifact fits into a budget: the plan, and the buckets that are left."""

    plan: MemoryPlan
    buckets: Sequence[Point]


def choices(costs: GraphCosts, signature: Signature, *, batches: Sequence[int], instances: int) -> Iterator[Fitted]:
    """All layouts, in the order of what is given up: instances, then graphs (a request is filled up further), then
    large batches."""
    lead = lead_axis(signature) if signature.batch_axis is not None else ""
    largest = {axis.name: axis.max for axis in signature.axes}
    for rows in sorted(batches, reverse=True):
        within = [b for b in costs.graphs["buckets"] if b.get(lead, rows) <= rows]
        point = {**largest, **({lead: rows} if lead else {})}
        for buckets in ladders(within, costs.graphs["padded"]):
            for count in range(max(1, instances), 0, -1):
                plan = costs.plan(buckets, point, rows=rows, instances=count)
                yield Fitted(plan=plan, buckets=buckets)


def probed(artifact: Artifact) -> GraphCosts:
    """The costs of an artifact, from a process with a few of its graphs, the largest of half the size of the largest.

    Raises:
        ProofFailed: it cannot be loaded.
    """
    whole = described(artifact)
    assert whole is not None
    few = {**whole, "buckets": some_of(whole["buckets"])}
    with work_folder() as folder:
        for file in artifact.folder.iterdir():
            (folder / file.name).symlink_to(file.absolute())
        write(few, folder)
        parts, host_bytes = _loaded(replace(artifact, folder=folder))
    return replace(GraphCosts.of(few, parts, host_bytes), graphs=whole)


def write(graphs: Mapping[str, Any], folder: Path) -> None:
    """graphs.json, in the place of what is there, which may be a link."""
    from kpdeploy.export.cuda import GRAPHS

    (folder / GRAPHS).unlink(missing_ok=True)
    (folder / GRAPHS).write_text(json.dumps(graphs))


def measured(artifact: Artifact, signature: Signature, plan: MemoryPlan) -> MemoryPlan:
    """The plan, and what a process with all graphs took when it was asked the largest request.

    Raises:
        ProofFailed: it cannot be loaded or run.
    """
    inputs = list(sample(signature, plan.point, np.random.default_rng(0)).values())
    parts, host_bytes = _loaded(artifact, inputs)
    device, taken = parts[0]["device"], sum(part["bytes"] for part in parts)
    return replace(plan, measured_bytes=host_bytes, measured_on={device: taken})


def _loaded(artifact: Artifact, inputs: Sequence[Array] | None = None) -> tuple[list[dict[str, Any]], int]:
    """What a process of the artifact takes of the GPU, in parts, and of the host; after a call with `inputs`."""
    before = taken_bytes()
    with RuntimeProcess(artifact) as process:
        if inputs is not None:
            process.run(inputs)
        return own(process.memory(), before), process.peak_bytes


def own(parts: list[dict[str, Any]], before: int | None) -> list[dict[str, Any]]:
    """What a process takes of the GPUs, of which `before` was taken by others. Its runtime sees the whole GPU in the
    last part; the driver knows what is its own, the context of CUDA too."""
    after = taken_bytes()
    if not parts or before is None or after is None:
        return parts
    *known, last = parts
    return [*known, {**last, "bytes": max(0, after - before - sum(part["bytes"] for part in known))}]
