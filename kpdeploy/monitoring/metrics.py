"""The name, the labels and the meaning of every metric that the probe exports, and that rules and dashboard read."""

from __future__ import annotations

from dataclasses import dataclass

from kpdeploy.baseline import BUCKETS_SECONDS

__all__ = ["ALL", "BUCKETS_SECONDS", "REASONS", "Metric"]

REASONS = ("unreachable", "timeout", "not_served", "stub_dead", "refused")
"""Why a golden request got no answer: nothing answers at the address; no answer in time; the server does not have the
model or the version; the process behind the model is dead; the server refused the request for another reason."""

SOURCES = ("server", "file")
"""Who says which artifact is served: the server, by its model configuration, or the file in the repository."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of the probe. `kind` is counter, gauge or histogram; the name has its unit."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


VERSION = ("model", "version")

LATENCY = Metric(
    name="kpdeploy_probe_latency_seconds",
    kind="histogram",
    labels=(*VERSION, "point"),
    help="Time from when a golden request was due to its answer, for requests that got one.",
)
OWN_LATENCY = Metric(
    name="kpdeploy_probe_own_latency_seconds",
    kind="histogram",
    labels=(*VERSION, "point"),
    help="Time from sending a golden request to its answer, without what threads of the server and of the probe waited "
    "for a core; absent unless both are on one machine whose kernel tells.",
)
REQUESTS = Metric(
    name="kpdeploy_probe_requests_total",
    kind="counter",
    labels=VERSION,
    help="Golden requests that were due, answered or not.",
)
ERRORS = Metric(
    name="kpdeploy_probe_errors_total",
    kind="counter",
    labels=(*VERSION, "reason"),
    help="Golden requests without an answer, by reason.",
)
WRONG = Metric(
    name="kpdeploy_probe_wrong_answers_total",
    kind="counter",
    labels=VERSION,
    help="Answers further from the golden answer than the tolerance of the export.",
)
DRIFT = Metric(
    name="kpdeploy_probe_drift_ratio",
    kind="gauge",
    labels=(*VERSION, "output"),
    help="Largest distance |out - golden| / |golden| over the last answer to each golden request.",
)
DRIFT_TOLERANCE = Metric(
    name="kpdeploy_probe_drift_tolerance_ratio",
    kind="gauge",
    labels=(*VERSION, "output"),
    help="The distance at which an answer counts as wrong, from the manifest.",
)
UP = Metric(
    name="kpdeploy_probe_up",
    kind="gauge",
    labels=VERSION,
    help="1 if the server answered anything at the last try, else 0.",
)
READY = Metric(
    name="kpdeploy_probe_model_ready",
    kind="gauge",
    labels=VERSION,
    help="1 if the server says that it has loaded this version, else 0.",
)
ARTIFACT = Metric(
    name="kpdeploy_probe_artifact_info",
    kind="gauge",
    labels=(*VERSION, "served_version", "digest"),
    help="1, with the version that answers requests without a version, and the digest that the server states for it.",
)
ARTIFACT_MATCHES = Metric(
    name="kpdeploy_probe_artifact_matches",
    kind="gauge",
    labels=(*VERSION, "source"),
    help="1 if what is served is the repository's artifact, 0 if it is another; absent where nobody can tell.",
)
DEMAND = Metric(
    name="kpdeploy_probe_machine_demand_ratio",
    kind="gauge",
    labels=VERSION,
    help="Tasks for each core of the server's machine that ran or wanted to, if the probe runs there too; else absent.",
)
SLOWDOWN = Metric(
    name="kpdeploy_probe_server_slowdown_ratio",
    kind="gauge",
    labels=VERSION,
    help="Time in which the server's processes ran or waited for a core, over the time they ran: 1 is undisturbed.",
)
MEMORY = Metric(
    name="kpdeploy_probe_server_memory_bytes",
    kind="gauge",
    labels=VERSION,
    help="Resident memory of the processes of a server on this machine.",
)
CLOCK = Metric(
    name="kpdeploy_probe_clock_seconds",
    kind="gauge",
    labels=(),
    help="The probe's clock, in seconds since 1970, when it was scraped.",
)

ALL = (
    LATENCY,
    OWN_LATENCY,
    REQUESTS,
    ERRORS,
    WRONG,
    DRIFT,
    DRIFT_TOLERANCE,
    UP,
    READY,
    ARTIFACT,
    ARTIFACT_MATCHES,
    DEMAND,
    SLOWDOWN,
    MEMORY,
    CLOCK,
)
