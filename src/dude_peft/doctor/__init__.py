"""Whether this machine can do it, and what it lacks."""
