"""Shipping a run's journal to where people look: a follower process, and its sinks."""
