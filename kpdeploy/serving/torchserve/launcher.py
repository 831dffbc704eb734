"""Run a program in this process group, and kill the group when it is asked to end, or when its parent is gone:
`python launcher.py PARENT_PID PROGRAM ARGUMENTS…`.

Standing alone. TorchServe starts Java, and Java the workers: none of them ends with the program that was started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have died before the line above: then nobody sends the signal.
    if os.getppid() == int(sys.argv[1]):
        sys.exit(subprocess.call(sys.argv[2:]))


if __name__ == "__main__":
    main()
