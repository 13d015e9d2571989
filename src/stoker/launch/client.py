"""The command line clients by which clusters are asked."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from stoker.errors import BadInput, StokerError

_ANSWER = 60.0  # seconds that a client may take


def call(command: Sequence[str], needs: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a client; how it ended is the caller's to judge.

    Args:
        needs: what is said where the client is not here.
        given: what it reads from standard input.

    Raises:
        BadInput: it is not here.
        StokerError: nothing answered it.
    """
    try:
        return subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=_ANSWER, check=False
        )
    except FileNotFoundError as error:
        raise not_found(command[0], needs) from error
    except subprocess.TimeoutExpired as error:
        raise StokerError(f"{' '.join(command[:2])} did not answer within {_ANSWER:.0f} s") from error


def not_found(client: str, needs: str) -> BadInput:
    """The error of a client that is not here."""
    return BadInput(f"{client} not found: {needs}")
