"""`python -m stoker.launch.beside PID COMMAND...`: runs the command, which ends when process PID ends."""

from __future__ import annotations

import os
import signal
import sys

from stoker import signals


def main() -> None:
    """Become the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    end_with_it = signals.at_parents_death(signal.SIGKILL)
    if end_with_it is not None:
        end_with_it()
    if os.getppid() != parent:  # it was already gone
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
