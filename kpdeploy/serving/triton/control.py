"""Triton's model control API. Plain urllib, a connection a call: an idle one, kept alive, delays the server's end."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from kpdeploy.errors import KpdeployError, ModelLoadFailed

# A proxy has no business between this process and its own server.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def index(address: str) -> list[dict[str, str]] | None:
    """All models as {name, version, state, reason}; None while nothing answers."""
    try:
        found: list[dict[str, str]] = _post(address, "index", timeout_s=5)
        return found
    except (OSError, ValueError):
        return None


def load(address: str, model: str, *, timeout_s: float) -> None:
    """Load a model, or load it again; returns when that is done.

    Raises:
        ModelLoadFailed: the server refused, or did not finish in time.
    """
    try:
        _post(address, f"models/{model}/load", timeout_s=timeout_s)
    except urllib.error.HTTPError as error:
        raise load_failed(model, _message(error.read())) from None
    except OSError as error:
        raise load_failed(model, str(error)) from None


def unload(address: str, model: str) -> None:
    _post(address, f"models/{model}/unload", timeout_s=30)


def load_failed(model: str, reason: str) -> KpdeployError:
    """The server's own words, without the stack of its model.py."""
    why = reason.partition("\n\nAt:")[0].partition("At:\n")[0].strip()
    return ModelLoadFailed(
        f"the server could not load {model}",
        why=why.removeprefix("Internal: "),
        next_step="check that the runtime here is the one that proved the model (kpdeploy doctor), or export it again",
    )


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _post(address: str, path: str, *, timeout_s: float) -> Any:
    request = urllib.request.Request(f"http://{address}/v2/repository/{path}", data=b"{}", method="POST")
    with _OPENER.open(request, timeout=timeout_s) as reply:
        return json.loads(reply.read() or b"null")
