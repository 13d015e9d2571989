"""What `stoker jobs cancel --now` runs on a Ray cluster: it ends a job's launchers, and so their ranks.

Ray itself can only ask a job to stop, and waits for as long as was specified when the job was submitted.

    python -m stoker.launch.ray_end NAME
"""

from __future__ import annotations

import contextlib
import sys


def main() -> None:
    """End the actors of a job, by its name; see `ray_nodes`."""
    import ray

    ray.init("auto", namespace=sys.argv[1])
    for name in ray.util.list_named_actors():
        with contextlib.suppress(ValueError):  # it has ended since
            ray.kill(ray.get_actor(name))


if __name__ == "__main__":
    main()
