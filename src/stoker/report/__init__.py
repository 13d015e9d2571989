"""What a run was, for people: its facts, its figures, and one HTML file that opens offline."""
