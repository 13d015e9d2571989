"""What this machine has, and what would go wrong here before a training does.

A check is a function that yields findings; `checks.py` has them in the order in which they are made.
"""
