"""Hyperparameter search: a trial is a run."""
