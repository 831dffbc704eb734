"""The tritonserver process: how it is started, what its log says, and how it is stopped without leaving anything."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from kpdeploy.serving.triton.environment import ServerEnvironment
from kpdeploy.serving.triton.ports import Ports
from kpdeploy.serving.triton.scratch import Scratch

EXIT_TIMEOUT_S = 3


def command(environment: ServerEnvironment, ports: Ports, space: Scratch) -> list[str]:
    """The command line: models are loaded through the control API only, and a bad one does not end the server."""
    arguments = {
        "model-repository": space.folder / "repository",
        "backend-directory": space.folder / "backends",
        "http-address": ports.host,
        "grpc-address": ports.host,
        "metrics-address": ports.host,
        "http-port": ports.http,
        "grpc-port": ports.grpc,
        "metrics-port": ports.metrics,
        "model-control-mode": "explicit",
        "load-model": "*",
        "exit-on-error": "false",
        "strict-readiness": "false",
        "exit-timeout-secs": EXIT_TIMEOUT_S,
        "allow-gpu-metrics": "false",
        "backend-config": f"python,shm-region-prefix-name={space.folder.name}-",
        "metrics-config": "summary_latencies=true",
    }
    return [str(environment.binary), *(f"--{name}={value}" for name, value in arguments.items())]


class TritonProcess:
    """A tritonserver, and its python stubs, in a process group of their own. Ends with this process, even killed."""

    def __init__(self, environment: ServerEnvironment, ports: Ports, space: Scratch, *, preload: str = "") -> None:
        self._space = space
        launcher = Path(__file__).with_name("launcher.py")
        with space.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-IS", str(launcher), str(os.getpid()), *command(environment, ports, space)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment.variables(), **({"LD_PRELOAD": preload} if preload else {})},
                start_new_session=True,
                pass_fds=(space.lock,),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stubs(self) -> dict[int, str]:
        """The models of the living python stubs, by process id."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid).children():
                with contextlib.suppress(psutil.Error):
                    line = child.cmdline()
                    if child.status() != psutil.STATUS_ZOMBIE and len(line) > 1 and "python_backend_stub" in line[0]:
                        found[child.pid] = _model_of(line[1])
        return found

    def log_tail(self, lines: int = 12) -> str:
        text = self._space.log.read_text(errors="replace") if self._space.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-lines:])

    def stop(self) -> None:
        """End it: ask, wait a little longer than it allows itself, then kill the whole group."""
        try:
            if self.exit_status() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(EXIT_TIMEOUT_S + 2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._space.remove_shared_memory()


def _model_of(path: str) -> str:
    """The model's name in the path of its model.py, …/repository/NAME/VERSION/model.py."""
    match = re.search(r"/repository/([^/]+)/", path)
    return match[1] if match else ""
