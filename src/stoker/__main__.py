"""The `stoker` command, and `python -m stoker`.

The ranks of a run import this module too.
"""

import sys

from stoker import signals
from stoker.errors import EXIT_INTERRUPTED

_TRAINING = ("train", "resume", "sweep", "reproduce")


def run() -> None:
    """Run the command. Commands that train handle a scheduler's signals first: the imports take a second."""
    if sys.argv[1:2] and sys.argv[1] in _TRAINING:
        signals.answer_while_starting()
    try:
        from stoker.cli import main

        main.run()
    except KeyboardInterrupt:  # while the command is imported; later it is answered there
        sys.stderr.write("stoker: interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    run()
