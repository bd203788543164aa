"""What answers are rewarded for: the rewards themselves, and the process in which they run."""
