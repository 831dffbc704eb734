"""When a difference is a regression: the options of every command that judges one."""

from __future__ import annotations

from collections.abc import Callable

import click


def criteria_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `significance` and `effect` (see kpdeploy.monitoring.regression.Criteria)."""
    significance = click.option(
        "--significance",
        type=click.FloatRange(0, 0.5, min_open=True),
        default=1e-3,
        show_default=True,
        help="The largest p of a regression, over all looks together.",
    )
    effect = click.option(
        "--effect",
        type=click.FloatRange(min=0, min_open=True),
        default=0.05,
        show_default=True,
        help="The smallest slowdown that matters: 0.05 is 5 %.",
    )
    return significance(effect(command))
