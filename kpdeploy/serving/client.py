"""A client of any server that speaks the V2 inference protocol (gRPC or HTTP), and the check of its answers."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import numpy as np

from kpdeploy.artifact import DIGEST, Comparison, Manifest
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import compare, worst_of
from kpdeploy.deployment import Deployment
from kpdeploy.errors import AnswersDiffer, ModelNotServed, UnknownName, Unreachable
from kpdeploy.inputs import Array, Tensors
from kpdeploy.serving.repository import find_deployment, local_files, read_repository
from kpdeploy.serving.torchserve.client import TorchServeClient
from kpdeploy.signature import TensorSpec

__all__ = [
    "Client",
    "ModelReport",
    "TorchServeClient",
    "VerifyReport",
    "ask_golden",
    "check",
    "connect",
    "connect_torchserve",
    "find_deployment",
    "local_files",
    "read_repository",
    "replay",
    "verify",
]
PROTOCOLS = ("auto", "grpc", "http")
_SCHEMES = {"http": ("http", False), "https": ("http", True), "grpc": ("grpc", False), "grpcs": ("grpc", True)}
# Messages of any size, and a server that was away is found again in two seconds, not in gRPC's two minutes.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
_PORTS = {"grpc": 8001, "http": 8000, "auto": 8001}


def connect(url: str, *, protocol: str = "auto", timeout_s: float = 30.0) -> Client:
    """A client of the server at `url`: host:port, or with http://, https://, grpc:// or grpcs:// before it.

    With protocol "auto" and no scheme the port is asked which of the two it speaks. `timeout_s` holds for every
    request.

    Raises:
        Unreachable: nothing listens there.
        UnknownName: no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise UnknownName(f"unknown protocol {protocol!r}", next_step=f"use one of {', '.join(PROTOCOLS)}")
    scheme, _, rest = url.rpartition("://")
    if scheme and scheme not in _SCHEMES:
        raise UnknownName(f"unknown scheme {scheme!r} in {url}", next_step=f"use one of {', '.join(_SCHEMES)}")
    spoken, tls = _SCHEMES.get(scheme, (protocol, False))
    try:
        address = urlsplit(f"//{rest}")
        host, port = address.hostname or "localhost", address.port or _PORTS[spoken]
    except ValueError as error:
        raise Unreachable(f"{url!r} is not an address", why=str(error), next_step="write host:port") from None
    if spoken == "auto":
        spoken = _protocol_of(host, port, timeout_s)
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Client(place, protocol=spoken, tls=tls, timeout_s=timeout_s)


def connect_torchserve(url: str, *, token: str = "", timeout_s: float = 30.0) -> TorchServeClient:
    """A client of the TorchServe whose inference port is at `url`: host:port, or with http:// before it.

    Raises:
        UnknownName: another scheme. Unreachable: no address.
    """
    scheme, _, rest = url.rpartition("://")
    if scheme not in ("", "http"):
        raise UnknownName(f"{url}: TorchServe is asked by plain HTTP", next_step="give host:port of its inference port")
    return TorchServeClient(rest.rstrip("/"), token=token, timeout_s=timeout_s)


def connect_to(
    target: str, url: str, *, protocol: str = "auto", token: str = "", timeout_s: float = 30.0
) -> Client | TorchServeClient:
    """A client for the server of a target: `protocol` is for Triton, `token` for TorchServe.

    Raises:
        UnknownName, Unreachable: as `connect` and `connect_torchserve`.
    """
    if target == "torchserve":
        return connect_torchserve(url, token=token, timeout_s=timeout_s)
    return connect(url, protocol=protocol, timeout_s=timeout_s)


def is_torchserve(url: str, *, timeout_s: float = 5.0) -> bool:
    """Whether a TorchServe's inference port answers at `url`, by what only it says to a ping."""
    asked = http.client.HTTPConnection(url.rpartition("://")[2].rstrip("/"), timeout=min(timeout_s, 5.0))
    try:
        asked.request("GET", "/ping")
        said = json.loads(asked.getresponse().read() or b"null")
    except (OSError, ValueError, http.client.HTTPException):
        return False
    finally:
        asked.close()
    return isinstance(said, dict) and (said.get("type") == "InvalidKeyException" or "status" in said)


def committed_version(repo: str, model: str) -> Manifest:
    """The manifest of the version that a repository serves.

    Raises:
        RepositoryBroken, UnknownName: the repository cannot be read, or holds no such model.
    """
    return find_deployment(repo, model).manifest


def _protocol_of(host: str, port: int, timeout_s: float) -> str:
    """Ask in HTTP/1.1: a gRPC server answers with frames of HTTP/2, or hangs up."""
    asked = http.client.HTTPConnection(host, port, timeout=min(timeout_s, 5.0))
    try:
        asked.request("GET", "/v2/health/live")
        asked.getresponse()
    except http.client.HTTPException:
        return "grpc"
    except OSError as error:
        raise _unreachable(f"{host}:{port}", str(error)) from None
    finally:
        asked.close()
    return "http"


