"""Golden requests to a running server at a fixed rate, and what came back as Prometheus metrics.

Each request is timed from the moment at which it was due: what a stalled server does to the requests behind it counts
(leaving it out is "coordinated omission", after Gil Tene). No user traffic is read.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kpdeploy.artifact import GOLDEN, sha256
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import compare
from kpdeploy.deployment import Deployment
from kpdeploy.errors import DigestMismatch, KpdeployError, ModelNotServed, Unreachable
from kpdeploy.inputs import Array, point_name, point_of
from kpdeploy.monitoring import metrics
from kpdeploy.monitoring.machine import SAMPLE_SECONDS, Demand, Processes, Waits, is_local
from kpdeploy.serving.client import (
    Client,
    TorchServeClient,
    ask_golden,
    connect_to,
    find_deployment,
    local_files,
)
from kpdeploy.signature import Signature

LOOK_SECONDS = 5.0
"""How often the probe asks which artifact is served and reads the repository again."""


@dataclass(frozen=True, kw_only=True)
class Golden:
    """What is asked and what is right: the golden requests of one version, each with the name of its point."""

    deployment: Deployment
    exchanges: tuple[Exchange, ...]
    points: tuple[str, ...]

    @classmethod
    def read(cls, deployment: Deployment) -> Golden:
        """The golden requests of a deployment.

        Raises:
            RepositoryBroken: they cannot be read.
            DigestMismatch: their file is not the one of the export.
        """
        with local_files(deployment) as folder:
            _check_golden(deployment, folder)
            exchanges = Baseline.read(folder).exchanges
        points = tuple(point_label(deployment.manifest.signature, exchange.inputs) for exchange in exchanges)
        return cls(deployment=deployment, exchanges=exchanges, points=points)

    @property
    def labels(self) -> tuple[str, str]:
        return self.deployment.model, str(self.deployment.version)


def _check_golden(deployment: Deployment, folder: Path) -> None:
    wanted = deployment.manifest.files.get(GOLDEN)
    path = folder / GOLDEN
    if wanted is not None and path.is_file() and sha256(path) != wanted:
        raise DigestMismatch(
            f"{path} is not the file that was exported",
            why="its sha256 is not the one in the manifest, so its answers cannot be taken as golden",
            next_step="restore the file, or export the model again",
        )


def point_label(signature: Signature, inputs: Mapping[str, Array]) -> str:
    """The point of a request as a label: "batch=1,seq=16", or "fixed"."""
    return point_name(point_of(signature, inputs)) or "fixed"


class Exporter:
    """The metrics of kpdeploy.monitoring.metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(m: metrics.Metric) -> Gauge:
            return Gauge(m.name, m.help, m.labels, registry=self.registry)

        def counter(m: metrics.Metric) -> Counter:
            return Counter(m.name, m.help, m.labels, registry=self.registry)

        def histogram(m: metrics.Metric) -> Histogram:
            return Histogram(m.name, m.help, m.labels, buckets=metrics.BUCKETS_SECONDS, registry=self.registry)

        self.latency, self.own_latency = histogram(metrics.LATENCY), histogram(metrics.OWN_LATENCY)
        self.requests, self.errors, self.wrong = map(counter, (metrics.REQUESTS, metrics.ERRORS, metrics.WRONG))
        self.drift, self.tolerance = gauge(metrics.DRIFT), gauge(metrics.DRIFT_TOLERANCE)
        self.up, self.ready = gauge(metrics.UP), gauge(metrics.READY)
        self.artifact, self.matches = gauge(metrics.ARTIFACT), gauge(metrics.ARTIFACT_MATCHES)
        self.demand, self.memory = gauge(metrics.DEMAND), gauge(metrics.MEMORY)
        self.slowdown = gauge(metrics.SLOWDOWN)
        gauge(metrics.CLOCK).set_function(time.time)

    def begin(self, golden: Golden) -> None:
        """Counters from zero: a rate needs to see the step from nothing to the first error."""
        labels = golden.labels
        self.requests.labels(*labels)
        self.wrong.labels(*labels)
        self.up.labels(*labels).set(0)
        self.ready.labels(*labels).set(0)
        for reason in metrics.REASONS:
            self.errors.labels(*labels, reason)
        for point in golden.points:
            self.latency.labels(*labels, point)

    def forget(self, labels: tuple[str, str]) -> None:
        """Remove the series of a version that is no longer asked for."""
        wanted = dict(zip(metrics.VERSION, labels, strict=True))
        every = (
            self.latency, self.own_latency, self.requests, self.errors, self.wrong, self.drift, self.tolerance,
            self.up, self.ready, self.artifact, self.matches, self.demand, self.slowdown, self.memory,
        )  # fmt: skip
        for metric in every:
            metric.remove_by_labels(wanted)


