"""What the server says of itself and of the model, over either protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from tritonclient.utils import InferenceServerException

from kpdeploy.artifact import Manifest
from kpdeploy.errors import ModelNotServed, Unreachable, did_you_mean

ANSWER_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model on a server: the v2 metadata as a dict, and how many requests its first dimension may hold (0: none)."""

    server: str
    version: str
    metadata: Mapping[str, Any]
    max_batch_size: int


def torchserve(manifest: Manifest) -> Served:
    """A model on TorchServe, which tells nothing of its tensors: what the repository says of it."""
    return Served(
        server="TorchServe", version=str(manifest.version), metadata={}, max_batch_size=manifest.max_batch_size
    )


async def ask(url: str, *, protocol: str, model: str) -> Served:
    """What `url` says of `model`.

    Raises:
        Unreachable: nothing there speaks this protocol.
        ModelNotServed: the server does not serve the model.
    """
    client = _client(url, protocol)
    json = {"as_json": True} if protocol == "grpc" else {}
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            server = await client.get_server_metadata(**json)
            if not await client.is_model_ready(model):
                raise await _not_served(client, url, model, json)
            metadata = await client.get_model_metadata(model, **json)
            config = await client.get_model_config(model, **json)
    except (InferenceServerException, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise Unreachable(
            f"no {protocol} server answers at {url}",
            why=_first_line(error),
            next_step="start one with `kpdeploy serve REPO`; Triton's gRPC port is 8001 and its HTTP port 8000, "
            "and --protocol says which of the two this is",
        ) from None
    finally:
        await client.close()
    config = config.get("config", config)
    return Served(
        server=f"{server['name']} {server['version']}",
        version=max(metadata.get("versions", [""]), key=lambda v: int(v) if v.isdigit() else 0),
        metadata=metadata,
        max_batch_size=int(config.get("max_batch_size", 0)),
    )


def _client(url: str, protocol: str) -> Any:
    if protocol == "grpc":
        from tritonclient.grpc.aio import InferenceServerClient as GrpcClient

        return GrpcClient(url)
    from tritonclient.http.aio import InferenceServerClient as HttpClient

    return HttpClient(url)


async def _not_served(client: Any, url: str, model: str, json: Mapping[str, bool]) -> ModelNotServed:
    index = await client.get_model_repository_index(**json)
    entries = index.get("models", []) if isinstance(index, dict) else index
    states = {entry["name"]: entry for entry in entries}
    ready = sorted(name for name, entry in states.items() if entry.get("state") == "READY")
    reason = states.get(model, {}).get("reason", "")
    if model in states:
        why = f"the server knows it, and it is not ready{f': {reason}' if reason else ''}"
    else:
        why = f"the server's models: {', '.join(ready) or 'none'}"
    return ModelNotServed(
        f"{url} does not serve the model {model!r}",
        why=why,
        next_step=did_you_mean(model, ready, otherwise="name one of the server's models, or serve this one"),
    )


def _first_line(error: Exception) -> str:
    text = error.message() if isinstance(error, InferenceServerException) else str(error)
    return next(iter((text or type(error).__name__).strip().splitlines()), "")
