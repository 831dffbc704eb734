"""The memory plan of an artifact: from what it takes for two small batches, before its largest is run; of one in CUDA
graphs from a few of them, before all are captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kpdeploy.artifact import Artifact
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import MemoryExceeded
from kpdeploy.hardware.nvidia import taken_bytes
from kpdeploy.inputs import lead_axis, sample
from kpdeploy.memory import MemoryPlan, Part, fitting, point_told, size
from kpdeploy.pipeline import graph_memory
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
    if graph_memory.described(artifact) is not None:
        costs = graph_memory.probed(artifact)
        whole = next(graph_memory.choices(costs, signature, batches=[rows], instances=1))
        return graph_memory.measured(artifact, signature, whole.plan)
    lead = lead_axis(signature) if signature.batch_axis is not None else ""
    largest = {axis.name: axis.max for axis in signature.axes}
    point = {**largest, **({lead: max(1, rows)} if lead else {})}
    first, second = max(1, rows // 4), max(2, rows // 2)
    before = taken_bytes()
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
        elsewhere = tuple(Part(**part) for part in graph_memory.own(process.memory(), before))
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


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The candidate that fits into a budget, its plan, and what was given up for it. `thinned`: some of its buckets
    have gone, out of its own folder."""

    chosen: Candidate
    plan: MemoryPlan
    decisions: tuple[Decision, ...]
    thinned: bool = False


def check_fits(
    candidates: Sequence[Candidate], signature: Signature, budget_bytes: int, instances: int, asked: int = 1
) -> Fitting:
    """The fastest candidate that fits into the budget, with the most instances (up to `instances`) and the largest
    batch that do. One in CUDA graphs, of which no instances are measured, gives up some of those that were `asked` for
    first, then graphs, then large batches.

    Raises:
        MemoryExceeded: none does; with what each takes.
    """
    tried = []
    for candidate in sorted((c for c in candidates if c.passed), key=lambda c: c.score):
        assert candidate.artifact is not None
        assert candidate.verdict is not None
        most = max(1, candidate.verdict.max_batch_size)
        batches = sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})
        if graph_memory.described(candidate.artifact) is not None:
            found = _fitting_graphs(candidate, signature, budget_bytes, batches, asked)
            if isinstance(found, Fitting):
                return found
            tried.append((candidate, found))
            continue
        plan = plan_memory(candidate.artifact, signature, rows=most)
        fits = fitting(plan, budget_bytes, batches=batches, instances=instances)
        if fits is not None:
            return Fitting(chosen=candidate, plan=fits, decisions=(_fitted(fits, budget_bytes, most),))
        tried.append((candidate, [plan.of(rows=1, instances=1)]))
    listed = "\n      ".join(f"{candidate.label}: {_listed(plan)}" for candidate, plans in tried for plan in plans)
    least = min((plan.largest_bytes for _, plans in tried for plan in plans), default=0)
    raise MemoryExceeded(
        f"nothing fits into {size(budget_bytes)}, not even one row at a time",
        why=listed,
        next_step=f"allow {size(least)} or more with --memory-budget, fewer bits with --level, or narrow the axes with "
        "--input",
    )


def _listed(plan: MemoryPlan) -> str:
    amounts = ", ".join(f"{what} {amount}" for what, _, amount in plan.rows_of_table())
    return f"{point_told(plan)}: {amounts}"


def _fitting_graphs(
    candidate: Candidate, signature: Signature, budget_bytes: int, batches: Sequence[int], instances: int
) -> Fitting | list[MemoryPlan]:
    """What of a candidate in CUDA graphs fits, measured with the buckets that are left; else the plans of all of it, of
    the fewest graphs, and of the smallest batch."""
    assert candidate.artifact is not None
    costs = graph_memory.probed(candidate.artifact)
    every = list(graph_memory.choices(costs, signature, batches=batches, instances=instances))
    fits = next((choice for choice in every if choice.plan.largest_bytes <= budget_bytes), None)
    if fits is None:
        alone = [choice.plan for choice in every if choice.plan.instances == 1]
        largest = [plan for plan in alone if plan.rows == batches[-1]]
        return [largest[0], largest[-1], alone[-1]]
    all_buckets = len(costs.graphs["buckets"])
    thinned = len(fits.buckets) < all_buckets
    if thinned:
        graph_memory.write({**costs.graphs, "buckets": fits.buckets}, candidate.artifact.folder)
    plan = graph_memory.measured(candidate.artifact, signature, fits.plan)
    told: list[Decision] = [_fitted(plan, budget_bytes, batches[-1])]
    if thinned:
        reason = f"{len(fits.buckets)} fit into {size(budget_bytes)}: requests are filled up further, to those left"
        told.append(Skipped(what=f"{all_buckets} CUDA graphs", reason=reason))
    if (over := max(plan.measured_on.values()) * plan.instances) > budget_bytes:
        told.append(Skipped(what=f"{size(budget_bytes)} as a bound", reason=f"measured {size(over)}"))
    return Fitting(chosen=candidate, plan=plan, decisions=tuple(told), thinned=thinned)


def _fitted(plan: MemoryPlan, budget_bytes: int, most: int) -> Decision:
    if plan.rows < most:
        reason = f"{plan.rows} rows of {most} fit, {point_told(plan)}"
        return Skipped(what=f"batches of more than {plan.rows} rows", reason=reason)
    what = f"memory of at most {size(budget_bytes)}"
    return Applied(what=what, detail=f"planned {size(plan.largest_bytes)}, {point_told(plan)}")
