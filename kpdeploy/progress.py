"""How long work tells what it is doing. Steps report to a Progress; this one says nothing, the CLI's draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Silent progress, and the protocol of all others."""

    @contextmanager
    def step(self, title: str, *, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Bracket one step; the value counts up when called, `total` times in all (None: unknown)."""
        yield lambda: None

    def say(self, text: str) -> None:
        """One line that stays on the screen."""
