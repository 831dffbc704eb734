"""The other end of worker.py: an artifact in a fresh process, asked from this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from kpdeploy.artifact import Artifact, located
from kpdeploy.errors import ProofFailed
from kpdeploy.inputs import Array
from kpdeploy.runtimes import source
from kpdeploy.scratch import work_folder

WORKER = Path(__file__).with_name("worker.py")


class RuntimeProcess:
    """An artifact loaded from disk in a process of its own. A context manager: the process ends with it.

    `runtime_file` and `python` put another runtime, or another environment's, in the place of the artifact's own;
    `preload` is the path of a library that the process gets before all others.

    Raises:
        ProofFailed: the artifact cannot be loaded or run, with the runtime's own words.
    """

    def __init__(
        self,
        artifact: Artifact,
        settings: Mapping[str, Any] | None = None,
        *,
        runtime_file: Path | None = None,
        python: str = sys.executable,
        preload: str = "",
    ) -> None:
        self.artifact = artifact
        self.runtime_file = runtime_file or source(artifact.format)
        self.python = python
        self.preload = preload
        self.settings = dict(artifact.settings if settings is None else settings)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        with ExitStack() as held:
            self._folder = held.enter_context(work_folder())
            self._log = held.enter_context((self._folder / "log").open("w+b"))
            self._process = held.enter_context(self._started())
            held.callback(self._end)
            self._ask({"load": self._job()}, "loaded")
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _started(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            # -P keeps this package's folder off sys.path: its onnx.py is not the package onnx.
            [self.python, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # What a runtime unpacks for itself (AOTInductor does) ends with this process's folder.
            env={**os.environ, "TMPDIR": str(self._folder), **({"LD_PRELOAD": self.preload} if self.preload else {})},
        )

    def _job(self) -> dict[str, Any]:
        artifact = self.artifact
        return {
            "runtime_file": str(self.runtime_file),
            "path": str(artifact.path),
            "inputs": list(artifact.input_names),
            "outputs": list(artifact.output_names),
            "settings": located(self.settings, artifact.folder),
        }

    def _end(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            # A process that died leaves what was meant for it unsent.
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """One call: arrays in call order in, arrays in the order of the outputs out."""
        into = self._folder / "out.npz"
        self._ask({"run": self._write(arrays), "into": str(into)}, "run")
        with np.load(into, allow_pickle=False) as file:
            found = [file[str(i)] for i in range(len(file.files))]
        into.unlink()
        return found

    def reset_peak(self) -> int:
        """Forget the largest size so far: `peak_bytes` begins anew from the present size, which is returned."""
        self._ask({"reset_peak": True}, "run")
        return self.peak_bytes

    def memory(self) -> list[dict[str, Any]]:
        """What the runtime holds on devices other than the host: what, bytes, device. Empty where it tells nothing."""
        return list(self._ask({"memory": True}, "run")["parts"])

    def time(self, arrays: Sequence[Array], *, seconds: float, at_least: int) -> list[float]:
        """Milliseconds of single calls, for about `seconds`."""
        return self.time_both(arrays, seconds=seconds, at_least=at_least, warmup=2)[0]

    def time_both(
        self, arrays: Sequence[Array], *, seconds: float, at_least: int, warmup: int
    ) -> tuple[list[float], list[float]]:
        """Milliseconds of single calls, after `warmup` that do not count: by the clock, and without the time in which
        the process's threads waited for a core. The second are of use while one thread works at a time, and empty
        where the kernel does not tell."""
        job = {"time": self._write(arrays), "seconds": seconds, "at_least": at_least, "warmup": warmup}
        reply = self._ask(job, "run")
        return list(reply["milliseconds"]), list(reply["own_milliseconds"])

    def _write(self, arrays: Sequence[Array]) -> str:
        path = self._folder / "in.npz"
        np.savez(path, **{str(i): a for i, a in enumerate(arrays)})  # type: ignore[arg-type]
        return str(path)

    def _ask(self, job: Mapping[str, Any], verb: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in reply:
            raise ProofFailed(
                f"{self.artifact.filename} cannot be {verb} by its runtime",
                why=str(reply["error"])[:600],
                next_step=f"try another format, or report it with the model ({self.artifact.format})",
            )
        self.peak_bytes = reply["peak_bytes"]
        return reply

    def _last_words(self) -> str:
        code = self._process.wait(timeout=5)
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-3:]
        return f"its process ended with code {code}: {' / '.join(tail)}"
