"""What a server counts of all its clients' requests, in PromQL: one row a target.

Every expression is one series with the labels model and version (`answered` and `failed`: model), as the probe's have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kpdeploy.deployment import Deployment

BY = "model, version"


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Rates over a window, such as `requests("5m")`: answered requests and failed ones; of the time in the server that
    in its queue, and the whole; rows, and the calls of the model that they took. `where` says how they are seen by
    hand, and `whose` whose they are."""

    whose: str
    where: str
    requests: Callable[[str], str]
    answered: Callable[[str], str]
    failed: Callable[[str], str]
    queue: Callable[[str], str]
    whole: Callable[[str], str]
    rows: Callable[[str], str]
    calls: Callable[[str], str]


def _rate(series: str, by: str = "") -> Callable[[str], str]:
    return lambda window: f"sum{f' by ({by})' if by else ''} (rate({series}[{window}]))"


def _triton(model: str, version: str) -> Counters:
    one, every = f'{{model="{model}",version="{version}"}}', f'model="{model}"'
    return Counters(
        whose="Triton's own counters",
        where="curl -s HOST:8002/metrics | grep nv_inference_request_failure",
        requests=_rate(f"nv_inference_request_success{one}", BY),
        answered=_rate(f"nv_inference_request_success{{{every}}}", "model"),
        failed=_rate(f'nv_inference_request_failure{{{every},reason!="CANCELED"}}', "model"),
        queue=_rate(f"nv_inference_queue_duration_us{one}", BY),
        whole=_rate(f"nv_inference_request_duration_us{one}", BY),
        rows=_rate(f"nv_inference_count{one}", BY),
        calls=_rate(f"nv_inference_exec_count{one}", BY),
    )


def _torchserve(model: str, version: str) -> Counters:
    def named(series: str, **labels: str) -> Callable[[str], str]:
        """TorchServe's own labels are others."""
        rate = _rate(series)

        def expression(window: str) -> str:
            found = rate(window)
            for name, value in labels.items():
                found = f'label_replace({found}, "{name}", "{value}", "", "")'
            return found

        return expression

    one = {"model": model, "version": version}
    queue, run = (
        named(f'ts_{name}_latency_microseconds{{model_name="{model}"}}', **one) for name in ("queue", "inference")
    )
    return Counters(
        # It counts failures of all models together.
        whose="TorchServe's own counters, of all its models",
        where='curl -s -H "Authorization: Bearer TOKEN" HOST:8082/metrics | grep Requests5XX',
        requests=named(f'ts_inference_requests_total{{model_name="{model}"}}', **one),
        answered=named("Requests2XX", model=model),
        failed=named("Requests5XX", model=model),
        queue=queue,
        whole=lambda window: f"({queue(window)} + {run(window)})",
        rows=named(f'kpdeploy_batch_rows_sum{{ModelName="{model}"}}', **one),
        calls=named(f'kpdeploy_batch_rows_count{{ModelName="{model}"}}', **one),
    )


_OF: Mapping[str, Callable[[str, str], Counters]] = {"triton": _triton, "torchserve": _torchserve}


def counters_of(deployment: Deployment) -> Counters:
    """The counters of the server that a deployment is for."""
    return _OF[deployment.manifest.target](deployment.model, str(deployment.version))
