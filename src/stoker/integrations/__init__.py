"""A stoker run as another library's trial, Optuna's or Ray Tune's, and its export as a model of MLflow."""
