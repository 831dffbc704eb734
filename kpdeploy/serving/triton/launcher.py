"""Become another program that ends when its parent does: `python launcher.py PARENT_PID PROGRAM ARGUMENTS…`.

Standing alone. A program of its own, because the parent has threads (gRPC's) across which Python code between fork and
exec may hang.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have died before the line above: then nobody sends the signal.
    if os.getppid() == int(sys.argv[1]):
        os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
