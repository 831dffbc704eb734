"""The two ways to load a server. A closed loop asks how fast it can answer N clients that wait; an open loop asks how
long an answer takes when requests arrive on their own, whether or not the server keeps up.

In the open loop latency counts from the moment a request was due, not from when it left: a server that stalls also
delays all who arrive meanwhile (leaving them out is "coordinated omission", after Gil Tene).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kpdeploy.bench.report import Latencies, Row
from kpdeploy.bench.wire import Wire

HEAD_START_SECONDS = 0.01


@dataclass
class Tally:
    """What happened to the requests of one run, in seconds of perf_counter. Sorted out after the run, not during it."""

    latencies: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, seconds: float, reason: str) -> None:
        if reason:
            self.errors[reason] += 1
        else:
            self.latencies.append(seconds)


async def closed(wire: Wire, clients: float, seconds: float) -> Row:
    """`clients` clients, each with one request in flight, for `seconds`; those in flight at the end still count."""
    tally, count = Tally(), round(clients)
    start, busy = time.perf_counter(), time.process_time()

    async def client(number: int) -> None:
        # Each starts elsewhere in the pool, so that no two send the same at once.
        for index in itertools.count(number, count):
            if (sent := time.perf_counter()) >= start + seconds:
                return
            reason = await wire.send(index)
            tally.add(time.perf_counter() - sent, reason)

    await asyncio.gather(*(client(number) for number in range(count)))
    return _row("closed", clients, tally, start=start, busy=busy)


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Seconds at which requests are due: a Poisson process with just the expected number of arrivals, so that the
    asked rate is met exactly (given their number, the arrivals of a Poisson process are sorted uniform draws)."""
    rng = np.random.default_rng(seed)
    moments: list[float] = np.sort(rng.uniform(0, seconds, size=max(1, round(rate * seconds)))).tolist()
    return moments


async def opened(wire: Wire, rate: float, seconds: float) -> Row:
    """Poisson arrivals at `rate` requests/s for `seconds`, then all that is still in flight."""
    tally = Tally()
    start, busy = time.perf_counter() + HEAD_START_SECONDS, time.process_time()
    due = [start + moment for moment in arrivals(rate, seconds)]

    async def one(index: int) -> None:
        tally.late.append(time.perf_counter() - due[index])
        reason = await wire.send(index)
        tally.add(time.perf_counter() - due[index], reason)

    tasks: list[asyncio.Task[None]] = []
    stop = threading.Event()
    try:
        await _released(due, lambda index: tasks.append(asyncio.create_task(one(index))), stop)
        await asyncio.gather(*tasks)
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
    return _row("open", rate, tally, start=start, busy=busy)


async def _released(due: Sequence[float], launch: Callable[[int], object], stop: threading.Event) -> None:
    """Call `launch(index)` in the event loop at each due moment. A thread keeps the time: the loop's own timers are
    rounded up to whole milliseconds by epoll."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def keep_time() -> None:
        for index, moment in enumerate(due):
            wait = moment - time.perf_counter()
            if stop.wait(wait) if wait > 0 else stop.is_set():
                return
            loop.call_soon_threadsafe(launch, index)
        loop.call_soon_threadsafe(done.set)

    threading.Thread(target=keep_time, name="arrivals", daemon=True).start()
    await done.wait()


def _row(mode: str, level: float, tally: Tally, *, start: float, busy: float) -> Row:
    seconds = time.perf_counter() - start
    return Row(
        mode=mode,
        level=level,
        seconds=seconds,
        succeeded=len(tally.latencies),
        errors=dict(tally.errors.most_common()),
        generator_cores=(time.process_time() - busy) / seconds,
        latencies=Latencies.of(tally.latencies),
        late_p99_ms=Latencies.of(tally.late).p99_ms,
    )
