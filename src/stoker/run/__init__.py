"""A run is a directory: its layout, its journal, and the view folded from it."""
