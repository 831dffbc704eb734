"""A version tried beside the one in service."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import (
    KpdeployError,
    ModelNotServed,
    NothingToCompare,
    NotReady,
    RepositoryBusy,
    RolledBack,
    UnknownName,
)
from kpdeploy.monitoring.check import same_model
from kpdeploy.monitoring.regression import Criteria
from kpdeploy.monitoring.rollout import CANARY, STATE, Trial, try_out
from kpdeploy.monitoring.rollout import Decision as RolloutDecision
from kpdeploy.progress import Progress
from kpdeploy.serving.client import Client, connect, replay


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a rollout ended."""

    model: str
    to: int
    against: int
    decision: RolloutDecision
    trial: Trial
    resumed: bool

    def error(self) -> RolledBack | None:
        if self.decision.promote:
            return None
        return RolledBack(
            f"{self.model} version {self.to} is not promoted; version {self.against} serves",
            why=self.decision.why,
            next_step="give it more time with --seconds" if self.decision.undecided else "fix it, and export again",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "to": self.to, "against": self.against, "promoted": self.decision.promote,
            "resumed": self.resumed, "decision": self.decision.to_json(), "trial": asdict(self.trial),
        }  # fmt: skip


def rollout(
    repo: str,
    *,
    to: int,
    against: int,
    url: str,
    model: str | None = None,
    seconds: float = 60,
    ready_timeout_s: float = 60,
    criteria: Criteria | None = None,
    progress: Progress | None = None,
) -> Rollout:
    """Try version `to` beside version `against` on the running server at `url`; promote it, or roll back.

    During the trial `against` serves, and `to` runs beside it as the model NAME-canary: no user's request reaches it.
    The server must serve new versions of `repo` by itself (`kpdeploy serve --poll`, or tritonserver in poll mode), or
    be reachable at its HTTP port with its model control open. A trial that was stopped goes on where it was.

    Raises:
        RepositoryBroken, UnknownName: a version is not there. NothingToCompare: they take different requests.
        RepositoryBusy: a rollout of other versions was stopped here. Unreachable, NotReady: the server.
        RolledBack: the trial says no, or the server does not serve the promoted version; `against` serves.
    """
    from kpdeploy.serving.repository import find_version
    from kpdeploy.serving.storage import local_path
    from kpdeploy.serving.triton.repository import activate, publish, withdraw

    shown = progress or Progress()
    place = Path(_local_repository(local_path(repo)))
    model = model or _tried(place)
    new, old = find_version(str(place), model, to), find_version(str(place), model, against)
    if new.manifest.target != "triton":
        raise UnknownName(
            f"{repo} is for {new.manifest.target}, which has no canaries here",
            why="a rollout runs the new version as a model of its own, in a Triton repository",
            next_step=f"serve with --poll: a version gets requests once its golden answers are right; then "
            f"kpdeploy check {repo} --against {against}",
        )
    same_model(new.manifest, old.manifest, f"version {to}", f"version {against}")
    state = place / new.model / STATE
    trial = Trial.read(state)
    if trial is not None and (trial.to, trial.against) != (to, against):
        raise RepositoryBusy(
            f"a rollout of version {trial.to} against {trial.against} was stopped here",
            next_step=f"go on with it (--to {trial.to} --against {trial.against}), or end it with --abort",
        )
    resumed = trial is not None
    trial = trial or Trial(to=to, against=against, canary=f"{new.model}{CANARY}")
    with connect(url) as client:
        client.live()
        new.manifest.check_files(Path(new.folder))
        if find_version(str(place), new.model, None).version != against:
            shown.say(f"version {against} serves during the trial; {to} was named before")
            activate(old)
        if not resumed or not (place / trial.canary).exists():
            withdraw(place, trial.canary)
            publish(str(place), replace(new.manifest, model=trial.canary), Path(new.folder))
        trial.write(state)
        canary = find_version(str(place), trial.canary, None)
        with shown.step(f"waiting until the server serves {trial.canary}"):
            _await_served(client, canary, ready_timeout_s)
            _await_served(client, old, ready_timeout_s)
        decision = try_out(
            client, old, canary, trial, state=state, criteria=criteria or Criteria(), seconds=seconds, progress=shown
        )
        if decision.promote:
            activate(new)
            try:
                with shown.step(f"waiting until the server serves version {to}"):
                    _await_served(client, new, ready_timeout_s)
            except KpdeployError as error:
                decision = replace(decision, promote=False, why=f"promoted, it was not served: {error.what}")
                activate(old)
        withdraw(place, trial.canary)
        state.unlink(missing_ok=True)
    return Rollout(model=new.model, to=to, against=against, decision=decision, trial=trial, resumed=resumed)


def abort_rollout(repo: str, *, model: str | None = None) -> Trial:
    """End a rollout that was stopped: the version before it serves, and the canary is gone.

    Raises:
        NothingToCompare: there is none.
    """
    from kpdeploy.serving.repository import find_version, read_repository
    from kpdeploy.serving.triton.repository import activate, withdraw

    place = Path(_local_repository(repo))
    names = [model] if model else [d.model for d in read_repository(str(place))]
    for name in names:
        trial = Trial.read(place / name / STATE)
        if trial is not None:
            activate(find_version(str(place), name, trial.against))
            withdraw(place, trial.canary)
            (place / name / STATE).unlink()
            return trial
    raise NothingToCompare(f"no rollout was stopped in {repo}", next_step="nothing is to be done")


def _tried(repo: Path) -> str | None:
    """The model that is meant where none is named: the only one, but for the canary of a trial that was stopped."""
    from kpdeploy.serving.repository import read_repository

    names = {deployment.model for deployment in read_repository(str(repo))}
    own = [name for name in names if name.removesuffix(CANARY) not in names - {name}]
    return own[0] if len(own) == 1 else None


def _local_repository(repo: str) -> str:
    if "://" in repo:
        raise UnknownName(
            f"{repo} is no folder",
            why="a rollout replaces config.pbtxt under a lock, which only a file system has",
            next_step="give the folder that the server serves",
        )
    return repo


def _await_served(client: Client, deployment: Deployment, timeout_s: float) -> None:
    """Until the server has this version and its golden answers come back; it is asked to load it where it may be."""
    from kpdeploy.serving.triton import control

    end = time.monotonic() + timeout_s
    asked = False
    while time.monotonic() < end:
        with suppress(ModelNotServed):
            # The canary of an earlier trial has the same name and version, and may still be loaded: the digest tells.
            # Configurations of earlier releases state none.
            ready = client.model_ready(deployment.model, deployment.version)
            if ready and client.digest(deployment.model, str(deployment.version)) in ("", deployment.manifest.digest):
                replay(client, deployment, Baseline.read(Path(deployment.folder)))
                return
        if not asked and client.protocol == "http" and time.monotonic() > end - timeout_s + 3:
            asked = True
            with suppress(KpdeployError):
                control.load(client.address, deployment.model, timeout_s=timeout_s)
        time.sleep(0.2)
    raise NotReady(
        f"the server at {client.address} does not serve {deployment.model} version {deployment.version}",
        why=f"it did not within {timeout_s:g} s",
        next_step="start it so that it sees new versions: kpdeploy serve REPO --poll (or tritonserver "
        "--model-control-mode=poll), then give the same command again",
    )
