"""A Ray cluster: connecting to it, waiting for room on it, and what its errors say, in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from stoker.errors import BadInput, Stopped
from stoker.status import PREEMPTED
from stoker.words import first_line

_LOOK = 0.2  # seconds between two looks at whether there is room
_PATIENCE = 30.0  # seconds after which it is said that there is none yet
_REACHED = 10.0  # seconds to connect to a cluster
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def require() -> None:
    """Raises BadInput if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise BadInput("--on ray needs Ray, which is not installed: pip install 'stoker[ray]'")


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster for the duration of the block.

    If this process is connected to a cluster already, that connection is used, and stays.

    Args:
        address: `HOST:PORT` or `auto`; by default that of the connection, or else RAY_ADDRESS, and if that is
            not set, Ray is started on this machine only.

    Raises:
        BadInput: Ray is not installed, no cluster can be reached, this process is connected to another one.
    """
    require()
    import ray

    before = ray.is_initialized()
    if before:
        _check_connected_to(address)
    else:
        _connect(address or os.environ.get("RAY_ADDRESS"))
    try:
        yield
    finally:
        if not before:
            ray.shutdown()


def wait_for_room(group: Any, told: Sequence[object], say: Callable[[], None]) -> bool:
    """Wait until a placement group has its resources; False if this is told to end before that.

    Args:
        told: not empty once it is told to end.
        say: called once if there is no room for a while.
    """
    import ray

    ready, begun, said = group.ready(), time.monotonic(), False
    while not ray.wait([ready], timeout=_LOOK)[0]:
        if told:
            return False
        if not said and time.monotonic() - begun > _PATIENCE:
            said = True
            say()
    return True


def asked_for(error: BaseException) -> BadInput | None:
    """What to raise instead of an error of Ray's that is about a missing or wrong token, or None.

    Ray's own errors about it differ between its APIs, and one of them looks as if there were no cluster.
    """
    from ray.exceptions import AuthenticationError

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, AuthenticationError) or AuthenticationError.__name__ in str(found):
            return BadInput(
                "Ray asks for a token: set RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN or the file "
                "~/.ray/auth_token to the cluster's token"
            )
        found = found.__cause__ or found.__context__
    return None


def cause(error: BaseException) -> str:
    """The exception of another process that an error of Ray's ends with, without its traceback."""
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)


def node_of(group: Any, bundle: int) -> str:
    """The id of the node of a bundle of a placement group that is ready."""
    from ray.util.placement_group import placement_group_table

    return str(placement_group_table(group)["bundles_to_node_id"][bundle])


def shown(node: str) -> str:
    """A node as people know it: `host7 (10.0.0.7)`."""
    import ray

    known = next((one for one in ray.nodes() if one["NodeID"] == node), None)
    return f"{known['NodeManagerHostname']} ({known['NodeManagerAddress']})" if known else node


def _check_connected_to(address: str | None) -> None:
    """Raises BadInput if this process is connected to another cluster, or from outside of it."""
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        raise BadInput(
            "this process is connected to Ray as a client (ray://): start the search on a machine of the "
            "cluster, with `ray job submit` or by hand"
        )
    here = ray.get_runtime_context().gcs_address
    if address not in (None, "auto") and _resolved(address) != _resolved(here):
        raise BadInput(
            f"--address {address}: this process is connected to the Ray cluster at {here}; leave out the "
            "address to search there, or call ray.shutdown() first"
        )


def _resolved(address: str) -> str:
    """An address by IP, with that of this machine in the cluster instead of a loopback one."""
    import ray

    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError):  # an unknown name
        host = socket.gethostbyname(host)
    return f"{ray.util.get_node_ip_address() if host.startswith('127.') else host}:{port}"


def _connect(address: str | None) -> None:
    """Connect to a cluster, or start Ray on this machine. Raises BadInput."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call after the end must not start Ray again
    import ray
    from ray.exceptions import AuthenticationError

    if address is not None and address.startswith("ray://"):
        raise BadInput(
            f"--address {address}: start the search on a machine of the cluster, with `ray job submit` or by "
            "hand, and give its HOST:PORT, or auto"
        )
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with _answers_kept():
            if address is None or address == "local":
                ray.init("local", include_dashboard=False, **quiet)
                return
            if address != "auto":
                _reach(address)
            ray.init(address, **quiet)
    except (AuthenticationError, OSError, ValueError, RuntimeError) as error:
        if (asked := asked_for(error)) is not None:
            raise asked from error
        first = first_line(error)
        if address is None:
            raise
        raise BadInput(
            f"--address {address}: cannot reach a Ray cluster there from this machine ({first}); start one "
            "with `ray start --head`, or leave out --address to search on this machine"
        ) from error


@contextlib.contextmanager
def _answers_kept() -> Iterator[None]:
    """Keep the SIGTERM handler of this process: Ray's would end it without checkpoints, by `sys.exit(15)`."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as told:
        if told.code == signal.SIGTERM:
            raise Stopped(PREEMPTED) from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _reach(address: str) -> None:
    """Check that the address can be reached, as Ray would retry for minutes. Raises OSError or ValueError."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError("an address must be HOST:PORT, or auto")
    socket.create_connection((host.strip("[]"), int(port)), _REACHED).close()
