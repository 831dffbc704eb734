"""The only package that joins steps; its public names are functions that a command or a user calls."""

from __future__ import annotations

from kpdeploy.pipeline.candidates import Candidate
from kpdeploy.pipeline.exports import ExportReport, export
from kpdeploy.pipeline.gate import check
from kpdeploy.pipeline.migration import MigrateReport, migrate
from kpdeploy.pipeline.optimized import Optimized, auto_optimize
from kpdeploy.pipeline.rollouts import Rollout, abort_rollout, rollout
from kpdeploy.pipeline.watching import Watching, watch

__all__ = [
    "Candidate", "ExportReport", "MigrateReport", "Optimized", "Rollout", "Watching", "abort_rollout", "auto_optimize",
    "check", "export", "migrate", "rollout", "watch",
]  # fmt: skip
