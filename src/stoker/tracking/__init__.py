"""Tracking: a follower process that ships a run's journal to MLflow."""
