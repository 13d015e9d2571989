"""The command line clients of clusters."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from stoker.errors import BadInput, StokerError

_ANSWER = 60.0  # seconds that a client may take


def call(
    command: Sequence[str], needs: str, given: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a client; the caller judges how it ended.

    Args:
        needs: ends the message if the client is not found.
        given: its standard input.
        environment: its variables; by default those of this process.

    Raises:
        BadInput: it is not found.
        StokerError: it did not answer in time.
    """
    try:
        return subprocess.run(
            command, input=given, env=environment, capture_output=True, text=True, timeout=_ANSWER,
            check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise not_found(command[0], needs) from error
    except subprocess.TimeoutExpired as error:
        raise StokerError(f"{' '.join(command[:2])} did not answer within {_ANSWER:.0f} s") from error


def not_found(client: str, needs: str) -> BadInput:
    """The error for a client that is not found."""
    return BadInput(f"{client} not found: {needs}")
