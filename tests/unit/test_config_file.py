"""kpdeploy.toml: whose options count, and what a wrong one says. No model is loaded here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kpdeploy.cli import cli
from kpdeploy.cli.config import read_config
from kpdeploy.errors import ConfigFileBroken


class Reached(Exception):
    """The export began: the options are read."""


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What `export` is called with, once it is; the current folder is empty."""
    import kpdeploy.pipeline

    found: dict[str, Any] = {}

    def export(model: str, **given: Any) -> None:
        found.update(given, model=model)
        raise Reached

    monkeypatch.setattr(kpdeploy.pipeline, "export", export)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


def run(*words: str) -> None:
    with pytest.raises(Reached):
        CliRunner().invoke(cli, list(words), standalone_mode=False, catch_exceptions=False)


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "kpdeploy.toml").write_text(text)
    return folder


def read(folder: Path) -> dict[str, Any]:
    assert isinstance(cli, click.Group)
    return read_config(folder, cli, click.Context(cli, info_name="kpdeploy"))


def test_options_come_from_the_current_folder(options: dict[str, Any]) -> None:
    write(Path(), '[export]\nrepo = "r"\nmax-batch = 4\ninput = ["x:float32[2,4]", "y:float32[2]"]\n')
    run("export", "minilm")
    assert (options["repo"], options["max_batch"]) == ("r", 4)
    assert options["input"] == ("x:float32[2,4]", "y:float32[2]")


def test_options_come_from_beside_the_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = write(tmp_path / "model", '[export]\nformat = "onnx"\n') / "m.onnx"
    model.touch()
    run("export", str(model))
    assert options["format"] == "onnx"


def test_options_come_from_inside_a_model_folder(options: dict[str, Any], tmp_path: Path) -> None:
    run("export", str(write(tmp_path / "model", '[export]\ntask = "fill-mask"\n')))
    assert options["task"] == "fill-mask"


def test_the_file_beside_the_model_stands_above_that_of_the_current_folder(
    options: dict[str, Any], tmp_path: Path
) -> None:
    write(Path(), '[export]\nformat = "onnx"\nrepo = "here"\n')
    run("export", str(write(tmp_path / "model", '[export]\nformat = "pt2"\n')))
    assert (options["format"], options["repo"]) == ("pt2", "here")


def test_the_command_line_wins_wherever_it_stands(options: dict[str, Any], tmp_path: Path) -> None:
    model = str(write(tmp_path / "model", '[export]\nformat = "pt2"\ntolerance = ["float32=1e-3"]\n'))
    run("export", "--format", "openvino", model)
    assert options["format"] == "openvino"
    assert options["tolerance"] == {"float32": 1e-3}
    run("export", model, "--tolerance", "float16=0.1")
    assert options["tolerance"] == {"float16": 0.1}


def test_the_same_options_hold_for_other_commands(tmp_path: Path) -> None:
    assert read(write(tmp_path, "[serve]\nhttp-port = 9000\npoll = true\n")) == {
        "serve": {"http_port": 9000, "poll": True}
    }


def test_one_text_stands_for_a_list_of_one(tmp_path: Path) -> None:
    assert read(write(tmp_path, '[export]\ninput = "x:float32[2]"\n')) == {"export": {"inputs": ["x:float32[2]"]}}


def test_no_file_sets_nothing(tmp_path: Path) -> None:
    assert read(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[export\n", ["kpdeploy.toml cannot be read", "line 1"]),
        ('[exprot]\ntarget = "triton"\n', ["[exprot]", "did you mean 'export'?"]),
        ('[export]\ntraget = "triton"\n', ["traget under [export]", "did you mean 'target'?"]),
        ("[export]\nzzz = 1\n", ["zzz under [export]", "use one of target, repo, format"]),
        ('target = "triton"\n', ["sets target outside", "[export]"]),
        ("[serve]\nhttp-port = 'web'\n", ["http-port under [serve]", "'web' is not a valid integer", "serve --help"]),
        ("[export]\nmax-batch = 0\n", ["max-batch under [export]: 0", "x>=1"]),
        ("[export]\nrepo = ['a', 'b']\n", ["repo under [export]", "it is a list, the option takes a text"]),
        ("[export]\ninput = [['x']]\n", ["input under [export]", "it is a list"]),
        ("[export]\nname = true\n", ["name under [export]: True", "it is a bool, the option takes a text"]),
        ("[serve]\npoll = 'sure'\n", ["poll under [serve]", "it is a str, the option takes a boolean"]),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong_in_it(text: str, says: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigFileBroken) as told:
        read(write(tmp_path, text))
    for words in (str(tmp_path / "kpdeploy.toml"), *says):
        assert words in str(told.value)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "kpdeploy.toml").write_bytes(b"\xff\xfe[export]")
    with pytest.raises(ConfigFileBroken, match="cannot be read"):
        read(tmp_path)
