"""A full disk, told as what it is."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kpdeploy.errors import DiskFull, ExportFailed, KpdeployError, ProofFailed

FULL_BYTES = 1 << 20
"""A disk with less left is full: whoever met its end has often removed a part of what it wrote."""


@contextmanager
def told_when_full(work: Path) -> Iterator[None]:
    """A full disk shows as an error of whatever wrote to it: tell it as what it is."""
    try:
        yield
    except (OSError, ExportFailed, ProofFailed) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and shutil.disk_usage(work).free > FULL_BYTES:
            raise
        raise disk_full(work, error.in_a_line if isinstance(error, KpdeployError) else str(error)) from None


def disk_full(work: Path, why: str) -> DiskFull:
    return DiskFull(
        f"no space is left in the temporary folder {work.parent}",
        why=why,
        next_step="free space there, or set TMPDIR to a folder on a larger disk",
    )
