"""What a run was made from: code, packages, hardware, data."""
