"""What a step decided: Applied, or Skipped with the reason. A decision is a value, so that it can be
printed, stored in the manifest and asserted in tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Applied:
    """The step did `what`; `detail` says how."""

    what: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """The step did not do `what`, for `reason`: something that a user can act on."""

    what: str
    reason: str


Decision = Applied | Skipped
