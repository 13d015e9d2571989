"""Checkpoints: directories of safetensors and JSON, valid once their manifest is written."""
