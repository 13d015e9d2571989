"""Causal language models: loaded, adapted, trained on packed documents, sampled, shared."""

from stoker.engine import quiet  # noqa: F401 (its import is its work)
