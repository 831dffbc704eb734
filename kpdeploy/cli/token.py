"""The token that a TorchServe asks for: always a file, for what stands in a command line is seen by all."""

from __future__ import annotations

from pathlib import Path

import click

token_file_option = click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="KPDEPLOY_TOKEN_FILE",
    metavar="FILE",
    help="TorchServe's key_file.json, or a file with a token (also: KPDEPLOY_TOKEN_FILE).",
)


def inference_token(path: Path | None) -> str:
    """The token for requests in a file; empty where there is none."""
    from kpdeploy.serving.torchserve.management import read_tokens

    return read_tokens(path).get("inference", "") if path is not None else ""
