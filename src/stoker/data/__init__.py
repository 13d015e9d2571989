"""Data: the order of samples, the loader, reading text, and packing it into fixed rows."""
