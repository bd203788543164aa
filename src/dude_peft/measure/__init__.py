"""Numbers that are reported: losses, KL in both directions, intervals, movement."""
