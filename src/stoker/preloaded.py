"""What a server of processes imports last: what each of them would do again is done once.

Its processes share the server's memory until they write to it. A full collection of garbage would write to
all of it, in each of them, and looks at everything that the server has imported, which is never garbage.
"""

from __future__ import annotations

import gc

import stoker.loop  # noqa: F401
import torch._dynamo  # noqa: F401
from pydantic import TypeAdapter

TypeAdapter(int)  # the first one looks through all installed packages for plugins
gc.collect()
gc.freeze()
