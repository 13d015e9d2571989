"""What to say if a Ray cluster asks for a token.

Ray's own errors about it differ between its APIs, and one of them looks as if there were no cluster.
"""

from __future__ import annotations

from stoker.errors import BadInput


def asked_for(error: BaseException) -> BadInput | None:
    """What to raise instead of an error of Ray's that is about a missing or wrong token, or None."""
    from ray.exceptions import AuthenticationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AuthenticationError) or AuthenticationError.__name__ in str(cause):
            return BadInput(
                "Ray asks for a token: set RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN or the file "
                "~/.ray/auth_token to the cluster's token"
            )
        cause = cause.__cause__ or cause.__context__
    return None
