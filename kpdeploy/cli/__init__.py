"""The command line: one file per command, imported when it is called, so that `--help` is instant."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

from kpdeploy import __version__
from kpdeploy.errors import KpdeployError

# Name and the line that `kpdeploy --help` shows, in the order in which a user meets them.
COMMANDS = {
    "export": "Export a model, prove the artifact equal to it, and package it for a server.",
    "serve": "Serve a model repository on this machine with a real Triton or TorchServe.",
    "verify": "Replay the golden requests against a running server.",
    "bench": "Measure latency and throughput of a running server under load.",
    "check": "Is this version slower or wrong, beside an earlier one? A gate for CI.",
    "history": "Show how a model's figures changed, and when.",
    "rollout": "Try a version beside the one in service; promote it, or roll back.",
    "rollback": "Serve an earlier version again, at once.",
    "migrate": "Move a TorchServe archive (.mar) to Triton, and say what it leaves behind.",
    "monitor": "Watch a served model: probe, Prometheus rules, dashboard, or all of it on this machine.",
    "ops": "List the fused ops and who runs them; explain a choice, validate the kernels.",
    "doctor": "Show what is on this machine, what is missing, and how to get it.",
    "exit-codes": "List what each exit code means.",
}

EPILOG = """\b
First steps:
  kpdeploy export minilm --target triton --repo models/
  kpdeploy serve models/
  kpdeploy verify models/ --url localhost:8001
"""


class NearCommands(click.Group):
    """A group that answers a mistyped command with the near one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            from kpdeploy.errors import did_you_mean

            hint = did_you_mean(args[0], known, otherwise=f"see `{ctx.command_path} --help`")
            raise click.UsageError(f"no such command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)


class LazyCommands(NearCommands):
    """A group that knows its commands by name, and imports one only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"kpdeploy.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyCommands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="kpdeploy %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """A PyTorch model, fast, correct and watched in production.

    kpdeploy exports a model, proves the artifact equal to the original in the runtime that will serve it, packages
    it as a model repository, and serves it.
    """
    if Path("kpdeploy.toml").is_file():
        from kpdeploy.cli.config import read_config

        assert isinstance(ctx.command, click.Group)
        ctx.default_map = read_config(Path(), ctx.command, ctx)


def main() -> None:
    """Run the command line; every error is one message and its exit code, never a traceback."""
    try:
        # What a command gives ctx.exit() comes back as a value.
        code = cli.main(standalone_mode=False)
        if code:
            sys.exit(code)
    except (click.Abort, KeyboardInterrupt):
        from kpdeploy.cli.console import INTERRUPTED, show_interrupted

        show_interrupted()
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        from kpdeploy.cli.console import show_usage_error

        show_usage_error(error)
        sys.exit(error.exit_code)
    except KpdeployError as error:
        from kpdeploy.cli.console import show_error

        show_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        from kpdeploy.cli.console import show_defect

        show_defect(error)
        sys.exit(1)
