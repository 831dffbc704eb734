"""The served baseline: how long golden requests take through the probe's own path, while all is well.

A latency that a client sees holds the network, the queue and the batching; it is never compared with a time taken in
process. served.json lies in the version's folder, beside the files of the export, and is not one of them.
"""

from __future__ import annotations

import json
import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.baseline import BUCKETS_SECONDS, histogram
from kpdeploy.deployment import Deployment
from kpdeploy.errors import BaselineUnusable, ClockSkewed, LoadFailed, RepositoryBroken, RepositoryUnwritable
from kpdeploy.monitoring.machine import Demand, is_local
from kpdeploy.monitoring.probe import Exporter, Probe, Taken, schedule
from kpdeploy.progress import Progress
from kpdeploy.serving.client import verify

SERVED = "served.json"
SCHEMA = 2
MIN_WINDOWS = 20
_CLOCK_TOLERANCE = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class PointLatency:
    """One golden request: p50 and p99 of each window, in seconds, and all latencies in BUCKETS_SECONDS and beyond. What
    is `own` is without what was waited for cores, and empty where that cannot be told."""

    point: str
    p50_seconds: tuple[float, ...]
    p99_seconds: tuple[float, ...]
    counts: tuple[int, ...]
    own_p50_seconds: tuple[float, ...] = ()
    own_counts: tuple[int, ...] = ()

    @property
    def median(self) -> float:
        """As Prometheus computes it from the same buckets."""
        return quantile(0.5, self.counts)


@dataclass(frozen=True, kw_only=True)
class ServedBaseline:
    """What the probe saw of one version. `rate` is in requests/s, `recorded` an ISO time. `demand` is that of the
    machine (see kpdeploy.monitoring.machine) in each window; empty where the server was elsewhere."""

    model: str
    version: int
    digest: str
    recorded: str
    rate: float
    points: tuple[PointLatency, ...]
    demand: tuple[float, ...]

    @property
    def own(self) -> bool:
        """Whether it tells latencies without what was waited for cores."""
        return all(point.own_p50_seconds for point in self.points)

    @property
    def spread(self) -> float:
        """Relative spread of the windows, each the mean over the golden requests, as the rules judge them: 1.4826 × the
        median absolute deviation (σ, were they normal)."""
        taken = [point.own_p50_seconds if self.own else point.p50_seconds for point in self.points]
        shared = [values[: min(map(len, taken))] for values in taken]
        windows = [statistics.fmean(column) for column in zip(*map(_relative, shared), strict=True)]
        middle = statistics.median(windows)
        return 1.4826 * statistics.median(abs(value - middle) for value in windows) / middle

    def write(self, path: Path) -> None:
        """Raises RepositoryUnwritable."""
        try:
            aside = path.with_name(f"{path.name}.part")
            aside.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}) + "\n")
            aside.replace(path)
        except OSError as error:
            raise RepositoryUnwritable(
                f"{path} cannot be written", why=str(error), next_step="name another file with --output"
            ) from None

    @classmethod
    def read(cls, path: Path, deployment: Deployment) -> ServedBaseline:
        """The served baseline of a deployment.

        Raises:
            BaselineUnusable: it cannot be read, or is of another model, version or artifact.
            ClockSkewed: it says that it was recorded in the future.
        """
        again = f"record it again: kpdeploy monitor baseline {deployment.repository} --url HOST:PORT"
        try:
            data = json.loads(path.read_text())
            if data.pop("schema") != SCHEMA:
                raise ValueError(f"schema is not {SCHEMA}")
            points = tuple(_read_point(entry) for entry in data["points"])
            found = cls(**{**data, "points": points, "demand": tuple(data["demand"])})
            recorded = datetime.fromisoformat(found.recorded)
            if any(len(p.counts) != len(BUCKETS_SECONDS) + 1 or not p.p50_seconds for p in points) or not points:
                raise ValueError("its histograms have other buckets")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BaselineUnusable(
                f"the served baseline {path} cannot be read", why=str(error), next_step=again
            ) from None
        wanted = (deployment.model, deployment.version, deployment.manifest.digest)
        if (found.model, found.version, found.digest) != wanted:
            raise BaselineUnusable(
                f"{path} is the baseline of {found.model} version {found.version}",
                why=f"it is not of this artifact of {deployment.model} version {deployment.version}",
                next_step=again,
            )
        if recorded > datetime.now(UTC) + _CLOCK_TOLERANCE:
            raise ClockSkewed(
                f"{path} was recorded in the future, at {found.recorded}",
                why=f"this machine's clock says {datetime.now(UTC).isoformat(timespec='seconds')}",
                next_step="set the clock (timedatectl), or record the baseline again",
            )
        return found


