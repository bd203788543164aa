"""Where a run computes: processes, signals, memory, the environment."""