@dataclass
class Connection:
    """A client that is made when it is needed, and again after the server was away."""

    url: str
    protocol: str
    timeout_s: float
    target: str = "triton"
    token: str = ""
    client: Client | TorchServeClient | None = None

    def get(self) -> Client | TorchServeClient:
        if self.client is None:
            self.client = connect_to(
                self.target, self.url, protocol=self.protocol, token=self.token, timeout_s=self.timeout_s
            )
        return self.client

    def drop(self) -> None:
        if self.client is not None:
            with suppress(Exception):
                self.client.close()
        self.client = None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a golden request took: `seconds` from when it was due to its answer; `own_seconds` from when it was sent,
    without waiting for cores, where that can be told."""

    seconds: float
    own_seconds: float | None


@dataclass
class _Look:
    """What the slow thread knows from one look to the next."""

    stamps: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    whole: bool = True


class Probe:
    """Watches one model at one server, in two threads: one asks the golden requests at their times, the other looks at
    versions, digests and the machine, so that looking never delays a request.

    `say` gets a line when the server goes away and when it is back.
    """

    def __init__(
        self,
        repo: str,
        model: str,
        *,
        url: str,
        exporter: Exporter,
        protocol: str = "auto",
        rate: float = 1.0,
        timeout_s: float = 5.0,
        token: str = "",
        say: Callable[[str], None] = print,
    ) -> None:
        self.repo, self.model, self.url = repo, model, url
        self.golden = Golden.read(find_deployment(repo, model))
        self.last_failure = ""
        self._exporter = exporter
        self._period_s = 1 / rate
        self._timeout_s = timeout_s
        self._say = say
        target = self.golden.deployment.manifest.target
        self._asking = Connection(url, protocol, timeout_s, target, token)
        self._looking = Connection(url, protocol, timeout_s, target, token)
        self._errors: dict[int, dict[str, float]] = {}
        self._away = ""
        self._look = _Look()
        self._demand = Demand()
        self._processes = Processes(url)
        self._waits = Waits(url)
        self._lock = threading.Lock()
        exporter.begin(self.golden)

    def run(self, stop: threading.Event) -> None:
        """Ask until `stop` is set."""
        looker = threading.Thread(target=self._look_on, args=(stop,), name=f"look-{self.model}", daemon=True)
        looker.start()
        for index, due in schedule(self._period_s, stop):
            self.ask(index, due)
        looker.join(self._timeout_s)
        self._asking.drop()
        self._looking.drop()

    def ask(self, index: int, due: float) -> Taken | None:
        """One golden request, due at `due` seconds of time.monotonic: what it took; None without an answer, of which
        `last_failure` says why."""
        with self._lock:
            golden = self.golden
        exporter, labels = self._exporter, golden.labels
        exporter.requests.labels(*labels).inc()
        which = index % len(golden.exchanges)
        # What could not even be sent within its time got no answer within its time.
        if time.monotonic() - due > self._timeout_s:
            exporter.errors.labels(*labels, "timeout").inc()
            self.last_failure = "it was due while the ones before it still waited for their answers"
            return None
        exchange = golden.exchanges[which]
        self._waits.begin()
        try:
            answer = ask_golden(self._asking.get(), golden.deployment.manifest, exchange)
        except KpdeployError as error:
            self._failed(labels, error)
            return None
        taken = Taken(seconds=time.monotonic() - due, own_seconds=self._waits.own_seconds())
        exporter.latency.labels(*labels, golden.points[which]).observe(taken.seconds)
        if taken.own_seconds is not None:
            exporter.own_latency.labels(*labels, golden.points[which]).observe(taken.own_seconds)
        self._reached(labels, "")
        self._judge(golden, which, answer)
        return taken

    def _judge(self, golden: Golden, which: int, answer: Mapping[str, Array]) -> None:
        found = compare(answer, golden.exchanges[which].outputs, golden.deployment.manifest.tolerances)
        if not all(comparison.passed for comparison in found):
            self._exporter.wrong.labels(*golden.labels).inc()
        self._errors[which] = {comparison.output: comparison.error for comparison in found}
        for comparison in found:
            output = (*golden.labels, comparison.output)
            worst = max(errors.get(comparison.output, 0.0) for errors in self._errors.values())
            self._exporter.drift.labels(*output).set(worst)
            self._exporter.tolerance.labels(*output).set(comparison.tolerance)

    def _failed(self, labels: tuple[str, str], error: KpdeployError) -> None:
        reason = reason_of(error)
        self.last_failure = f"{error.what}: {error.why}"
        self._exporter.errors.labels(*labels, reason).inc()
        self._reached(labels, "" if isinstance(error, ModelNotServed) else f"{error.what}: {error.why}")
        if reason == "unreachable":
            self._asking.drop()

    def _reached(self, labels: tuple[str, str], away: str) -> None:
        self._exporter.up.labels(*labels).set(0 if away else 1)
        if bool(away) != bool(self._away):
            self._say(away or f"{self.model}: the server at {self.url} answers")
        self._away = away

    # What changes slowly

    def _look_on(self, stop: threading.Event) -> None:
        while True:
            self.look()
            for _ in range(round(LOOK_SECONDS / SAMPLE_SECONDS)):
                self._demand.sample()
                if stop.wait(SAMPLE_SECONDS):
                    return

    def look(self) -> None:
        """Which version and artifact the server has, what the repository holds now, and how busy the machine is."""
        try:
            self._follow_repository()
        except KpdeployError as error:
            self._say(f"{error.what}: {error.why}")
        labels = self.golden.labels
        self._check_files()
        try:
            self._check_served()
        except KpdeployError as error:
            self._exporter.ready.labels(*labels).set(0)
            if isinstance(error, Unreachable):
                self._looking.drop()
        if is_local(self.url):
            demand = self._demand.ratio()
            if demand is not None:
                self._exporter.demand.labels(*labels).set(demand)
            if (slowdown := self._processes.slowdown()) is not None:
                self._exporter.slowdown.labels(*labels).set(slowdown)
            if used := self._processes.memory_bytes():
                self._exporter.memory.labels(*labels).set(used)

    def _follow_repository(self) -> None:
        """Ask for the version that the repository names now: who publishes is watched from then on."""
        deployment = find_deployment(self.repo, self.model)
        known = self.golden.deployment
        if (deployment.version, deployment.manifest.digest) == (known.version, known.manifest.digest):
            return
        golden = Golden.read(deployment)
        old = self.golden.labels
        with self._lock:
            self.golden = golden
            self._errors = {}
        self._look = _Look()
        self._exporter.begin(golden)
        if old != golden.labels:
            self._exporter.forget(old)
        self._say(f"{self.model}: version {golden.deployment.version} is published; asking for it from now on")

    def _check_served(self) -> None:
        deployment, labels = self.golden.deployment, self.golden.labels
        client = self._looking.get()
        self._exporter.ready.labels(*labels).set(client.model_ready(deployment.model, deployment.version))
        served = newest(client.versions(deployment.model))
        # TorchServe tells neither at its inference port.
        if isinstance(client, TorchServeClient) or not served:
            return
        stated = client.digest(deployment.model, served)
        self._exporter.artifact.remove_by_labels(dict(zip(metrics.VERSION, labels, strict=True)))
        self._exporter.artifact.labels(*labels, served, stated).set(1)
        if stated or served != labels[1]:
            same = served == labels[1] and stated == deployment.manifest.digest
            self._exporter.matches.labels(*labels, "server").set(same)

    def _check_files(self) -> None:
        """The files of a repository on this machine against their digests; one is read again only if it was touched."""
        deployment = self.golden.deployment
        folder = Path(deployment.folder)
        if "://" in deployment.repository:
            return
        stamps = {}
        for name in deployment.manifest.files:
            with suppress(OSError):
                stat = (folder / name).stat()
                stamps[name] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamps != self._look.stamps:
            self._look.stamps = stamps
            try:
                deployment.manifest.check_files(folder)
                self._look.whole = True
            except (DigestMismatch, OSError):
                self._look.whole = False
        self._exporter.matches.labels(*self.golden.labels, "file").set(self._look.whole)


def newest(versions: Sequence[str]) -> str:
    """The version that answers a request that names none."""
    return max(versions, key=lambda version: int(version) if version.isdecimal() else -1, default="")


def schedule(period_s: float, stop: threading.Event) -> Iterator[tuple[int, float]]:
    """Indices with the moments at which they are due, each given out when it is, until `stop` is set.

    What comes late comes at once, none is left out: the moments stay those of the fixed rate.
    """
    start = time.monotonic()
    for index in itertools.count():
        due = start + index * period_s
        wait = due - time.monotonic()
        if stop.wait(wait) if wait > 0 else stop.is_set():
            return
        yield index, due


def reason_of(error: KpdeployError) -> str:
    """One of metrics.REASONS for what the client raised."""
    said = error.why.lower()
    if isinstance(error, Unreachable):
        return "timeout" if "deadline" in said or "timed out" in said or "timeout" in said else "unreachable"
    if "stub process" in said and "not healthy" in said:
        return "stub_dead"
    unknown = ("unknown model", "is not ready", "not found", "no version", "is not at ready state")
    return "not_served" if any(words in said for words in unknown) else "refused"


@contextmanager
def probing(probes: Sequence[Probe]) -> Iterator[threading.Event]:
    """All probes, each in its thread, until the block ends; the value ends them earlier."""
    stop = threading.Event()
    threads = [threading.Thread(target=probe.run, args=(stop,), daemon=True) for probe in probes]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
