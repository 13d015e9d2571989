"""`python -m stoker.launch.beside PID COMMAND...`: the command, which ends when process PID does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2): a signal at the death of the parent; it outlives exec


def main() -> None:
    """Become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
