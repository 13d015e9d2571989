"""What `stoker jobs cancel --now` has a Ray cluster run: it ends the launchers of a job, and so their ranks.

Ray's own way to stop a job is to ask, and to wait for as long as was said when the job was submitted.

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
