"""Talking to a model: `dude chat` and `dude generate`."""
