"""The command line's manners: help that teaches, one message an error, and exit codes that mean something."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from kpdeploy import __version__, errors
from kpdeploy.cli import COMMANDS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let the command exit-codes raise."""

    def fail_with(error: BaseException) -> None:
        @click.command()
        @click.option("--json", "as_json", is_flag=True)
        def command(as_json: bool) -> None:
            raise error

        monkeypatch.setattr("kpdeploy.cli.exit_codes.command", command)

    return fail_with


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_teaches_with_an_example(run: Run, name: str) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: kpdeploy ")
    assert "--json" in out
    assert name == "exit-codes" or f"  kpdeploy {name} " in out


def test_help_lists_every_command_with_its_purpose(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name, purpose in COMMANDS.items():
        assert name in out
        assert purpose.split()[0] in out


def test_the_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"kpdeploy {__version__}\n", "")


@pytest.mark.parametrize(("typed", "meant"), [("exprot", "export"), ("server", "serve"), ("exit-code", "exit-codes")])
def test_a_mistyped_command_names_the_near_one(run: Run, typed: str, meant: str) -> None:
    code, out, err = run(typed)
    assert (code, out) == (2, "")
    assert f"no such command '{typed}': did you mean '{meant}'?" in err


def test_an_unknown_command_points_to_the_help(run: Run) -> None:
    code, _, err = run("frobnicate")
    assert code == 2
    assert "see `kpdeploy --help`" in err


def test_an_unknown_option_is_a_usage_error_in_json_too(run: Run) -> None:
    code, out, err = run("exit-codes", "--jsn")
    assert (code, out) == (2, "")
    assert "--json" in err
    code, out, _ = run("exit-codes", "--json", "--nonsense")
    assert code == 2
    assert json.loads(out)["error"]["exit_code"] == 2


def test_an_error_is_one_message_with_its_reason_and_next_step(
    run: Run, failing: Callable[[BaseException], None]
) -> None:
    failing(errors.PortInUse("port 8000 is taken", why="another [bold]server[/]", next_step="use --http-port 0"))
    code, out, err = run("exit-codes")
    assert (code, out) == (errors.PortInUse.exit_code, "")
    assert err == "error: port 8000 is taken\n  why: another [bold]server[/]\n next: use --http-port 0\n"


def test_an_error_is_json_on_stdout_when_json_was_asked_for(run: Run, failing: Callable[[BaseException], None]) -> None:
    failing(errors.PortInUse("port 8000 is taken", why="so", next_step="use another"))
    code, out, err = run("exit-codes", "--json")
    assert (code, err) == (50, "")
    assert json.loads(out) == {
        "error": {
            "kind": "PortInUse", "exit_code": 50, "what": "port 8000 is taken", "why": "so", "next": "use another"
        }
    }  # fmt: skip


def test_a_defect_is_told_without_a_traceback_which_goes_to_a_file(
    run: Run, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    failing(RuntimeError("the sky fell\nin two lines"))
    code, out, err = run("exit-codes")
    assert (code, out) == (1, "")
    assert "RuntimeError: the sky fell" in err
    assert "Traceback" not in err
    (log,) = tmp_path.glob("kpdeploy-*.log")
    assert str(log) in err.replace("\n", "")
    assert "Traceback" in log.read_text()


def test_the_code_with_which_a_command_ends_is_the_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @click.pass_context
    def command(ctx: click.Context) -> None:
        ctx.exit(errors.AnswersDiffer.exit_code)

    monkeypatch.setattr("kpdeploy.cli.exit_codes.command", command)
    assert run("exit-codes") == (errors.AnswersDiffer.exit_code, "", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_exits_as_shells_expect(
    run: Run, failing: Callable[[BaseException], None], error: BaseException
) -> None:
    failing(error)
    code, _, err = run("exit-codes")
    assert code == 130
    assert "Traceback" not in err


def test_every_error_has_an_exit_code_of_its_own_and_a_meaning() -> None:
    codes = errors.exit_codes()
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.KpdeployError)
    ]
    assert {name for _, name, _ in codes} == {kind.__name__ for kind in kinds} - {"KpdeployError"}
    numbers = [code for code, _, _ in codes]
    assert len(set(numbers)) == len(numbers)
    # 0 to 2 are success, defect and usage; from 126 on codes belong to the shell.
    assert all(2 < number < 126 for number in numbers)
    assert all(meaning.endswith(".") for _, _, meaning in codes)


def test_exit_codes_are_listed_whole(run: Run) -> None:
    code, out, _ = run("exit-codes", "--json")
    assert code == 0
    listed = {row["code"]: row["name"] for row in json.loads(out)}
    assert {number: name for number, name, _ in errors.exit_codes()}.items() <= listed.items()
    assert {0, 1, 2, 130} <= set(listed)
    code, table, _ = run("exit-codes")
    assert code == 0
    assert all(name in table for name in listed.values())
