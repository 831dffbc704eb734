"""A process that holds one artifact in its runtime and answers requests on stdin/stdout, a JSON object a line.

Run as a script (`python -P worker.py`) and standing alone, like the runtimes. Arrays travel as .npz files.

    {"load": {"runtime_file", "path", "inputs", "outputs", "settings"}}
    {"run": "in.npz", "into": "out.npz"}           arrays named 0, 1, … in call order
    {"time": "in.npz", "seconds": 0.5, "at_least": 5, "warmup": 2}
                                   -> {"milliseconds": [...], "own_milliseconds": [...]}
    {"reset_peak": true}                           the largest size so far is forgotten
    {"memory": true}   -> {"parts": [{"what", "bytes", "device"}, ...]}   what the runtime holds on devices

Each answer holds "peak_bytes", the largest resident size so far, or "error" with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[list[Any]], list[Any]]
State = dict[str, Callable[..., Any]]
"""`run`, and `memory` where the runtime has it."""


def read(path: str) -> list[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[str(i)] for i in range(len(arrays.files))]


def load(job: dict[str, Any]) -> State:
    spec = importlib.util.spec_from_file_location("runtime", job["runtime_file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Run = module.load(job["path"], inputs=job["inputs"], outputs=job["outputs"], settings=job["settings"])
    return {"run": run, "memory": getattr(module, "memory", list)}


def timed(
    run: Run, arrays: list[Any], *, seconds: float, at_least: int, warmup: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of single calls, one after the other, after `warmup` that do not count: by the clock, and without
    the time in which threads of this process waited for a core (nothing where the kernel does not tell)."""
    for _ in range(warmup):
        run(arrays)
    taken: list[float] = []
    own: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < at_least or time.perf_counter() < end:
        waited, used, start = waited_ms(), time.process_time(), time.perf_counter()
        run(arrays)
        took, worked = (time.perf_counter() - start) * 1e3, (time.process_time() - used) * 1e3
        taken.append(took)
        if waited is not None:
            # Some of the wait may have been before or after the call; it took no less than it worked.
            own.append(max(took - ((waited_ms() or waited) - waited), min(took, worked)))
    return taken, own


def waited_ms() -> float | None:
    """How long threads of this process could run and had no core, since they began."""
    try:
        stats = [file.read_text().split() for file in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:
        return None
    return sum(int(stat[1]) for stat in stats) / 1e6 if stats else None


def peak_bytes() -> int:
    """This process's largest resident size. (getrusage's would be its parent's, which lives on through exec.)"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Let the largest size begin anew from the present one (proc(5): 5 in clear_refs)."""
    # A sandbox may not have the file: the largest size then stays what it was while the model was loaded.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def answer(job: dict[str, Any], state: State) -> dict[str, Any]:
    if "load" in job:
        state.update(load(job["load"]))
        return {}
    if "memory" in job:
        return {"parts": state["memory"]()}
    if "run" in job:
        outputs = state["run"](read(job["run"]))
        np.savez(job["into"], **{str(i): np.asarray(a) for i, a in enumerate(outputs)})  # type: ignore[arg-type]
        return {}
    if "reset_peak" in job:
        reset_peak()
        return {}
    arrays = read(job["time"])
    limits = {name: job[name] for name in ("seconds", "at_least", "warmup")}
    taken, own = timed(state["run"], arrays, **limits)
    return {"milliseconds": taken, "own_milliseconds": own}


def main() -> None:
    # Libraries print to stdout; the answers get a descriptor of their own.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state: State = {}
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), state)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        reply["peak_bytes"] = peak_bytes()
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
