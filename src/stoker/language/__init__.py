"""Causal language models: loaded, adapted, trained on packed documents, sampled, shared."""
