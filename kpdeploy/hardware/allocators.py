"""Libraries that replace malloc when they are loaded before all others."""

from __future__ import annotations

import os
from pathlib import Path

ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libjemalloc.so.2")
PLACES = ("usr/lib/*-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib")


def find_allocator(name: str) -> str:
    """The path of one where the loader would find it, or ""."""
    told = [Path(place) for place in os.environ.get("LD_LIBRARY_PATH", "").split(":") if place]
    places = [*told, *(found for place in PLACES for found in sorted(Path("/").glob(place)))]
    return next((str(place / name) for place in places if (place / name).is_file()), "")


def installed_allocators() -> list[str]:
    """The paths of those that are here, one of each kind."""
    kinds: dict[str, str] = {}
    for name in ALLOCATORS:
        if path := find_allocator(name):
            kinds.setdefault(name.partition(".")[0].partition("_")[0], path)
    return list(kinds.values())
