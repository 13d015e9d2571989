"""Tracking: a follower process that ships a run's journal to the sinks, MLflow by default."""
