"""The thread that watches a running server until it ends, whichever server it is."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Watcher:
    """Calls `look` every `interval_s` while `alive` says so. What `look` raises is raised again by `wait`, in the
    thread that a user sees."""

    def __init__(self, alive: Callable[[], bool], *, interval_s: float) -> None:
        self._alive = alive
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def closing(self) -> bool:
        """Is the server being ended on purpose?"""
        return self._closing.is_set()

    def start(self, look: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._watch, args=(look,), name="kpdeploy-watch", daemon=True)
        self._thread.start()

    def wait(self) -> Exception | None:
        """Block until the server has ended; what `look` raised, if that is why."""
        # In slices, so that signals are handled.
        while not self._ended.wait(0.5):
            pass
        return self._failure

    def close(self) -> None:
        """Look no more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(self._interval_s)

    def _watch(self, look: Callable[[], None]) -> None:
        try:
            while not self._closing.wait(self._interval_s):
                if not self._alive():
                    break
                look()
        except Exception as error:
            self._failure = error
        finally:
            self._ended.set()