def _read_point(data: Mapping[str, Any]) -> PointLatency:
    values = {name: tuple(entry) for name, entry in data.items() if name != "point"}
    return PointLatency(point=data["point"], **values)


def _relative(values: Sequence[float]) -> list[float]:
    middle = statistics.median(values)
    return [value / middle for value in values]


def served_path(deployment: Deployment) -> Path:
    return Path(deployment.folder) / SERVED


def find_served(deployment: Deployment) -> ServedBaseline | None:
    """The served baseline beside a version of a local repository; None where none was recorded."""
    path = served_path(deployment)
    return ServedBaseline.read(path, deployment) if path.is_file() else None


def record(
    repo: str,
    model: str,
    *,
    url: str,
    protocol: str = "auto",
    rate: float = 1.0,
    windows: int = MIN_WINDOWS,
    window_seconds: float = 15.0,
    timeout_s: float = 5.0,
    token: str = "",
    progress: Progress | None = None,
) -> ServedBaseline:
    """Ask the golden requests for `windows` × `window_seconds` and hold what they took.

    Raises:
        Unreachable, ModelNotServed, AnswersDiffer, DigestMismatch, RepositoryBroken: as kpdeploy.serving.client.verify.
        LoadFailed: a request failed on the way: such a time is nothing to compare with.
    """
    progress = progress or Progress()
    verify(repo, url=url, model=model, protocol=protocol, timeout_s=timeout_s, token=token)
    exporter = Exporter()
    probe = Probe(
        repo, model, url=url, protocol=protocol, rate=rate, timeout_s=timeout_s, token=token, exporter=exporter
    )
    golden = probe.golden
    per_window = max(len(golden.exchanges), round(rate * window_seconds))
    taken: list[dict[str, list[Taken]]] = []
    demand, meter = [], Demand()
    title = f"recording the served baseline of {model}: {windows} windows of {per_window / rate:.0f} s"
    with progress.step(title, total=windows) as advance:
        for index, due in schedule(1 / rate, threading.Event()):
            if index % per_window == 0:
                if index:
                    if (ratio := meter.ratio()) is not None:
                        demand.append(round(ratio, 4))
                    advance()
                if index == windows * per_window:
                    break
                taken.append(defaultdict(list))
            meter.sample()
            answered = probe.ask(index, due)
            if answered is None:
                raise LoadFailed(
                    f"a golden request of {model} failed while its baseline was recorded",
                    why=probe.last_failure,
                    next_step="look at the server's log, and record again when it serves without errors",
                )
            taken[-1][golden.points[index % len(golden.points)]].append(answered)
    return ServedBaseline(
        model=golden.deployment.model,
        version=golden.deployment.version,
        digest=golden.deployment.manifest.digest,
        recorded=datetime.now(UTC).isoformat(timespec="seconds"),
        rate=rate,
        points=tuple(_point(point, taken) for point in dict.fromkeys(golden.points)),
        demand=tuple(demand) if is_local(url) else (),
    )


def _point(point: str, windows: Sequence[Mapping[str, Sequence[Taken]]]) -> PointLatency:
    asked = [window[point] for window in windows if window.get(point)]
    if not asked:
        raise RepositoryBroken(f"no golden request for {point} was asked")
    values = [[taken.seconds for taken in window] for window in asked]
    own = [[taken.own_seconds for taken in window if taken.own_seconds is not None] for window in asked]
    known = all(own)
    return PointLatency(
        point=point,
        p50_seconds=_percentile(50, values),
        p99_seconds=_percentile(99, values),
        counts=histogram([seconds for v in values for seconds in v]),
        own_p50_seconds=_percentile(50, own) if known else (),
        own_counts=histogram([seconds for v in own for seconds in v]) if known else (),
    )


def _percentile(percentile: float, windows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(round(float(np.percentile(window, percentile)), 7) for window in windows)


def quantile(q: float, counts: Sequence[int]) -> float:
    """Seconds, linear within the bucket, as Prometheus' histogram_quantile; NaN of nothing."""
    rank = q * sum(counts)
    if not rank:
        return math.nan
    below = 0
    for index, count in enumerate(counts):
        if below + count >= rank:
            if index == len(BUCKETS_SECONDS):
                return BUCKETS_SECONDS[-1]
            low = BUCKETS_SECONDS[index - 1] if index else 0.0
            return low + (BUCKETS_SECONDS[index] - low) * (rank - below) / count
        below += count
    return math.nan


def to_json(found: ServedBaseline) -> dict[str, Any]:
    points = [
        {"point": p.point, "p50_seconds": p.median, "p99_seconds": quantile(0.99, p.counts)} for p in found.points
    ]
    return {**asdict(found), "points": points}
