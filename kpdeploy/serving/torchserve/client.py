"""A client of TorchServe, as kpdeploy.serving.client.Client is one of servers that speak the v2 protocol whole.

Requests are the v2 protocol's, with binary tensors, which the handler of our archives reads. TorchServe itself does not
know the protocol's questions about models and versions: a version is asked for by its path.
"""

from __future__ import annotations

import http.client
import json
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import numpy as np

from kpdeploy.artifact import Manifest
from kpdeploy.errors import KpdeployError, ModelNotServed, Unreachable
from kpdeploy.inputs import Array, Tensors

JSON_LENGTH = "Inference-Header-Content-Length"


class TorchServeClient:
    """Requests to one server, in the names of a model's signature. Close it, or use `with`."""

    protocol = "http"

    def __init__(self, address: str, *, token: str, timeout_s: float) -> None:
        self.address = address
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._connection = http.client.HTTPConnection(address, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def live(self) -> bool:
        """Whether the server answers that it is healthy. Raises Unreachable where nothing answers."""
        return self._ask("GET", "/ping", b"", {})[0] == 200

    def model_ready(self, model: str, version: int | None = None) -> bool:
        """True: whether a version is loaded is found by asking it, which `infer` does."""
        return True

    def versions(self, model: str) -> list[str]:
        """Not told at this port."""
        return []

    def infer(self, manifest: Manifest, inputs: Tensors) -> dict[str, Array]:
        """One request to the manifest's model and version: arrays in and out by the names of the signature.

        Raises:
            Unreachable: no answer, or none in time.
            ModelNotServed: the server refuses; `why` has its words.
        """
        body, headers = request(manifest, inputs)
        path = f"/predictions/{quote(manifest.model)}/{manifest.version}"
        status, answered, content = self._ask("POST", path, body, headers)
        if status != 200:
            raise self._refused(manifest, status, content)
        found = answer(content, answered.get(JSON_LENGTH))
        return {spec.name: found[spec.name] for spec in manifest.signature.outputs}

    def predict(self, model: str, body: bytes, content_type: str) -> tuple[int, bytes]:
        """A request as it is to an archive of anybody: the status and the answer.

        Raises:
            Unreachable: no answer, or none in time.
        """
        status, _, content = self._ask("POST", f"/predictions/{quote(model)}", body, {"Content-Type": content_type})
        return status, content

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        try:
            self._connection.request(method, path, body=body or None, headers={**self._headers, **headers})
            reply = self._connection.getresponse()
            return reply.status, reply.headers, reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unreachable(
                f"no TorchServe answers at {self.address}",
                why=f"{type(error).__name__}: {error}",
                next_step="start one with `kpdeploy serve REPO`, or give the address of its inference port with --url",
            ) from None

    def _refused(self, manifest: Manifest, status: int, content: bytes) -> KpdeployError:
        reason = why(content)
        step = "look at the server's log, and check that it serves this repository"
        if "authorization" in reason.lower():
            step = "give the server's key file: --token-file key_file.json (kpdeploy serve says where it is)"
        return ModelNotServed(
            f"the TorchServe at {self.address} does not serve {manifest.model} version {manifest.version}",
            why=f"HTTP {status}: {reason}",
            next_step=step,
        )


def request(manifest: Manifest, inputs: Tensors) -> tuple[bytes, dict[str, str]]:
    """A v2 request with binary tensors: its body and headers."""
    from tritonclient.utils import np_to_triton_dtype

    entries, tail = [], []
    for spec, name in zip(manifest.signature.inputs, manifest.input_names, strict=True):
        array = np.ascontiguousarray(inputs[spec.name])
        tail.append(array.tobytes())
        datatype = np_to_triton_dtype(array.dtype)
        sizes = {"binary_data_size": len(tail[-1])}
        entries.append({"name": name, "shape": list(array.shape), "datatype": datatype, "parameters": sizes})
    text = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
    headers = {JSON_LENGTH: str(len(text)), "Content-Type": "application/octet-stream"}
    return b"".join((text, *tail)), headers


def answer(content: bytes, json_length: str | None) -> dict[str, Array]:
    """The tensors of a v2 answer by name."""
    from tritonclient.utils import triton_to_np_dtype

    length = int(json_length or len(content))
    found, offset = {}, length
    for entry in json.loads(content[:length])["outputs"]:
        dtype = triton_to_np_dtype(entry["datatype"])
        if (size := entry.get("parameters", {}).get("binary_data_size")) is None:
            array = np.asarray(entry["data"], dtype)
        else:
            array = np.frombuffer(content[offset : offset + size], dtype)
            offset += size
        found[entry["name"]] = array.reshape(entry["shape"])
    return found


def why(content: bytes) -> str:
    """The reason in a refusal, the frontend's or the handler's."""
    try:
        said = json.loads(content)
        return str(said.get("error") or said.get("message"))
    except (ValueError, AttributeError):
        return content[:200].decode(errors="replace")
