"""Pretrained models: finding, loading, probing and sizing them, their files."""
