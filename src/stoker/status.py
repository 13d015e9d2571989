"""The statuses of a run, and of its attempts."""

FINISHED = "finished"
FAILED = "failed"
PREEMPTED = "preempted"
INTERRUPTED = "interrupted"
PAUSED = "paused"  # by a search, to be resumed later
STOPPED = "stopped"  # by a search, early and for good
RUNNING = "running"
KILLED = "killed"  # its process ended without recording why
