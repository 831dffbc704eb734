"""What the tests of several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kpdeploy.cli import main

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
