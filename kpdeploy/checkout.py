"""What git says of the folder that the user stands in."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any


def branch() -> str:
    """The branch: what CI says, else git's; "" where neither knows."""
    for name in ("GITHUB_REF_NAME", "CI_COMMIT_REF_NAME", "BRANCH_NAME"):
        if said := os.environ.get(name):
            return said
    return _git("symbolic-ref", "--quiet", "--short", "HEAD") or ""


def state() -> dict[str, Any] | None:
    """The commit, and whether there are changes; None outside a checkout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(*words: str) -> str | None:
    """What it prints; None where it is missing or refuses."""
    if shutil.which("git") is None:
        return None
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()
