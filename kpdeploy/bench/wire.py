"""How a request reaches the server: bytes made once, beforehand, so that sending costs the generator little.

Both wires have `send(index)`, which sends the request of that index and returns "" or the reason why it failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol
from urllib.parse import quote

from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from kpdeploy.inputs import Array

Requests = Sequence[Mapping[str, Array]]


class Wire(Protocol):
    async def send(self, index: int) -> str: ...

    async def close(self) -> None: ...


class GrpcWire:
    """Unary gRPC over one channel (HTTP/2 multiplexes the requests). Answers are received whole and not parsed.

    `token` is not used: no server asks for one here."""

    def __init__(self, url: str, model: str, requests: Requests, timeout_seconds: float, *, token: str = "") -> None:
        import grpc

        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._rpc_error = grpc.aio.AioRpcError
        self._channel = grpc.aio.insecure_channel(url, options=unlimited)
        # Without serializers the channel takes and gives bytes.
        self._infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        self._bodies = [grpc_body(model, tensors) for tensors in requests]
        self._timeout = timeout_seconds

    async def send(self, index: int) -> str:
        try:
            await self._infer(self._bodies[index % len(self._bodies)], timeout=self._timeout)
        except self._rpc_error as error:
            if error.code().name == "DEADLINE_EXCEEDED":
                return _no_answer(self._timeout)
            return _reason(error.code().name, error.details() or "")
        return ""

    async def close(self) -> None:
        await self._channel.close()


def grpc_body(model: str, tensors: Mapping[str, Array]) -> bytes:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model)
    for name, array in tensors.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        # Files and texts travel with their lengths.
        raw = serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes()
        request.raw_input_contents.append(raw)
    body: bytes = request.SerializeToString()
    return body


class HttpWire:
    """The v2 protocol over HTTP with binary tensors, a kept-alive connection for each request in flight."""

    def __init__(self, url: str, model: str, requests: Requests, timeout_seconds: float, *, token: str = "") -> None:
        import aiohttp

        self._failures = (aiohttp.ClientError, OSError)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_seconds),
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
        self._address = f"http://{url}/v2/models/{quote(model)}/infer"
        self._bodies = [http_body(tensors) for tensors in requests]
        self._timeout = timeout_seconds

    async def send(self, index: int) -> str:
        body, headers = self._bodies[index % len(self._bodies)]
        try:
            async with self._session.post(self._address, data=body, headers=headers) as answer:
                content = await answer.read()
        except TimeoutError:
            return _no_answer(self._timeout)
        except self._failures as error:
            return _reason(type(error).__name__, str(error))
        return "" if answer.status == 200 else _reason(f"HTTP {answer.status}", _http_error(content))

    async def close(self) -> None:
        await self._session.close()


def http_body(tensors: Mapping[str, Array]) -> tuple[bytes, dict[str, str]]:
    from tritonclient.http import InferenceServerClient, InferInput

    inputs = []
    for name, array in tensors.items():
        entry = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        entry.set_data_from_numpy(array, binary_data=True)
        inputs.append(entry)
    body, json_bytes = InferenceServerClient.generate_request_body(inputs)
    return body, {"Inference-Header-Content-Length": str(json_bytes)} if json_bytes is not None else {}


def _http_error(content: bytes) -> str:
    import json

    try:
        said = json.loads(content)
        return str(said.get("error") or said["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return content[:200].decode(errors="replace")


def _no_answer(timeout_seconds: float) -> str:
    return f"no answer in {timeout_seconds:g} s"


def _reason(code: str, message: str) -> str:
    """One text for all failures of one cause: the first line, without the request's id."""
    first = next(iter(message.strip().splitlines()), "").removeprefix("[request id: <id_unknown>] ")
    return f"{code}: {first[:200]}" if first else code


class MakeWire(Protocol):
    """A wire to the model at an address; `token` is what a TorchServe asks for."""

    def __call__(
        self, url: str, model: str, requests: Requests, timeout_seconds: float, *, token: str = ""
    ) -> Wire: ...


WIRES: dict[str, MakeWire] = {"grpc": GrpcWire, "http": HttpWire}
