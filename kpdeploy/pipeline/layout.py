"""How a chosen artifact is laid out on the machine that serves it: its memory, instances and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kpdeploy.artifact import Manifest
from kpdeploy.decision import Decision, Skipped
from kpdeploy.errors import UnknownName
from kpdeploy.hardware import memory_bytes, usable_cores
from kpdeploy.memory import MemoryPlan, parse_bytes, size
from kpdeploy.pipeline.candidates import Candidate
from kpdeploy.pipeline.memory import check_fits, plan_memory
from kpdeploy.pipeline.tuning import LOADS, Tuning, settings_of, tune
from kpdeploy.progress import Progress
from kpdeploy.signature import Signature


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user said about it: the budget in bytes (None: what the machine has), the load ("": none), and how many
    instances shall be served where none are measured."""

    budget_bytes: int | None = None
    load: str = ""
    instances: int = 1

    @classmethod
    def parse(cls, memory_budget: str | None, load: str | None, target: str) -> Wanted:
        """Raises:
        UnknownName: no such load, no amount of memory, or a target whose instances are not set.
        """
        from kpdeploy.load import choose

        if load is not None:
            choose("load", load, LOADS)
            if target != "triton":
                raise UnknownName(
                    f"instances and threads are not set for {target}",
                    why="its workers are those of its own configuration",
                    next_step="leave --tune out, or export for --target triton",
                )
        return cls(budget_bytes=None if memory_budget is None else parse_bytes(memory_budget), load=load or "")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The candidate that is packaged, its memory plan, and what was tuned (None: nothing). `thinned`: it has fewer
    CUDA graphs than when it was measured."""

    chosen: Candidate
    plan: MemoryPlan
    tuning: Tuning | None
    decisions: tuple[Decision, ...]
    thinned: bool = False

    def within(self, manifest: Manifest) -> Manifest:
        """The manifest of the chosen candidate, with this layout in it."""
        threads, tuned = settings_of(self.tuning) if self.tuning is not None else ({}, {})
        serving = {**manifest.serving, **tuned}
        if "instances" in serving:
            serving["instances"] = min(serving["instances"], self.plan.instances)
        plan = self.plan.of(rows=self.plan.rows, instances=serving.get("instances", 1))
        return replace(
            manifest,
            max_batch_size=min(manifest.max_batch_size, self.plan.rows),
            settings={**manifest.settings, **threads},
            serving=serving,
            memory=plan.to_json(),
            tuning=self.tuning.to_json() if self.tuning is not None else {},
        )


def lay_out(
    candidates: Sequence[Candidate], chosen: Candidate, signature: Signature, wanted: Wanted, progress: Progress
) -> Layout:
    """Plan the memory of what will be packaged, or of the fastest that fits into the budget; then measure its layouts.

    Raises:
        MemoryExceeded: nothing fits into the budget.
        ProofFailed: the artifact cannot be run.
    """
    most = max(wanted.instances, int(usable_cores())) if wanted.load == "throughput" else wanted.instances
    told: list[Decision] = []
    thinned = False
    with progress.step("planning its memory"):
        if wanted.budget_bytes is not None:
            fitting = check_fits(candidates, signature, wanted.budget_bytes, most, wanted.instances)
            chosen, plan, thinned = fitting.chosen, fitting.plan, fitting.thinned
            told += fitting.decisions
            if plan.instances < wanted.instances:
                reason = f"{plan.instances} fit into {size(wanted.budget_bytes)}"
                told.append(Skipped(what=f"{wanted.instances} instances", reason=reason))
        else:
            assert chosen.artifact is not None
            assert chosen.verdict is not None
            rows = max(1, chosen.verdict.max_batch_size)
            plan = plan_memory(chosen.artifact, signature, rows=rows)
            plan = plan.of(rows=plan.rows, instances=max(1, min(most, memory_bytes() // plan.instance_bytes())))
    tuning = None
    if wanted.load and chosen.on_gpu:
        told.append(Skipped(what=f"tuning for {wanted.load}", reason="its work is the GPU's, not that of threads here"))
    elif wanted.load:
        assert chosen.artifact is not None
        tuning = tune(chosen.artifact, signature, wanted.load, progress, most_instances=plan.instances)
        told += tuning.decisions
    return Layout(chosen=chosen, plan=plan, tuning=tuning, decisions=tuple(told), thinned=thinned)
