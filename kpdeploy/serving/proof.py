"""A server is ready when it gives the golden answers, whichever server it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kpdeploy.artifact import Comparison
from kpdeploy.baseline import Baseline
from kpdeploy.deployment import Deployment
from kpdeploy.errors import KpdeployError, NotReady

Replay = Callable[[Deployment, Baseline], Sequence[Comparison]]


def prove_served(deployment: Deployment, replay: Replay, *, log: str | Path) -> None:
    """Put the golden requests of a version in a local repository to the server.

    Raises:
        NotReady: an answer is wrong, or does not come; `log` is the server's, for the user to read.
    """
    try:
        comparisons = replay(deployment, Baseline.read(Path(deployment.folder)))
    except KpdeployError as error:
        why = error.in_a_line
    else:
        wrong = [c for c in comparisons if not c.passed]
        if comparisons and not wrong:
            return
        told = [f"{c.output} is off by {c.error:.1e}, at most {c.tolerance:.1e} is right" for c in wrong]
        why = ", ".join(told) or "it has no golden requests"
    raise NotReady(
        f"{deployment.model} is loaded, and does not give its golden answers",
        why=why,
        next_step=f"export the model again on this machine; the server's log is {log}",
    )
