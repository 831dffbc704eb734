"""The trial of a new version beside the one in service, on a running server, and what it decides.

Both versions get the same requests in turn: the golden ones, whose answers are known, and synthetic ones. The trial is
kept in a small file beside the model, so that it can be stopped and gone on with.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kpdeploy.artifact import Comparison
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import ModelNotServed, RepositoryBroken, Unreachable
from kpdeploy.inputs import Tensors, middle_point, sample
from kpdeploy.monitoring.regression import Criteria, Judgement, judge_pairs
from kpdeploy.progress import Progress
from kpdeploy.serving.client import Client, replay
from kpdeploy.signature import BYTES

STATE = "rollout.json"
SCHEMA = 1
CANARY = "-canary"
BLOCK = 12
LOOKS = 8
WINDOW_SECONDS = 0.06
MORE_ERRORS = 0.01
"""A version is worse where its share of failed requests is larger by this."""


@dataclass(kw_only=True)
class Trial:
    """What a rollout has seen so far. `old_ms` and `new_ms` are medians of windows taken in turn; `blocks` says in
    which block each was."""

    to: int
    against: int
    canary: str
    old_ms: list[float] = field(default_factory=list)
    new_ms: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=lambda: {"old": 0, "new": 0})
    errors: dict[str, int] = field(default_factory=lambda: {"old": 0, "new": 0})
    reasons: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def write(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(json.dumps(asdict(self)) + "\n")
        aside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Trial | None:
        """The trial that was stopped; None where there is none.

        Raises:
            RepositoryBroken: the file cannot be read, or a newer release wrote it.
        """
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text())
            if data["schema"] != SCHEMA:
                raise ValueError(f"it has schema {data['schema']}, this release knows {SCHEMA}")
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            next_step = "end it with the release that began it, or start afresh: --abort"
            raise RepositoryBroken(
                f"the rollout in {path} cannot be read", why=str(error), next_step=next_step
            ) from None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the trial says: promote or not, and why. `undecided`: more time might tell."""

    promote: bool
    why: str
    undecided: bool = False
    latency: Judgement | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def try_out(
    client: Client,
    old: Deployment,
    new: Deployment,
    trial: Trial,
    *,
    state: Path,
    criteria: Criteria,
    seconds: float,
    progress: Progress,
) -> Decision:
    """Ask both versions in turn until it is known which is to serve, for at most about `seconds`; the trial is written
    after every block.

    Raises:
        Unreachable: the server is gone; the trial can be gone on with.
    """
    if wrong := _wrong_answers(client, new):
        return Decision(promote=False, why=wrong)
    request = _request(old)
    calls = _calls(client, old, request)
    start = time.monotonic()
    first = max(trial.blocks, default=-1) + 1
    decision = _decide(trial, criteria)
    with progress.step(f"asking versions {trial.against} and {trial.to} in turn", total=LOOKS + 1 - first) as advance:
        for block in range(first, LOOKS + 1):
            if not decision.undecided and first != block:
                break
            if block > first and time.monotonic() - start > seconds:
                break
            for window in range(BLOCK):
                _window(client, (old, new), trial, request, calls, turned=window % 2 == 1)
                trial.blocks.append(block)
            trial.write(state)
            decision = _decide(trial, criteria)
            advance()
    if wrong := _wrong_answers(client, new):
        return Decision(promote=False, why=wrong)
    return decision


def _request(deployment: Deployment) -> Tensors:
    """A usual request; of a model that takes files or texts a golden one."""
    signature = deployment.manifest.signature
    if any(spec.dtype == BYTES for spec in signature.inputs):
        return Baseline.read(Path(deployment.folder)).exchanges[0].inputs
    return sample(signature, middle_point(signature, batch=1), np.random.default_rng(0))


def _wrong_answers(client: Client, new: Deployment) -> str:
    """Why the new version's golden answers are not right; empty where they are."""
    try:
        found: Sequence[Comparison] = replay(client, new, Baseline.read(Path(new.folder)))
    except ModelNotServed as error:
        return f"a golden request failed: {error.why}"
    wrong = [f"{c.output} is off by {c.error:.1e}, at most {c.tolerance:.0e} is right" for c in found if not c.passed]
    return f"wrong golden answers: {', '.join(wrong)}" if wrong else ""


def _calls(client: Client, old: Deployment, request: Tensors) -> int:
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        client.infer(old.manifest, request)
        taken.append(time.perf_counter() - begun)
    return max(3, min(50, round(WINDOW_SECONDS / statistics.median(taken))))


def _window(
    client: Client, sides: Sequence[Deployment], trial: Trial, request: Tensors, calls: int, *, turned: bool
) -> None:
    """One window of each version, call by call in turn."""
    named = list(zip(("old", "new"), sides, strict=True))
    taken: dict[str, list[float]] = {"old": [], "new": []}
    for _ in range(calls):
        for name, side in reversed(named) if turned else named:
            begun = time.perf_counter()
            trial.requests[name] += 1
            try:
                client.infer(side.manifest, request)
            except ModelNotServed as error:
                trial.errors[name] += 1
                trial.reasons = [*trial.reasons, error.why][-5:]
            except Unreachable as error:
                raise Unreachable(
                    f"{error.what}: the trial is kept", why=error.why, next_step="give the same command again"
                ) from None
            taken[name].append((time.perf_counter() - begun) * 1e3)
    trial.old_ms.append(statistics.median(taken["old"]))
    trial.new_ms.append(statistics.median(taken["new"]))


def _decide(trial: Trial, criteria: Criteria) -> Decision:
    shares = {name: trial.errors[name] / max(1, trial.requests[name]) for name in trial.errors}
    if shares["new"] > shares["old"] + MORE_ERRORS:
        said = f": {trial.reasons[-1]}" if trial.reasons else ""
        return Decision(promote=False, why=f"{shares['new']:.1%} of its requests failed{said}")
    found = judge_pairs(trial.old_ms, trial.new_ms, replace(criteria, looks=LOOKS), blocks=trial.blocks)
    if found.outcome == "regressed":
        return Decision(promote=False, why=f"it is slower: {found.reason}", latency=found)
    if found.outcome == "unknown":
        return Decision(promote=False, why=f"its latency cannot be told: {found.reason}", undecided=True, latency=found)
    return Decision(promote=True, why=f"right answers, no more errors, latency {found.reason}", latency=found)
