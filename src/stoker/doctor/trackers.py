"""The sinks that STOKER_SINKS names: installed, configured, answering."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from stoker import store_urls
from stoker.doctor.findings import Finding, note, ok, problem, said
from stoker.doctor.software import version
from stoker.errors import BadInput
from stoker.tracking import sinks, store

_ANSWER = 5.0  # seconds
_VIEWER = {"query": "query { viewer { username } }"}
_REFUSED = (401, 403)
_OF_SYSTEM = re.compile(r"\[Errno -?\d+\] [\w ]+")


def check(runs: str) -> Iterator[Finding]:
    """Each sink; `runs` is where the embedded store is."""
    names = sinks.named()
    if not names:
        yield ok("STOKER_SINKS=none: runs are not sent to any tracker; `stoker sync` can do it later")
    for name in names:
        try:
            sinks.check(name)
            yield _SINKS[name](runs)
        except BadInput as error:
            yield problem(said(error))
        except Exception as error:  # import errors: a library that it needs has the wrong version
            yield problem(
                f"{name} cannot be used ({type(error).__name__}: {said(error)}): pip install "
                f"--force-reinstall {name}, or remove it from STOKER_SINKS"
            )


def _mlflow(runs: str) -> Finding:
    os.environ.update(store.QUIET)
    uri = store.server_uri()
    shown = store.without_credentials(uri or "")
    if uri is not None and uri.startswith(("http://", "https://")):
        return _mlflow_server(uri, shown)
    import mlflow.tracking  # noqa: F401 - whether it can be

    if uri is not None:
        return ok(f"mlflow {version('mlflow')}, to {shown}, which is not a server and was not opened")
    where = "in its working copy" if store_urls.is_url(runs) else f"in {runs}/mlflow.db"
    return ok(f"mlflow {version('mlflow')}, to the embedded store {where}; `stoker ui` shows it")


def _mlflow_server(uri: str, shown: str) -> Finding:
    os.environ.update(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=f"{_ANSWER:.0f}")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        return problem(f"mlflow: {_hint_for(store.without_credentials(said(error)), shown)}")
    return ok(f"mlflow {version('mlflow')}, to {shown}, which answers")


def _hint_for(error: str, shown: str) -> str:
    if any(f"error code {code}" in error for code in _REFUSED):
        return (
            f"{shown} refuses access ({error}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "or MLFLOW_TRACKING_TOKEN"
        )
    of_system = _OF_SYSTEM.search(error)  # the rest was added by the layers above
    reason = of_system[0] if of_system else error
    return f"{shown} does not answer as MLflow ({reason}): start the server, or correct MLFLOW_TRACKING_URI"


def _wandb(runs: str) -> Finding:
    from stoker.tracking import wandb_sink

    name = f"wandb {version('wandb')}"
    if wandb_sink.mode() == "disabled":
        return ok(f"{name}, disabled by its settings: no run goes there")
    if wandb_sink.mode() == "online":
        return _wandb_server(name, wandb_sink.server().rstrip("/"), wandb_sink.key())
    if wandb_sink.key() or os.environ.get("WANDB_MODE"):
        return ok(f"{name}, offline: each run keeps its files, and `wandb sync` uploads them")
    return note(
        f"{name}, offline as there is no API key; run `wandb login`, or set WANDB_API_KEY, to use the server"
    )


def _wandb_server(name: str, url: str, key: str) -> Finding:
    import httpx2

    shown = store.without_credentials(url)
    if not key:
        return problem(f"{name}: WANDB_MODE=online without a key: set WANDB_API_KEY, or run `wandb login`")
    try:
        answer = httpx2.post(f"{url}/graphql", json=_VIEWER, auth=("api", key), timeout=_ANSWER)
        viewer = answer.json()["data"]["viewer"] if answer.is_success else None
    except httpx2.TransportError as error:
        return problem(
            f"{name}: {shown} does not answer ({said(error)}): correct WANDB_BASE_URL or HTTPS_PROXY, or set "
            "WANDB_MODE=offline"
        )
    except (ValueError, LookupError, TypeError):
        return problem(f"{name}: {shown} does not answer like W&B: correct WANDB_BASE_URL")
    if viewer is None and (answer.is_success or answer.status_code in _REFUSED):
        return problem(f"{name}: {shown} rejects the key: set WANDB_API_KEY to a valid one")
    if viewer is None:
        return problem(f"{name}: {shown} answers {answer.status_code}: correct WANDB_BASE_URL, or try later")
    return ok(f"{name}, to {shown}, which accepts the key")


def _tensorboard(runs: str) -> Finding:
    from stoker.tracking import tensorboard_sink  # noqa: F401 - whether it can be

    return ok(f"tensorboard {version('tensorboard')}, to files in each run")


_SINKS: dict[str, Callable[[str], Finding]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
}
