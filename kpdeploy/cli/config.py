"""kpdeploy.toml: every option of every command, under the command's name. The command line wins.

[export]
target = "triton"
input = ["input_ids:int64[batch=1..32,seq=1..512]"]

[serve]
http-port = 9000
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import click
from click.types import BoolParamType

from kpdeploy.errors import ConfigFileBroken, did_you_mean

FILENAME = "kpdeploy.toml"


def read_config(folder: Path, root: click.Group, ctx: click.Context) -> dict[str, dict[str, Any]]:
    """The defaults that folder/kpdeploy.toml sets, by command and parameter name; empty where there is none.

    Raises:
        ConfigFileBroken: it is not TOML, or names a command or an option that does not exist.
    """
    path = folder / FILENAME
    if not path.is_file():
        return {}
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigFileBroken(f"{path} cannot be read", why=str(error), next_step="correct the line") from None
    return {name: _options(path, name, table, root, ctx) for name, table in tables.items()}


def _options(path: Path, name: str, table: Any, group: click.Group, ctx: click.Context) -> dict[str, Any]:
    """The options of one command; `name` is dotted where it is a command of a group, such as ops.explain."""
    command = group.get_command(ctx, name.rpartition(".")[2])
    if not isinstance(table, dict):
        raise ConfigFileBroken(
            f"{path} sets {name} outside of a command's table", next_step="put it under a line such as [export]"
        )
    if command is None:
        raise _unknown(path, f"[{name}]", name, group.list_commands(ctx))
    known = {
        text.lstrip("-"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for text in parameter.opts
    }
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(command, click.Group) and isinstance(value, dict):
            found[key] = _options(path, f"{name}.{key}", value, command, ctx)
            continue
        parameter = known.get(key.replace("_", "-")) or known.get(key)
        if parameter is None:
            raise _unknown(path, f"{key} under [{name}]", key, list(known))
        found[str(parameter.name)] = _checked(path, f"{key} under [{name}]", parameter, value, ctx)
    return found


def _checked(path: Path, where: str, parameter: click.Option, value: Any, ctx: click.Context) -> Any:
    """The value as click takes it. It is checked here, so that the message names the file."""
    if parameter.multiple and not isinstance(value, list):
        value = [value]
    reason = ""
    for entry in value if parameter.multiple else [value]:
        # click makes a string of anything.
        if isinstance(entry, (list, dict)) or (isinstance(entry, bool) != isinstance(parameter.type, BoolParamType)):
            reason = f"it is a {type(entry).__name__}, the option takes a {parameter.type.name}"
    try:
        reason or parameter.process_value(ctx, value)
    except click.BadParameter as error:
        reason = error.message
    if reason:
        raise ConfigFileBroken(
            f"{path} holds a wrong value for {where}: {value!r}",
            why=reason,
            next_step=f"see `{ctx.command_path} {where.partition('[')[2].rstrip(']').replace('.', ' ')} --help`",
        )
    return value


def _unknown(path: Path, what: str, word: str, known: list[str]) -> ConfigFileBroken:
    return ConfigFileBroken(
        f"{path} holds {what}, which does not exist",
        why=did_you_mean(word, known),
        next_step=f"use one of {', '.join(known)}",
    )


def configured_by_model(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """Read the kpdeploy.toml beside MODEL, if MODEL is a path: it stands above that of the current folder."""
    path = Path(value)
    # os.path and not Path: it takes any text, however long.
    folder = path if os.path.isdir(value) else path.parent if os.path.exists(value) else None
    root = ctx.find_root()
    if folder is not None and isinstance(root.command, click.Group) and ctx.info_name is not None:
        found = read_config(folder, root.command, root).get(ctx.info_name, {})
        ctx.default_map = {**(ctx.default_map or {}), **found}
    return value
