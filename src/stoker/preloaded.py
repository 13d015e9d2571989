"""The last import of a forkserver: work that each forked process would otherwise repeat.

Forked processes share the server's memory until they write to it. A full garbage collection in each of them
would write to all of it, and visit every imported object, although none of these is garbage: so they are
frozen here.
"""

from __future__ import annotations

import gc

import stoker.trainer  # noqa: F401
import torch._dynamo  # noqa: F401
from pydantic import TypeAdapter

TypeAdapter(int)  # the first one looks through all installed packages for plugins
gc.collect()
gc.freeze()
