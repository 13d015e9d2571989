"""What Ray's errors say, and which machine they are about, in one line."""

from __future__ import annotations

import re
from typing import Any

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


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
