"""Checks of this machine that find what would go wrong, before a training does.

A check is a function that yields findings; `checks.py` lists them in order.
"""
