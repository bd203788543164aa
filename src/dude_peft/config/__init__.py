"""What a run is: its schema, reading it, explaining it; no torch."""
