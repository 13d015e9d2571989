"""The Hugging Face hub: whether it answers, and accepts the token."""

from __future__ import annotations

from collections.abc import Iterator

from stoker.doctor.findings import Finding, note, ok, problem, said

_ANSWER = 5.0  # seconds
_WHOM = "/api/whoami-v2"
_REFUSED = (401, 403)


def check() -> Iterator[Finding]:
    """Whether the hub is used at all, answers, and accepts the token, if there is one."""
    from huggingface_hub import constants, get_token

    token = get_token()
    known = "a token is set" if token else "no token is set, which gated and private models need (HF_TOKEN)"
    if constants.HF_HUB_OFFLINE:
        yield note(f"HF_HUB_OFFLINE is set: models and datasets come only from the cache; {known}")
    else:
        yield _answer(constants.ENDPOINT, token, known)


def _answer(endpoint: str, token: str | None, known: str) -> Finding:
    import httpx2
    from huggingface_hub import get_session

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = get_session().get(f"{endpoint}{_WHOM}", headers=headers, timeout=_ANSWER)
    except httpx2.TransportError as error:
        return problem(
            f"{endpoint} cannot be reached ({said(error)}): set HF_HUB_OFFLINE=1 if everything needed is in "
            f"the cache, HF_ENDPOINT to a mirror, or HTTPS_PROXY to a proxy; {known}"
        )
    if token and answer.status_code in _REFUSED:
        return problem(f"{endpoint} rejects the token: set HF_TOKEN to a valid one, or run `hf auth login`")
    if answer.status_code >= 500:
        return problem(
            f"{endpoint} answers {answer.status_code}: try again later, or set HF_HUB_OFFLINE=1; {known}"
        )
    if token and answer.is_success:
        return ok(f"{endpoint} answers, and accepts the token")
    return ok(f"{endpoint} answers; {known}")
