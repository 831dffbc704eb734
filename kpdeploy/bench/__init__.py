"""Latency and throughput of a served model under load, closed or open loop, over gRPC or HTTP.

The generator is one asyncio process. It shares its machine with whatever else runs there, so every row says how much
of a core the generator used and, in the open loop, how late it was.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from kpdeploy.bench.loops import closed, opened
from kpdeploy.bench.report import BenchReport, Latencies, Row
from kpdeploy.bench.requests import Recipe, from_repository, from_server
from kpdeploy.bench.server import Served, ask
from kpdeploy.bench.server import torchserve as on_torchserve
from kpdeploy.bench.wire import WIRES, Wire
from kpdeploy.errors import InputsUnknown, LoadFailed, UnknownName, did_you_mean
from kpdeploy.progress import Progress
from kpdeploy.serving.client import committed_version, connect, connect_torchserve, is_torchserve

__all__ = ["MODES", "PROTOCOLS", "BenchReport", "Latencies", "Row", "bench"]

MODES = ("closed", "open")
PROTOCOLS = ("auto", *WIRES)
POOL = 32
"""Distinct requests, sent in turn."""
PROBES = 3

Run = Callable[[Wire, float, float], Awaitable[Row]]
"""run(wire, level, seconds)"""


def bench(
    url: str,
    *,
    model: str,
    repo: str | Path | None = None,
    mode: str = "closed",
    clients: Sequence[int] = (1, 8, 32),
    rates: Sequence[float] = (50, 100),
    seconds: float = 10,
    warmup_seconds: float = 2,
    protocol: str = "auto",
    shape: Mapping[str, int] | None = None,
    timeout_seconds: float = 10,
    token: str = "",
    progress: Progress | None = None,
) -> BenchReport:
    """Load `model` at `url` with each of `clients` (closed loop) or of `rates` in requests/s (open loop).

    `url` is host:port, or has grpc:// or http:// before it; without a scheme, protocol "auto" asks the port.

    Each level runs for `warmup_seconds` that do not count, then for `seconds`. Requests are valid random tensors at
    the point `shape` of the dynamic range (default: batch 1, half of the range and at most 128 elsewhere), by the
    manifest in the local repository `repo`, or else by the server's own metadata. A request without an answer after
    `timeout_seconds` is an error.

    Raises:
        UnknownName: no such mode or protocol.
        Unreachable: nothing at `url` speaks the protocol.
        ModelNotServed: the server does not serve the model.
        RepositoryBroken: `repo` does not hold the version that is served.
        InputMismatch, InputsUnknown: no request can be made for this `shape`, or for these inputs.
        LoadFailed: no request succeeded.
    """
    _known(mode, MODES, "mode")
    _known(protocol, PROTOCOLS, "protocol")
    if url.startswith(("https://", "grpcs://")):
        raise UnknownName(f"{url}: the generator speaks no TLS", next_step="measure behind it: http:// or grpc://")
    torchserve = protocol != "grpc" and is_torchserve(url, timeout_s=timeout_seconds)
    known = _on_torchserve(url, model, repo, shape or {}) if torchserve else None
    connected = connect_torchserve(url) if torchserve else connect(url, protocol=protocol, timeout_s=timeout_seconds)
    with connected as client:
        address, spoken = client.address, client.protocol
    run: Run = {"closed": closed, "open": opened}[mode]
    levels: Sequence[float] = {"closed": clients, "open": rates}[mode]
    shown = progress or Progress()

    async def main() -> BenchReport:
        if known is not None:
            served, recipe = known
        else:
            served = await ask(address, protocol=spoken, model=model)
            recipe = _recipe(served, model, repo, shape or {})
        wire = WIRES[spoken](address, model, recipe.requests(POOL), timeout_seconds, token=token)
        try:
            await _probe(wire, address, model)
            rows = [
                await _level(run, wire, mode, level, seconds=seconds, warmup_seconds=warmup_seconds, progress=shown)
                for level in levels
            ]
        finally:
            await wire.close()
        if not any(row.succeeded for row in rows):
            raise _load_failed(address, model, next(iter(rows[-1].errors), ""))
        return BenchReport(
            url=address,
            protocol=spoken,
            server=served.server,
            model=model,
            version=served.version,
            mode=mode,
            point=recipe.point,
            inputs=recipe.described,
            distinct_requests=POOL,
            warmup_seconds=warmup_seconds,
            rows=tuple(rows),
            notes=recipe.notes,
        )

    return asyncio.run(main())


def _known(name: str, names: Sequence[str], kind: str) -> None:
    if name not in names:
        raise UnknownName(
            f"there is no {kind} {name!r}",
            next_step=did_you_mean(name, names, otherwise=f"use one of {', '.join(names)}"),
        )


def _recipe(served: Served, model: str, repo: str | Path | None, shape: Mapping[str, int]) -> Recipe:
    if repo is not None:
        return from_repository(Path(repo), model, served.version, shape)
    return from_server(served.metadata, max_batch_size=served.max_batch_size, shape=shape)


def _on_torchserve(url: str, model: str, repo: str | Path | None, shape: Mapping[str, int]) -> tuple[Served, Recipe]:
    if repo is None:
        raise InputsUnknown(
            f"the TorchServe at {url} does not tell what {model} takes",
            next_step="give --repo with the repository that the model was exported to",
        )
    served = on_torchserve(committed_version(str(repo), model))
    return served, from_repository(Path(repo), model, served.version, shape)


async def _probe(wire: Wire, url: str, model: str) -> None:
    """Raise LoadFailed where none of a few single requests succeeds: no load will."""
    reasons = [await wire.send(index) for index in range(PROBES)]
    if all(reasons):
        raise _load_failed(url, model, reasons[-1])


def _load_failed(url: str, model: str, reason: str) -> LoadFailed:
    return LoadFailed(
        f"no request to {model} at {url} succeeded",
        why=reason,
        next_step="see the server's log; --repo gives requests that the model accepts, --shape their sizes",
    )


async def _level(
    run: Run, wire: Wire, mode: str, level: float, *, seconds: float, warmup_seconds: float, progress: Progress
) -> Row:
    title = f"{level:g} clients, closed loop" if mode == "closed" else f"{level:g} requests/s, open loop"
    with progress.step(title, total=math.ceil(warmup_seconds + seconds)) as advance:
        ticking = asyncio.create_task(_tick(advance))
        try:
            if warmup_seconds:
                await run(wire, level, warmup_seconds)
            return await run(wire, level, seconds)
        finally:
            ticking.cancel()


async def _tick(advance: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(1)
        advance()
