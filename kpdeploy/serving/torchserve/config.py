"""What TorchServe is told: model-config.yaml in each archive, and config.properties for the server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kpdeploy.artifact import Manifest

BATCH_DELAY_MS = 1
"""How long a request waits for company. Whole milliseconds are what TorchServe counts in; while a worker is busy,
requests gather anyway."""
RESPONSE_TIMEOUT_S = 120
STARTUP_TIMEOUT_S = 120
MAX_BODY_BYTES = 64 << 20
TOKEN_MINUTES = 365 * 24 * 60
"""The key file lives as long as its server, which may be long: TorchServe's own hour would end clients in between."""


def model_config(manifest: Manifest) -> str:
    """model-config.yaml. All five keys: what is not said here, a server's defaults decide."""
    return (
        f"batchSize: {max(1, manifest.max_batch_size)}\n"
        f"maxBatchDelay: {BATCH_DELAY_MS}\n"
        "minWorkers: 1\n"
        "maxWorkers: 1\n"
        f"responseTimeout: {RESPONSE_TIMEOUT_S}\n"
        f"startupTimeout: {STARTUP_TIMEOUT_S}\n"
    )


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where a server listens: three HTTP ports and two of gRPC, at one host."""

    host: str = "127.0.0.1"
    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071


def properties(
    archives: Iterable[str],
    addresses: Addresses,
    *,
    token: bool = True,
    store: str = "",
    model_api: bool = False,
) -> str:
    """config.properties of a server that loads `archives` of its model store, on loopback and with tokens.

    `model_api` lets the management API load and unload models.
    """
    lines = {
        "inference_address": f"http://{addresses.host}:{addresses.inference}",
        "management_address": f"http://127.0.0.1:{addresses.management}",
        "metrics_address": f"http://127.0.0.1:{addresses.metrics}",
        "grpc_inference_address": addresses.host,
        "grpc_inference_port": addresses.grpc_inference,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": addresses.grpc_management,
        **({"model_store": store} if store else {}),
        "load_models": ",".join(archives),
        "disable_token_authorization": "false" if token else "true",
        "token_expiration_min": TOKEN_MINUTES,
        "enable_model_api": "true" if model_api else "false",
        "allowed_urls": "file://.*",
        "install_py_dep_per_model": "false",
        "max_request_size": MAX_BODY_BYTES,
        "max_response_size": MAX_BODY_BYTES,
        "metrics_mode": "prometheus",
        "model_metrics_auto_detect": "true",
        "disable_system_metrics": "true",
    }
    return "".join(f"{key}={value}\n" for key, value in lines.items())
