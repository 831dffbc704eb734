"""TorchServe's management API: versions of a model, which of them is the default, and whether their workers run."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from kpdeploy.errors import KpdeployError, ModelLoadFailed, UnknownName

# A proxy has no business between this process and its own server.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_tokens(path: Path) -> dict[str, str]:
    """The tokens in a key file of TorchServe, by what they are for: inference, management, API.

    A file that is not JSON is one token, for requests.

    Raises:
        UnknownName: it cannot be read.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UnknownName(
            f"the token file {path} cannot be read",
            why=str(error),
            next_step="give the key_file.json that `kpdeploy serve` names, or a file that holds a token",
        ) from None
    try:
        found = json.loads(text)
        return {name: entry if isinstance(entry, str) else str(entry["key"]) for name, entry in found.items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {"inference": text.strip()}


@dataclass(frozen=True, kw_only=True)
class Management:
    """The management API of one server. `token` never shows in a representation or an error."""

    address: str
    key_file: Path | None = None

    def models(self) -> list[str]:
        """The names of the registered models."""
        return [entry["modelName"] for entry in self._ask("GET", "models?limit=1000")["models"]]

    def versions(self, model: str) -> list[dict[str, Any]]:
        """The registered versions of a model as the server describes them; none where it knows no such model."""
        try:
            found: list[dict[str, Any]] = self._ask("GET", f"models/{quote(model)}/all")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return []
            raise
        return found

    def default_version(self, model: str) -> str:
        """The version that requests get which name none."""
        found: list[dict[str, Any]] = self._ask("GET", f"models/{quote(model)}")
        return str(found[0]["modelVersion"])

    def ready(self, model: str, version: int) -> bool:
        """Whether every worker of a version is there and ready."""
        for entry in self.versions(model):
            if entry["modelVersion"] == str(version):
                states = [worker["status"] for worker in entry["workers"]]
                return len(states) >= entry["minWorkers"] > 0 and all(state == "READY" for state in states)
        return False

    def worker_pids(self, model: str) -> list[int]:
        """The processes that run a model, all its versions."""
        return [worker["pid"] for entry in self.versions(model) for worker in entry["workers"] if worker["pid"] > 0]

    def register(self, archive: str, *, timeout_s: float) -> None:
        """Load an archive of the server's model store beside what is loaded; returns when its workers run.

        Raises:
            ModelLoadFailed: it does not load.
        """
        asked = urlencode({"url": archive, "synchronous": "true", "initial_workers": 1})
        try:
            self._ask("POST", f"models?{asked}", timeout_s=timeout_s)
        except OSError as error:
            raise load_failed(archive, _said(error)) from None

    def unregister(self, model: str, version: int) -> None:
        self._ask("DELETE", f"models/{quote(model)}/{version}", timeout_s=60)

    def set_default(self, model: str, version: int) -> None:
        """Give a loaded version to all requests that name none: publishing, or a rollback.

        Raises:
            UnknownName: the server has not loaded it.
        """
        try:
            self._ask("PUT", f"models/{quote(model)}/{version}/set-default")
        except urllib.error.HTTPError as error:
            loaded = ", ".join(str(entry["modelVersion"]) for entry in self.versions(model))
            raise UnknownName(
                f"the server cannot make version {version} of {model} the default",
                why=_said(error),
                next_step=f"name one that it has loaded: {loaded or 'none'}",
            ) from None

    def _ask(self, method: str, path: str, *, timeout_s: float = 30) -> Any:
        request = urllib.request.Request(f"http://{self.address}/{path}", method=method)
        if self.key_file is not None:
            token = read_tokens(self.key_file).get("management", "")
            request.add_header("Authorization", f"Bearer {token}")
        with _OPENER.open(request, timeout=timeout_s) as reply:
            return json.loads(reply.read() or b"null")


def load_failed(what: str, reason: str) -> KpdeployError:
    return ModelLoadFailed(
        f"TorchServe could not load {what}",
        why=reason,
        next_step="check that the runtime here is the one that proved the model (kpdeploy doctor), or export it again",
    )


def _said(error: OSError) -> str:
    if isinstance(error, urllib.error.HTTPError):
        try:
            return str(json.loads(error.read())["message"])
        except (ValueError, KeyError, TypeError):
            return f"HTTP {error.code}"
    return str(error)
