"""A stoker run as another library's trial: Optuna's, Ray Tune's."""
