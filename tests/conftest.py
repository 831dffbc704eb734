"""Settings of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# setuptools must come before anyone's distutils, which it replaces; torch imports it when AOTInductor first compiles.
import setuptools  # noqa: F401
from hypothesis import settings

from kpdeploy.cli import main

# Where this was started with SIGINT ignored, as a shell's background jobs are, its children would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing is fetched from a model hub, whatever a test loads.
os.environ["HF_HUB_OFFLINE"] = "1"

# No test writes into the history of whoever runs it.
os.environ["KPDEPLOY_HISTORY"] = "off"

# The same examples every time, and no deadline: a busy machine is no defect.
settings.register_profile("kpdeploy", deadline=None, derandomize=True)
settings.load_profile("kpdeploy")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call kpdeploy as a shell would: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def kpdeploy(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kpdeploy", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return kpdeploy