def _unreachable(address: str, why: str) -> Unreachable:
    return Unreachable(
        f"no inference server answers at {address}",
        why=why,
        next_step="start one with `kpdeploy serve REPO`, or give its address with --url",
    )


class Client:
    """Requests to one server, in the names of a model's signature. Use `connect` to make one; close it, or use `with`.

    `protocol` is "grpc" or "http".
    """

    def __init__(self, address: str, *, protocol: str, tls: bool, timeout_s: float) -> None:
        self.address = address
        self.protocol = protocol
        # Both modules of tritonclient have the same classes; the timeout is a matter of the call in one, of the
        # connection in the other.
        if protocol == "grpc":
            import tritonclient.grpc as wire

            self._client: Any = wire.InferenceServerClient(address, ssl=tls, channel_args=_CHANNEL)
            self._timeout: dict[str, float] = {"client_timeout": timeout_s}
        else:
            import tritonclient.http as wire

            limits = {"connection_timeout": timeout_s, "network_timeout": timeout_s}
            self._client = wire.InferenceServerClient(address, ssl=tls, **limits)
            self._timeout = {}
        self._wire: Any = wire

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def live(self) -> bool:
        """Whether the server says that it lives. Raises Unreachable where nothing answers."""
        with self._errors("the server"):
            return bool(self._client.is_server_live(**self._timeout))

    def model_ready(self, model: str, version: int | None = None) -> bool:
        """Whether the server says that a model, or this version of it, is loaded."""
        with self._errors(model):
            number = "" if version is None else str(version)
            return bool(self._client.is_model_ready(model, number, **self._timeout))

    def versions(self, model: str) -> list[str]:
        """The versions of a model that the server has loaded.

        Raises:
            ModelNotServed: none.
        """
        with self._errors(model):
            as_json = {"as_json": True} if self.protocol == "grpc" else {}
            metadata = self._client.get_model_metadata(model, **as_json, **self._timeout)
        return [str(version) for version in metadata.get("versions", ())]

    def parameters(self, model: str, version: str = "") -> dict[str, str]:
        """The parameters in the model's configuration, as the server has loaded it.

        Raises:
            Unreachable, ModelNotServed: as `infer`.
        """
        with self._errors(model):
            if self.protocol == "grpc":
                config = self._client.get_model_config(model, version, as_json=True, **self._timeout)["config"]
            else:
                config = self._client.get_model_config(model, version, **self._timeout)
        return {key: str(value.get("string_value", "")) for key, value in config.get("parameters", {}).items()}

    def digest(self, model: str, version: str) -> str:
        """The digest of the artifact that the server states for a version; empty where it states none.

        Raises:
            Unreachable, ModelNotServed: as `infer`.
        """
        return self.parameters(model, version).get(DIGEST, "")

    def infer(self, manifest: Manifest, inputs: Tensors) -> dict[str, Array]:
        """One request to the manifest's model and version: arrays in and out by the names of the signature.

        Raises:
            Unreachable: no answer, or none in time.
            ModelNotServed: the server refuses; `why` has its words.
        """
        signature = manifest.signature
        sent = []
        for spec, name in zip(signature.inputs, manifest.input_names, strict=True):
            array = _to_wire(np.ascontiguousarray(inputs[spec.name]), manifest)
            tensor = self._wire.InferInput(name, array.shape, _datatype(array))
            tensor.set_data_from_numpy(array)
            sent.append(tensor)
        wanted = [self._wire.InferRequestedOutput(name) for name in manifest.output_names]
        with self._errors(f"{manifest.model} version {manifest.version}"):
            result = self._client.infer(
                manifest.model, sent, model_version=str(manifest.version), outputs=wanted, **self._timeout
            )
            pairs = zip(signature.outputs, manifest.output_names, strict=True)
            return {spec.name: _from_wire(result.as_numpy(name), spec, manifest) for spec, name in pairs}

    def _answers(self) -> bool:
        try:
            return bool(self._client.is_server_live(**self._timeout))
        except Exception:
            return False

    @contextmanager
    def _errors(self, asked: str) -> Iterator[None]:
        """Both libraries' exceptions as ours: gRPC has status codes, HTTP raises what its sockets raise."""
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            message = str(error.message())
            # gRPC has one status for "no connection" and for "no such model"; only the server tells them apart.
            if str(error.status()).endswith("DEADLINE_EXCEEDED") or not self._answers():
                raise _unreachable(self.address, message) from None
            raise ModelNotServed(
                f"the server at {self.address} does not serve {asked}",
                why=message,
                next_step="look at the server's log, and check that it serves this repository",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(self.address, f"{type(error).__name__}: {error}") from None


def _datatype(array: Array) -> str:
    from tritonclient.utils import np_to_triton_dtype

    return str(np_to_triton_dtype(array.dtype))


def _to_wire(array: Array, manifest: Manifest) -> Array:
    """Triton carries no tensor without dims: one number a row travels as [batch, 1] (see the configuration)."""
    return array[:, None] if array.ndim == 1 and manifest.max_batch_size else array


def _from_wire(array: Array, spec: TensorSpec, manifest: Manifest) -> Array:
    return array[:, 0] if len(spec.shape) == 1 and manifest.max_batch_size else array


class Infers(Protocol):
    """What a client of any server does for `replay`."""

    def infer(self, manifest: Manifest, inputs: Tensors) -> dict[str, Array]: ...


def replay(client: Infers, deployment: Deployment, baseline: Baseline) -> list[Comparison]:
    """Send the golden requests; the worst comparison of each output over all of them.

    Raises:
        Unreachable, ModelNotServed: as Client.infer.
    """
    manifest = deployment.manifest
    return worst_of(
        comparison
        for exchange in baseline.exchanges
        for comparison in compare(ask_golden(client, manifest, exchange), exchange.outputs, manifest.tolerances)
    )


def ask_golden(client: Infers, manifest: Manifest, exchange: Exchange) -> dict[str, Array]:
    """The answer to one exchange, asked for in parts where it is a larger batch than the server takes."""
    rows = len(next(iter(exchange.inputs.values()))) if manifest.max_batch_size else 1
    if rows <= manifest.max_batch_size or not manifest.max_batch_size:
        return client.infer(manifest, exchange.inputs)
    starts = range(0, rows, manifest.max_batch_size)
    parts = [
        client.infer(manifest, {n: a[start : start + manifest.max_batch_size] for n, a in exchange.inputs.items()})
        for start in starts
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What one model answered: the worst comparison of each output over all golden requests."""

    model: str
    version: int
    requests: int
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a server answered to the golden requests of a repository."""

    address: str
    protocol: str
    models: tuple[ModelReport, ...]

    @property
    def passed(self) -> bool:
        return all(comparison.passed for report in self.models for comparison in report.comparisons)

    def difference(self) -> AnswersDiffer | None:
        """The first output that is not the golden one, as an error."""
        for report in self.models:
            for found in report.comparisons:
                if not found.passed:
                    return AnswersDiffer(
                        f"{report.model} version {report.version} at {self.address} answers differently",
                        why=f"output {found.output} is off by {found.error:.3g}, more than {found.tolerance:.3g}",
                        next_step="check which file and runtime the server loaded, or export the model again",
                    )
        return None

    def to_json(self) -> dict[str, Any]:
        models = [
            {
                "model": report.model,
                "version": report.version,
                "requests": report.requests,
                "outputs": [
                    {"output": c.output, "error": c.error, "tolerance": c.tolerance, "passed": c.passed}
                    for c in report.comparisons
                ],
            }
            for report in self.models
        ]
        return {"address": self.address, "protocol": self.protocol, "passed": self.passed, "models": models}


def verify(
    repo: str,
    *,
    url: str,
    model: str | None = None,
    protocol: str = "auto",
    timeout_s: float = 30.0,
    token: str = "",
) -> VerifyReport:
    """Check that the server at `url` serves what is in `repo`: digests, versions, and every golden answer.

    Raises:
        RepositoryBroken, DigestMismatch: the repository is not what was proven.
        Unreachable, ModelNotServed: the server does not answer, or serves another version.
        AnswersDiffer: an answer is further from the golden one than its tolerance.
    """
    report = check(repo, url=url, model=model, protocol=protocol, timeout_s=timeout_s, token=token)
    if error := report.difference():
        raise error
    return report


def check(
    repo: str,
    *,
    url: str,
    model: str | None = None,
    protocol: str = "auto",
    timeout_s: float = 30.0,
    token: str = "",
) -> VerifyReport:
    """As `verify`, with different answers in the report and not raised."""
    deployments = [find_deployment(repo, model)] if model else read_repository(repo)
    baselines = [_proven(deployment) for deployment in deployments]
    target = deployments[0].manifest.target
    with connect_to(target, url, protocol=protocol, token=token, timeout_s=timeout_s) as client:
        reports = [_check_one(client, *pair) for pair in zip(deployments, baselines, strict=True)]
        return VerifyReport(address=client.address, protocol=client.protocol, models=tuple(reports))


def _proven(deployment: Deployment) -> Baseline:
    """The golden requests, once every file is the one that was proven."""
    with local_files(deployment) as folder:
        deployment.manifest.check_files(folder)
        return Baseline.read(folder)


def _check_one(client: Client | TorchServeClient, deployment: Deployment, baseline: Baseline) -> ModelReport:
    if not client.model_ready(deployment.model, deployment.version):
        # This raises with the server's own reason where it knows no such model.
        served = client.versions(deployment.model)
        raise ModelNotServed(
            f"the server at {client.address} does not serve {deployment.model} version {deployment.version}",
            why=f"it serves: {', '.join(served) or 'no version'}",
            next_step="let the server load the repository again, or verify the repository that it serves",
        )
    return ModelReport(
        model=deployment.model,
        version=deployment.version,
        requests=len(baseline.exchanges),
        comparisons=tuple(replay(client, deployment, baseline)),
    )
