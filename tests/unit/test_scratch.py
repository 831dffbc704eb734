"""Temporary folders: gone with their work, and those of killed runs with the next one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from kpdeploy.scratch import PREFIX, sweep, work_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def hold(ready: Event) -> None:
    with work_folder() as folder:
        (folder / "half").write_text("written")
        ready.set()
        signal.pause()


def test_a_folder_ends_with_its_work(temporary: Path) -> None:
    with work_folder() as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").touch()
    assert list(temporary.iterdir()) == []


def test_a_folder_ends_with_an_error(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), work_folder():
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []


def test_a_killed_run_is_swept_by_the_next_and_a_living_one_is_not(temporary: Path) -> None:
    start = multiprocessing.get_context("fork")
    ready = start.Event()
    other = start.Process(target=hold, args=(ready,))
    other.start()
    assert ready.wait(30)
    with work_folder() as mine:
        assert len(list(temporary.iterdir())) == 2  # the other run lives: its folder stays
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert [folder.name.startswith(PREFIX) for folder in temporary.iterdir()] == [True]
    with work_folder() as mine:
        assert list(temporary.iterdir()) == [mine]


def test_what_is_not_a_folder_of_ours_is_left_alone(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    (temporary / f"{PREFIX}file").touch()
    (temporary / f"{PREFIX}link").symlink_to(temporary / "elsewhere")
    sweep()
    assert len(list(temporary.iterdir())) == 3
