"""The server's three ports, checked before it starts: tritonserver itself finds a taken one only after loading."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import psutil

from kpdeploy.errors import PortInUse, UnknownName


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The address that the server listens at; port 0 means any that is free."""

    host: str = "127.0.0.1"
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @property
    def open_to_network(self) -> bool:
        return not (self.host.startswith("127.") or self.host in ("localhost", "::1"))

    @property
    def client_host(self) -> str:
        """Where a client on this machine finds the server."""
        # Not "localhost": a bare container may have no /etc/hosts, and elsewhere the name may mean ::1 first.
        return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.host, self.host)


def claim(ports: Ports) -> Ports:
    """The same ports, all free just now, those that were 0 chosen.

    Raises:
        UnknownName: the host is no address of this machine.
        PortInUse: a port is taken, or given twice; names who has it, and a free one.
    """
    if reason := refusal(ports.host, 0):
        raise UnknownName(
            f"{ports.host!r} is no address of this machine",
            why=reason,
            next_step="use 127.0.0.1, or 0.0.0.0 to listen at all addresses",
        )
    claimed: dict[str, int] = {}
    for name in ("http", "grpc", "metrics"):
        port: int = getattr(ports, name) or any_free(ports.host)
        taken = port in claimed.values()
        reason = "it is also another port of this server" if taken else refusal(ports.host, port)
        if reason:
            raise PortInUse(
                f"port {port} ({name}) cannot be used",
                why=reason,
                next_step=f"free it, or use another one: --{name}-port {free_after(ports.host, port)}",
            )
        claimed[name] = port
    return Ports(host=ports.host, **claimed)


def refusal(host: str, port: int) -> str:
    """Why the port cannot be bound; empty if it can."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port whose last connections are still closing is free; one with a listener is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        return ""
    except OSError as error:
        owner = _owner(port) if port else ""
        return f"{owner} listens there" if owner else f"{error.strerror or error}"


def _owner(port: int) -> str:
    # Other users' sockets are visible to root only.
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


def free_after(host: str, port: int) -> int:
    steps = (
        candidate
        for candidate in range(max(port, 1024) + 10, min(port + 2000, 65536), 10)
        if not refusal(host, candidate)
    )
    return next(steps, 0) or any_free(host)


def any_free(host: str) -> int:
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
