"""The memory plan of an artifact: from what it takes for two small batches, before its largest is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kpdeploy.artifact import Artifact
from kpdeploy.errors import MemoryExceeded
from kpdeploy.inputs import lead_axis, sample
from kpdeploy.memory import MemoryPlan, Part, fitting, size
from kpdeploy.pipeline.candidates import Candidate
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.signature import Signature


def plan_memory(artifact: Artifact, signature: Signature, *, rows: int) -> MemoryPlan:
    """What the artifact takes for a batch of `rows` at the largest sizes of all other axes, planned from a quarter and
    from half of them, for what a call takes grows by the row; then measured. A model that does not batch, or not more
    than two rows, is measured only.

    Raises:
        ProofFailed: it cannot be run.
    """
    lead = lead_axis(signature) if signature.batch_axis is not None else ""
    largest = {axis.name: axis.max for axis in signature.axes}
    point = {**largest, **({lead: max(1, rows)} if lead else {})}
    first, second = max(1, rows // 4), max(2, rows // 2)
    with RuntimeProcess(artifact) as process:
        loading = process.peak_bytes
        loaded = process.reset_peak()

        def peak(point: Mapping[str, int]) -> int:
            process.run(list(sample(signature, point, np.random.default_rng(0)).values()))
            return process.peak_bytes

        if not lead or rows <= second:
            measured = peak(point)
            each, fixed = 0.0, measured - loaded
        else:
            # The first call of a size makes what later ones use again: it is asked twice before it counts.
            few = [peak({**point, lead: count}) for count in (first, first, second)][1:]
            each = max(0.0, (few[1] - few[0]) / (second - first))
            fixed = max(0, round(few[0] - loaded - each * first))
            measured = peak(point)
        elsewhere = tuple(Part(**part) for part in process.memory())
    weights = min(artifact.bytes, loaded)
    return MemoryPlan(
        point=point,
        rows=point.get(lead, 1),
        parts=(
            Part(what="weights", bytes=weights),
            Part(what="runtime, and weights laid out for it", bytes=loaded - weights),
            Part(what="workspace of a call", bytes=fixed),
            Part(what="activations", bytes_per_row=each),
            *elsewhere,
        ),
        loading_bytes=loading,
        measured_bytes=measured,
    )


def check_fits(
    candidates: Sequence[Candidate], signature: Signature, budget_bytes: int, instances: int
) -> tuple[Candidate, MemoryPlan]:
    """The fastest candidate that fits into the budget, with the most instances (up to `instances`) and the largest
    batch that do.

    Raises:
        MemoryExceeded: none does; with what each takes.
    """
    tried = []
    for candidate in sorted((c for c in candidates if c.passed), key=lambda c: c.score):
        assert candidate.artifact is not None
        assert candidate.verdict is not None
        most = max(1, candidate.verdict.max_batch_size)
        plan = plan_memory(candidate.artifact, signature, rows=most)
        batches = {most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)}
        if (found := fitting(plan, budget_bytes, batches=sorted(batches), instances=instances)) is not None:
            return candidate, found
        tried.append((candidate, plan.of(rows=1, instances=1)))
    listed = "\n      ".join(
        f"{candidate.label}: {', '.join(f'{what} {amount}' for what, _, amount in plan.rows_of_table())}"
        for candidate, plan in tried
    )
    raise MemoryExceeded(
        f"nothing fits into {size(budget_bytes)}, not even one row at a time",
        why=listed,
        next_step="allow more with --memory-budget, fewer bits with --level, or narrow the axes with --input",
    )
